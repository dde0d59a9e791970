"""The registered ops: schema, shapes (fakes), autograd, FLOPs, vmap, and the ``impl`` switch."""

from .library import IMPLS, pack_norm, resolve, why_unavailable
from .output_domain import CurLinear
from .weight_domain import CurWeightLinear

__all__ = ["IMPLS", "CurLinear", "CurWeightLinear", "pack_norm", "resolve", "why_unavailable"]
