"""Products of a float32 matrix with one in the layer's dtype: columns or rows of W."""

import torch
import triton
import triton.language as tl

from ..launch import WIDE_STEP


@triton.jit
def _rest(wide, term):
    """What ``term``, wide rounded, leaves of it; nothing where either is infinite or NaN, which the
    term says already."""
    rest = wide - term
    return tl.where(rest == rest, rest, 0.0)


@triton.jit
def _dot_exact(wide, exact, acc, PRECISION: tl.constexpr):
    """acc + wide exact, as if in float32.

    A float32 number is the sum of three in bfloat16, to its last bit. So where ``exact`` is
    bfloat16 three products in bfloat16 do, at twice the rate of TF32 and with half the bytes. TF32
    holds every number in float16, so beside one ``wide`` has two terms (to 2^-21), where two
    float32 operands take three products. In float32 layers: ``PRECISION``.
    """
    if exact.dtype == tl.bfloat16:
        high = wide.to(tl.bfloat16)
        rest = _rest(wide, high.to(tl.float32))
        middle = rest.to(tl.bfloat16)
        low = _rest(rest, middle.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(low, exact, acc)
        acc = tl.dot(middle, exact, acc)
        return tl.dot(high, exact, acc)
    elif exact.dtype == tl.float16:
        exact = exact.to(tl.float32)
        high = (wide.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        acc = tl.dot(_rest(wide, high), exact, acc, input_precision="tf32")
        return tl.dot(high, exact, acc, input_precision="tf32")
    else:
        return tl.dot(wide, exact, acc, input_precision=PRECISION)


def exact_step(dtype: torch.dtype, rank: int) -> int:
    """Ranks that ``_dot_exact`` takes at a time in the loop of *weight core gradient*: as many as
    spill no registers."""
    if dtype == torch.bfloat16 and rank <= 64:
        return rank
    return min(rank, 16 if dtype == torch.float16 and rank > 64 else WIDE_STEP)
