"""Plain PyTorch of every op, forward and backward: the truth, the CPU path, the documentation.

``eager`` is the method as one would write it; ``linear``, ``weight``, ``epilogue`` and
``batched`` are the explicit passes that the registered ops run; ``gate`` is S-MagNorm.
"""

from . import batched, epilogue, linear, weight
from .eager import cabr_core, cabr_core_backward, cur_epilogue, cur_linear, delta_weight, smagnorm

__all__ = [
    "batched",
    "cabr_core",
    "cabr_core_backward",
    "cur_epilogue",
    "cur_linear",
    "delta_weight",
    "epilogue",
    "linear",
    "smagnorm",
    "weight",
]
