"""The registered ops: schema, shapes (fakes), autograd, FLOPs, vmap, and the ``impl`` switch."""

from .batched import CurBatched
from .core import folded_core
from .epilogue import CurEpilogue
from .linear import CurLinear
from .projections import CurLinearByTicket, SharedInput
from .registry import (
    IMPLS,
    apply,
    forward_mode,
    pack_norm,
    resolve,
    transformed,
    why_unavailable,
)
from .sharding import frozen, is_dtensor, prepare
from .weight import CurWeightLinear

__all__ = [
    "IMPLS",
    "CurBatched",
    "CurEpilogue",
    "CurLinear",
    "CurLinearByTicket",
    "CurWeightLinear",
    "SharedInput",
    "apply",
    "folded_core",
    "forward_mode",
    "frozen",
    "is_dtensor",
    "pack_norm",
    "prepare",
    "resolve",
    "transformed",
    "why_unavailable",
]
