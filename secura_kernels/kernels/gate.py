"""S-MagNorm inside the kernels: the element-by-element formulas of ``reference/gate.py``.

Here z is in units of ln 2, so that ``exp2`` serves::

    rho = |d| / (|b| + eps)          e = 2^(rho * slope - offset) = exp(z)
    g = (2 + e) / (1 + e)            s = 1 / g        both from one reciprocal of (1 + e)(2 + e)

Special functions are the scarce unit of this epilogue (16 a cycle and SM against 128 multiply-
adds), so there are three per element: two reciprocals and one exp2.
"""

import triton
import triton.language as tl


@triton.jit
def _relative_magnitude(b, d, eps):
    return tl.abs(d) / (tl.abs(b) + eps)


@triton.jit
def _exp_z(rho, slope, offset):
    # At 2^60 the gate is 1 to float32's last bit, and (1 + e)(2 + e) does not overflow.
    return tl.exp2(tl.minimum(rho * slope - offset, 60.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _gate(b, d, slope, offset, eps, beta):
    """g and s = 1 / g; where d == 0 they are beta and 1 / beta, and ``out`` is then b."""
    e = _exp_z(_relative_magnitude(b, d, eps), slope, offset)
    upper, lower = 2 + e, 1 + e
    both = 1 / (upper * lower)
    g = tl.where(d == 0, beta, upper * upper * both)
    s = tl.where(d == 0, 1 / beta, lower * lower * both)
    return g, s


@triton.jit
def _apply_gate(b, d, s, beta, decay):
    """out = ((beta - 1 + decay) b + decay d) s, and b itself where nothing moved and decayed."""
    out = ((beta - 1 + decay) * b + decay * d) * s
    return tl.where(d == 0, b * (1 + (decay - 1) / beta), out)


@triton.jit
def _encode(g, s, top, code_steps, code_low, dtype: tl.constexpr):
    """What is saved: s itself in float32, else the linear code of g of ``gate_code.py``."""
    if dtype == tl.float32:
        return s
    else:
        steps = tl.floor((top - g) * code_steps + 0.5)
        last = 255.0 if dtype == tl.uint8 else 65535.0
        # NaN has no code; any will do, the output it belongs to is NaN already.
        steps = tl.where(steps >= 0, tl.minimum(steps, last), 0.0)
        return (steps + code_low).to(dtype)


@triton.jit
def _decode(saved, top, code_steps, code_low):
    """s from what ``_encode`` saved."""
    if saved.dtype == tl.float32:
        return saved
    else:
        return 1 / (top - (saved.to(tl.float32) - code_low) * (1 / code_steps))


@triton.jit
def _by_relative_magnitude(grad, b, d, decay, rho, slope, offset, beta):
    """Gradient of rho, of a full-derivative gate; ``slope`` here is scale / ref, not in ln 2.

    ds/dz = s^2 sigmoid(z) sigmoid(-z) = e / (2 + e)^2. Zero where d == 0, by rule.
    """
    e = _exp_z(rho, slope * 1.4426950408889634, offset)
    # Exactly 0 where e is at its limit: a zero base divides what is left by eps.
    by_z = tl.where(e < 1152921504606846976.0, e / ((2 + e) * (2 + e)), 0.0)  # 2^60
    numerator = (beta - 1 + decay) * b + decay * d
    return tl.where(d == 0, 0.0, grad * numerator * by_z * slope)


@triton.jit
def _at_largest(rho, largest):
    """1 where rho is the largest, else 0; up to the rounding by which two kernels may differ."""
    return (rho >= largest * (1 - 2.0**-16)).to(tl.float32)


@triton.jit
def _sign(value):
    return (value > 0).to(tl.float32) - (value < 0).to(tl.float32)
