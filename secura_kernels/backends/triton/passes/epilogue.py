"""*epilogue*: the low-rank path and S-MagNorm in one pass over a library product y0, in place.

Also the pass that finds max(rho) for ``ref="max"``, which must come before any output.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...host import NO_GATE, cdiv
from ...passes import SUM, Finish
from ..chips import rank_block
from ..launch import Launch, dot_precision, launched
from ..tiles import tile_for
from .factors import Factor
from .gate import _relative_magnitude
from .tile_ops import (
    _at_row,
    _change,
    _divided_by_largest,
    _gate_and_store,
    _raise_largest,
    _store,
    _vector,
)


@triton.jit(do_not_specialize=["M"])
def _epilogue_kernel(
    y_ptr,
    h_ptr,
    factor_ptr,
    index_ptr,
    adapter_bias_ptr,
    decay_ptr,
    saved_ptr,
    moved_ptr,
    largest_ptr,
    M,
    N,
    FR,
    stride_hm,
    stride_fl,
    stride_fr,
    slope,
    offset,
    eps,
    beta,
    top,
    code_steps,
    edge,
    GATE: tl.constexpr,
    FIND_LARGEST: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    columns = tl.cdiv(N, BLOCK_N)
    # The last rows first: the product before this pass has left them in the L2.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    m0, n0 = (tile // columns) * BLOCK_M, (tile % columns) * BLOCK_N
    m, M = tl.arange(0, BLOCK_M), M - m0
    n = n0 + tl.arange(0, BLOCK_N)
    y_ptr = _at_row(y_ptr, m0, N)
    # Before the change, whose products then hide the wait.
    b = tl.load(
        y_ptr + m[:, None] * N + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0.0
    )
    if saved_ptr is not None:
        saved_ptr = _at_row(saved_ptr, m0, N)
    d = _change(
        _at_row(h_ptr, m0, stride_hm),
        stride_hm,
        factor_ptr,
        index_ptr,
        stride_fl,
        stride_fr,
        m,
        M,
        n0,
        tl.arange(0, BLOCK_N),
        N,
        FR,
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        BLOCK_R,
        RANK,
        PRECISION,
    )
    b = b.to(tl.float32)
    d += _vector(adapter_bias_ptr, n, N, 0.0)[None, :]
    if FIND_LARGEST:
        _raise_largest(_relative_magnitude(b, d, eps), m, M, n, N, largest_ptr)
    elif GATE:
        slope = _divided_by_largest(slope, largest_ptr)
        _gate_and_store(
            b,
            d,
            _vector(decay_ptr, n, N, 1.0)[None, :],
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
            edge,
        )
    else:
        _store(b + d, m, M, n, N, y_ptr)


def epilogue(y: Tensor, h: Tensor, factor: Factor, finish: Finish = SUM) -> None:
    """Turns y (M, N), contiguous, the base output, into the layer's; with ``ref="max"`` another
    pass finds max(rho) before."""
    if factor.scattered:
        M, N = y.shape
        factor = factor.copied(N, cdiv(M, tile_for("epilogue", y, M, N, h.shape[1]).m))
    if finish.largest is not None:
        find_largest(y, h, factor, finish)
    _launch_epilogue(y, h, factor, finish, False)


def find_largest(y: Tensor, h: Tensor, factor: Factor, finish: Finish) -> None:
    """Raises ``finish.largest`` to the bits of max(rho)."""
    finish = Finish(finish.adapter_bias, gate=finish.gate, largest=finish.largest)
    _launch_epilogue(y, h, factor, finish, True)


@launched(_epilogue_kernel)
def _launch_epilogue(
    y: Tensor, h: Tensor, factor: Factor, finish: Finish, find_largest: bool
) -> Launch:
    (M, N), ranks = y.shape, h.shape[1]
    tile = tile_for("epilogue", y, M, N, ranks)
    rank = rank_block(ranks)
    return Launch(
        cdiv(M, tile.m) * cdiv(N, tile.n),
        tile,
        dict(
            y_ptr=y,
            h_ptr=h,
            **factor.arguments(),
            adapter_bias_ptr=finish.adapter_bias,
            decay_ptr=finish.decay,
            saved_ptr=finish.saved,
            moved_ptr=finish.moved,
            largest_ptr=finish.largest,
            M=M,
            N=N,
            stride_hm=h.stride(0),
            **(finish.gate or NO_GATE).arguments(),
            edge=finish.edge,
            GATE=finish.gate is not None,
            FIND_LARGEST=find_largest,
            RANK=rank,
            BLOCK_R=min(rank, 64),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            PRECISION=dot_precision(y.dtype),
        ),
    )
