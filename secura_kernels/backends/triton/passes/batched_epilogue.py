"""*batched epilogue*: y of a base output y0 and h, rows by their adapters; y0 is left as it is.

As *epilogue*, with the adapter bias and, for ``ref="max"``, the largest ratio of each row's own
adapter and sample. h is zero in a row without an adapter, which becomes y0.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...host import NO_GATE, GateNumbers, cdiv
from ..chips import rank_block
from ..launch import Launch, dot_precision, launched
from ..tiles import tile_for
from .gate import _relative_magnitude
from .own_core import _adapters
from .tile_ops import _at_row, _change, _divided_by_largest, _gate_and_store, _store


@triton.jit(do_not_specialize=["M", "S", "A"])
def _batched_epilogue_kernel(
    y0_ptr,
    h_ptr,
    adapter_ptr,
    factor_ptr,
    adapter_bias_ptr,
    y_ptr,
    saved_ptr,
    largest_ptr,
    M,
    S,
    N,
    R,
    A,
    stride_ym,
    stride_yn,
    stride_hm,
    stride_fl,
    stride_fr,
    slope,
    offset,
    eps,
    beta,
    top,
    code_steps,
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
    inside = (m < M)[:, None] & (n < N)[None, :]
    y0_ptr = _at_row(_at_row(y0_ptr, m0, stride_ym), n0, stride_yn)
    # Before the change, whose products then hide the wait.
    b = tl.load(
        y0_ptr + (m * stride_ym)[:, None] + (tl.arange(0, BLOCK_N) * stride_yn)[None, :],
        mask=inside,
        other=0.0,
    )
    d = _change(
        _at_row(h_ptr, m0, stride_hm),
        stride_hm,
        factor_ptr,
        None,
        stride_fl,
        stride_fr,
        m,
        M,
        n0,
        tl.arange(0, BLOCK_N),
        N,
        R,
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        BLOCK_R,
        RANK,
        PRECISION,
    )
    b = b.to(tl.float32)
    if adapter_bias_ptr is not None:
        ids = _adapters(adapter_ptr, m0, m, M, S, A)
        d += tl.load(
            adapter_bias_ptr + (ids.to(tl.int64) * N)[:, None] + n[None, :],
            mask=inside & (ids >= 0)[:, None],
            other=0.0,
        ).to(tl.float32)
    if largest_ptr is not None:  # of each row's id; rows outside take the last one's
        largest_ptr += (m0 + tl.minimum(m, M - 1)) // S
    if FIND_LARGEST:
        rho = tl.where(inside, _relative_magnitude(b, d, eps), 0.0)
        bits = rho.to(tl.int32, bitcast=True)  # which order as the values do
        tl.atomic_max(largest_ptr, tl.max(bits, 1), sem="relaxed")
    elif GATE:
        if largest_ptr is not None:
            slope = _divided_by_largest(slope, largest_ptr)[:, None]
        if saved_ptr is not None:
            saved_ptr = _at_row(saved_ptr, m0, N)
        _gate_and_store(
            b,
            d,
            1.0,
            m,
            M,
            n,
            N,
            _at_row(y_ptr, m0, N),
            saved_ptr,
            None,
            slope,
            offset,
            eps,
            beta,
            top,
            code_steps,
            0.0,
        )
    else:
        _store(b + d, m, M, n, N, _at_row(y_ptr, m0, N))


@launched(_batched_epilogue_kernel)
def batched_epilogue(
    y0: Tensor,
    h: Tensor,
    adapter: Tensor,
    C: Tensor,
    adapter_bias: Tensor | None,
    A: int,
    gate: GateNumbers | None,
    *,
    y: Tensor | None = None,
    saved: Tensor | None = None,
    largest: Tensor | None = None,
) -> Launch:
    """Writes y (M, N) and saved (M, N); where ``y`` is None it only raises ``largest``.

    Args:
        y0: (M, N), any strides. h: (M, padded r), of *own core*. adapter: (I,), as there.
        C: (N, r). adapter_bias: (A, N), contiguous.
        saved: takes the gate's code. largest: (I,) int32, the bits of max(rho) of each id's rows;
            None unless ``ref`` is "max".
    """
    (M, N), r = y0.shape, C.shape[1]
    tile, rank = tile_for("batched_epilogue", y0, M, N, r), rank_block(r)
    return Launch(
        cdiv(M, tile.m) * cdiv(N, tile.n),
        tile,
        dict(
            y0_ptr=y0,
            h_ptr=h,
            adapter_ptr=adapter,
            factor_ptr=C,
            adapter_bias_ptr=adapter_bias,
            y_ptr=y,
            saved_ptr=saved,
            largest_ptr=largest,
            M=M,
            S=M // max(1, len(adapter)),
            N=N,
            R=r,
            A=A,
            stride_ym=y0.stride(0),
            stride_yn=y0.stride(1),
            stride_hm=h.stride(0),
            stride_fl=C.stride(0),
            stride_fr=C.stride(1),
            **(gate or NO_GATE).arguments(),
            GATE=gate is not None,
            FIND_LARGEST=y is None,
            RANK=rank,
            BLOCK_R=min(rank, 64),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            PRECISION=dot_precision(y0.dtype),
        ),
    )
