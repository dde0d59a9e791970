"""S-MagNorm inside the kernels: the element-by-element formulas of ``reference/gate.py``.

Here z is in units of ln 2, so that ``exp2`` serves::

    rho = |d| / (|b| + eps)          e = 2^(rho * slope - offset) = exp(z)
    q = 1 / (1 + e) = sigmoid(-z)    g = 1 + q          s = 1 / g

No operand needs the care of an exact division: |b| + eps >= 2^-126, and the others are at least 1.
e may be infinite; then q is 0. Instructions are what the epilogue must save (README.md): four
special functions an element take less of their unit than all else takes of the schedulers.
"""

import triton
import triton.language as tl

from .fast_math import _exp2, _from_unsigned, _nearest_integer, _reciprocal


@triton.jit
def _relative_magnitude(b, d, eps):
    return tl.abs(d) * _reciprocal(tl.abs(b) + eps)


@triton.jit
def _gate(b, d, slope, offset, eps, beta):
    """g and s = 1 / g; where d == 0 they are beta and 1 / beta, and ``out`` is then b."""
    g = 1 + _reciprocal(1 + _exp2(_relative_magnitude(b, d, eps) * slope - offset))
    g = tl.where(d == 0, beta, g)
    return g, _reciprocal(g)


@triton.jit
def _apply_gate(b, d, s, beta, decay):
    """out = ((beta - 1 + decay) b + decay d) s, and b itself where nothing moved and decayed."""
    out = ((beta - 1 + decay) * b + decay * d) * s
    return tl.where(d == 0, b * (1 + (decay - 1) / beta), out)


@triton.jit
def _encode(g, s, top, code_steps, dtype: tl.constexpr):
    """What is saved: s itself in float32, else the linear code of g of ``gate_code.py``.

    1 <= g <= top up to rounding, so no code lies outside its range. NaN has no code; any will do,
    the output it belongs to is NaN already.
    """
    if dtype == tl.float32:
        return s
    else:
        code = _nearest_integer((top - g) * code_steps)
        return (code if dtype == tl.uint8 else code ^ 0x8000).to(dtype)  # int16: less 2^15


@triton.jit
def _decode(saved, top, code_steps):
    """s from what ``_encode`` saved."""
    if saved.dtype == tl.float32:
        return saved
    else:
        code = saved.to(tl.int32)
        if saved.dtype == tl.int16:
            code = (code & 0xFFFF) ^ 0x8000
        return _reciprocal(top - _from_unsigned(code) * (1 / code_steps))
