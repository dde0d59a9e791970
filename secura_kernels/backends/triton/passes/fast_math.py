"""One-instruction forms of what the gate computes for every element.

Triton's own ``/`` and ``exp2`` serve all of float32: they scale operands that are subnormal or
huge, several instructions for each. The gate's operands never are (``gate.py`` says why), so the
hardware's approximations serve, both within 2 units in the last place [PTX ISA, ``rcp.approx`` and
``ex2.approx``].
"""

import triton
import triton.language as tl

from ..launch import INTERPRETED

INTERPRETED = tl.constexpr(INTERPRETED)
# 2^23: from here to 2^24 the float32 numbers are the integers, and the low bits count.
_INTEGERS = tl.constexpr(8388608.0)
_INTEGER_BITS = tl.constexpr(0x4B000000)


@triton.jit
def _reciprocal(x):
    """1 / x for x >= 2^-126; 0 where that is subnormal."""
    if INTERPRETED:
        return 1 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _exp2(x):
    """2^x; 0 where that is subnormal."""
    if INTERPRETED:  # numpy warns where the result is infinite; 2^127 serves as well
        return tl.exp2(tl.minimum(x, 127.0, propagate_nan=tl.PropagateNan.ALL))
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _nearest_integer(x):
    """The integer nearest to x, ties to even, for 0 <= x < 2^22, as the low bits of an int32; the
    bits above are others' (a conversion costs four of these additions)."""
    return (x + _INTEGERS).to(tl.int32, bitcast=True)


@triton.jit
def _from_unsigned(x):
    """A float32 of an int32 in [0, 2^23)."""
    return (x | _INTEGER_BITS).to(tl.float32, bitcast=True) - _INTEGERS
