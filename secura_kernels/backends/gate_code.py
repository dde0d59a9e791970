"""How the gate is saved for the backward pass: a linear code of g in [1, highest].

The finest relative steps lie at the highest g, where little has moved, and the value of an unmoved
element (g = beta there) is exact, so that the first step's gradients have no error from the code.

bfloat16 layers: 8 bits; the error of s is at most 1e-3 where g = 2 and 2e-3 where g = 1, no more
than bfloat16's own rounding. float16: 16 bits, the bytes of float16 for 1 / 60 of its error.
float32 and float64: s = 1 / g itself, exact.
"""

import torch

from ..settings import SMagNorm

_CODES = {torch.bfloat16: torch.uint8, torch.float16: torch.int16}


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the gate is saved in by a layer that computes in ``dtype``."""
    return _CODES.get(dtype, dtype)


def code_range(dtype: torch.dtype) -> tuple[int, int] | None:
    """Lowest and highest code of a layer that computes in ``dtype``; None where s is saved."""
    if dtype not in _CODES:
        return None
    limits = torch.iinfo(_CODES[dtype])
    return limits.min, limits.max


def highest_gate(norm: SMagNorm) -> float:
    """Upper end of g: beta where d == 0, at most g(0) elsewhere; above 1 even for a gate of 1."""
    return max(norm.base_weight, norm.gate_at_zero, 257 / 256)
