"""The registered ops: schema, shapes (fakes), autograd, FLOPs, vmap, and the ``impl`` switch."""

from .library import IMPLS, apply, forward_mode, pack_norm, resolve, why_unavailable
from .mixed import cur_mixed
from .output_domain import CurLinear
from .sharding import frozen, is_dtensor, prepare
from .update import CurUpdate
from .weight_domain import CurWeightLinear

__all__ = ["IMPLS", "CurLinear", "CurUpdate", "CurWeightLinear", "apply", "cur_mixed",
           "forward_mode", "frozen", "is_dtensor", "pack_norm", "prepare", "resolve",
           "why_unavailable"]
