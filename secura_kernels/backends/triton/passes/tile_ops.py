"""What a tile of base values and a tile of changes become: the last step of four kernels.

Rows are counted from the tile's own first row (``m``, and ``M`` rows are left), with pointers moved
there once in 64 bits: offsets inside a tile then fit in 32, which halves the registers they take.
"""

import triton
import triton.language as tl

from .factors import _factor_tile
from .gate import _apply_gate, _encode, _gate


@triton.jit
def _at_row(ptr, row, stride):
    """``ptr`` at a row, in 64 bits."""
    return ptr + tl.cast(row, tl.int64) * stride


@triton.jit
def _tile_position(tile, rows, columns, GROUP: tl.constexpr):
    """(row, column) of a tile: GROUP rows of tiles at a time, so that both operands stay in L2."""
    group = tile // (GROUP * columns)
    first = group * GROUP
    height = min(rows - first, GROUP)
    inside = tile % (GROUP * columns)
    return first + inside % height, inside // height


@triton.jit
def _change(
    h_ptr,
    stride_hm,
    factor_ptr,
    index_ptr,
    stride_fl,
    stride_fr,
    m,
    M,
    n0,
    n,
    N,
    FR,
    change,
    BLOCK_R: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``change`` + h C^T at rows ``m`` and columns ``n0 + n``: [BLOCK_M, BLOCK_N] float32.

    h is (M, stride_hm) with zeros beyond its R columns.
    """
    for r0 in tl.range(0, RANK, BLOCK_R, num_stages=1):
        r = r0 + tl.arange(0, BLOCK_R)
        h = tl.load(
            h_ptr + m[:, None] * stride_hm + r[None, :],
            mask=(m < M)[:, None] & (r < stride_hm)[None, :],
            other=0.0,
        )
        factor = _factor_tile(factor_ptr, index_ptr, stride_fl, stride_fr, n0, n, N, r, FR)
        change = tl.dot(h, tl.trans(factor.to(h.dtype)), change, input_precision=PRECISION)
    return change


@triton.jit
def _vector(ptr, n, N, missing):
    """A (N,) vector in float32; ``missing`` everywhere where there is none."""
    if ptr is None:
        return tl.full(n.shape, missing, tl.float32)
    else:
        return tl.load(ptr + n, mask=n < N, other=missing).to(tl.float32)


@triton.jit
def _store(out, m, M, n, N, y_ptr):
    tl.store(
        y_ptr + m[:, None] * N + n[None, :],
        out.to(y_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (n < N)[None, :],
    )


@triton.jit
def _gate_and_store(
    b,
    d,
    decay,
    m,
    M,
    n,
    N,
    y_ptr,
    saved_ptr,
    moved_ptr,
    slope,
    offset,
    eps,
    beta,
    top,
    code_steps,
    largest_gate_moved,
):
    """S-MagNorm of base ``b`` and change ``d``; stores the value, the gate's code, the count.

    All are (M, N) matrices at rows ``m``, columns ``n``; ``decay`` broadcasts against b. saved_ptr
    and moved_ptr may be None.
    """
    g, s = _gate(b, d, slope, offset, eps, beta)
    if saved_ptr is not None:
        tl.store(
            saved_ptr + m[:, None] * N + n[None, :],
            _encode(g, s, top, code_steps, saved_ptr.dtype.element_ty),
            mask=(m < M)[:, None] & (n < N)[None, :],
        )
    if moved_ptr is not None:  # integers: the order of additions does not matter
        moved = (g <= largest_gate_moved) & (m < M)[:, None] & (n < N)[None, :]
        tl.atomic_add(moved_ptr, tl.sum(moved.to(tl.int32)).to(tl.int64), sem="relaxed")
    _store(_apply_gate(b, d, s, beta, decay), m, M, n, N, y_ptr)


@triton.jit
def _raise_largest(rho, m, M, n, N, largest_ptr):
    """largest = max(largest, rho) over the tile; NaN counts as largest.

    On bit patterns, which order as the values do for rho >= 0, and put NaN above all.
    """
    inside = (m < M)[:, None] & (n < N)[None, :]
    bits = tl.where(inside, rho, 0.0).to(tl.int32, bitcast=True)
    tl.atomic_max(largest_ptr, tl.max(tl.max(bits, 1), 0), sem="relaxed")


@triton.jit
def _divided_by_largest(slope, largest_ptr):
    """slope / max(rho), for ``ref="max"``; slope itself where ``ref`` is a number."""
    if largest_ptr is None:
        return slope
    else:
        largest = tl.load(largest_ptr).to(tl.float32, bitcast=True)
        # Not > 0: nothing moved, or a NaN, which is its own token's affair. And never so small that
        # the quotient overflows.
        return slope / tl.where(largest > 0, tl.maximum(largest, 2.0**-100), 1.0)
