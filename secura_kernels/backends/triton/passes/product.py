"""*one pass*: y = a B^T + h C^T, biases and S-MagNorm, in one kernel.

The K loop is an ordinary tiled product; without a gate its accumulator starts as h C^T and there is
no other epilogue than the biases. Forward: a = x, B = W. Input gradient without a gate: a = dY,
B = W^T, h = dT, C = R^T.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...host import NO_GATE, cdiv
from ...passes import SUM, Finish
from ..chips import processors, rank_block
from ..launch import Launch, dot_precision, launched
from ..tiles import Tile
from .bulk_copies import described, has_descriptor
from .bulk_product import launch_bulk_product, reaches
from .factors import Factor
from .tile_ops import _at_row, _change, _gate_and_store, _store, _tile_position, _vector


@triton.jit
def _product_tile(
    a_ptr,
    b_ptr,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    m0,
    M,
    n0,
    N,
    K,
    acc,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    K_MAJOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + a[m0:, :] b[n0:, :]^T, with descriptors (TMA) or pointers for a and b."""
    if TMA:
        for k0 in range(0, K, BLOCK_K):
            a = a_ptr.load([m0, k0])
            b = tl.trans(b_ptr.load([n0, k0])) if K_MAJOR else b_ptr.load([k0, n0])
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        # Rows and columns outside wrap around rather than being masked: they are never stored.
        m = (m0 + tl.arange(0, BLOCK_M)) % M
        n = (n0 + tl.arange(0, BLOCK_N)) % N
        k = tl.arange(0, BLOCK_K)
        a_tile = a_ptr + m.to(tl.int64)[:, None] * stride_am + k.to(tl.int64)[None, :] * stride_ak
        b_tile = b_ptr + n.to(tl.int64)[None, :] * stride_bn + k.to(tl.int64)[:, None] * stride_bk
        for k0 in range(0, K, BLOCK_K):
            inside = k0 + k < K
            a = tl.load(a_tile, mask=inside[None, :], other=0.0)
            b = tl.load(b_tile, mask=inside[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            a_tile += BLOCK_K * stride_ak
            b_tile += BLOCK_K * stride_bk
    return acc


@triton.jit
def _parts(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """acc [BLOCK_M, BLOCK_N] as PARTS (a power of two) matrices, left to right."""
    if PARTS == 1:
        return (acc,)
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        return _parts(left, BLOCK_M, HALF, PARTS // 2) + _parts(right, BLOCK_M, HALF, PARTS // 2)


@triton.jit(do_not_specialize=["M"])
def _product_kernel(
    a_ptr,
    b_ptr,
    h_ptr,
    factor_ptr,
    index_ptr,
    bias_ptr,
    adapter_bias_ptr,
    decay_ptr,
    y_ptr,
    saved_ptr,
    moved_ptr,
    M,
    N,
    K,
    FR,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
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
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    K_MAJOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), rows * columns, tl.num_programs(0)):
        row, column = _tile_position(tile, rows, columns, GROUP)
        m0, n0 = row * BLOCK_M, column * BLOCK_N
        m = tl.arange(0, BLOCK_M)
        n = tl.arange(0, BLOCK_N)
        h_rows = _at_row(h_ptr, m0, stride_hm)
        y_rows = _at_row(y_ptr, m0, N)
        saved_rows = saved_ptr
        if saved_ptr is not None:
            saved_rows = _at_row(saved_ptr, m0, N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if not GATE:
            acc = _change(
                h_rows,
                stride_hm,
                factor_ptr,
                index_ptr,
                stride_fl,
                stride_fr,
                m,
                M - m0,
                n0,
                n,
                N,
                FR,
                acc,
                BLOCK_R,
                RANK,
                PRECISION,
            )
        acc = _product_tile(
            a_ptr,
            b_ptr,
            stride_am,
            stride_ak,
            stride_bn,
            stride_bk,
            m0,
            M,
            n0,
            N,
            K,
            acc,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            TMA,
            K_MAJOR,
            PRECISION,
        )
        if not GATE:
            n += n0
            acc += (_vector(bias_ptr, n, N, 0.0) + _vector(adapter_bias_ptr, n, N, 0.0))[None, :]
            _store(acc, m, M - m0, n, N, y_rows)
        else:
            # In parts: base, change and gate of a whole tile do not fit in the registers.
            WIDTH: tl.constexpr = BLOCK_N // PARTS
            parts = _parts(acc, BLOCK_M, BLOCK_N, PARTS)
            for part in tl.static_range(PARTS):
                n = tl.arange(0, WIDTH)
                d = _change(
                    h_rows,
                    stride_hm,
                    factor_ptr,
                    index_ptr,
                    stride_fl,
                    stride_fr,
                    m,
                    M - m0,
                    n0 + part * WIDTH,
                    n,
                    N,
                    FR,
                    tl.zeros((BLOCK_M, WIDTH), tl.float32),
                    BLOCK_R,
                    RANK,
                    PRECISION,
                )
                n += n0 + part * WIDTH
                d += _vector(adapter_bias_ptr, n, N, 0.0)[None, :]
                b = parts[part] + _vector(bias_ptr, n, N, 0.0)[None, :]
                _gate_and_store(
                    b,
                    d,
                    _vector(decay_ptr, n, N, 1.0)[None, :],
                    m,
                    M - m0,
                    n,
                    N,
                    y_rows,
                    saved_rows,
                    moved_ptr,
                    slope,
                    offset,
                    eps,
                    beta,
                    top,
                    code_steps,
                    edge,
                )


def product(
    a: Tensor,
    b: Tensor,
    h: Tensor,
    factor: Factor,
    plan: Tile,
    bias: Tensor | None = None,
    finish: Finish = SUM,
) -> Tensor:
    """y (M, N) = a b^T + h factor^T + biases, gated where there is a gate.

    Args:
        a: (M, K); b: (N, K); any strides. h: (M, padded r). factor: (N, r).
    """
    M, N = a.shape[0], b.shape[0]
    if factor.scattered:
        factor = factor.copied(N, cdiv(M, plan.m))
    y = a.new_empty(M, N)
    if plan.bulk and finish.gate is None and reaches(a, b):
        launch_bulk_product(a, b, h, factor.aligned(N), y, plan, bias, finish.adapter_bias)
    else:
        _launch_product(a, b, h, factor, y, plan, bias, finish)
    return y


@launched(_product_kernel)
def _launch_product(
    a: Tensor,
    b: Tensor,
    h: Tensor,
    factor: Factor,
    y: Tensor,
    tile: Tile,
    bias: Tensor | None,
    finish: Finish,
) -> Launch:
    M, K = a.shape
    N = b.shape[0]
    tma = tile.tma and has_descriptor(a, b)
    operands = dict(a_ptr=a, b_ptr=b)
    if tma:
        operands = dict(a_ptr=described(a, tile.m, tile.k), b_ptr=described(b, tile.n, tile.k))
    tiles = cdiv(M, tile.m) * cdiv(N, tile.n)
    programs = min(tiles, processors(a.device)) if tile.persistent else tiles
    rank = max(64, rank_block(h.shape[1]))  # with narrower blocks more tiles spill (sm_90, sm_100)
    return Launch(
        programs,
        tile,
        dict(
            **operands,
            h_ptr=h,
            **factor.arguments(),
            bias_ptr=bias,
            adapter_bias_ptr=finish.adapter_bias,
            decay_ptr=finish.decay,
            y_ptr=y,
            saved_ptr=finish.saved,
            moved_ptr=finish.moved,
            M=M,
            N=N,
            K=K,
            stride_am=a.stride(0),
            stride_ak=a.stride(1),
            stride_bn=b.stride(0),
            stride_bk=b.stride(1),
            stride_hm=h.stride(0),
            **(finish.gate or NO_GATE).arguments(),
            edge=finish.edge,
            GATE=finish.gate is not None,
            RANK=rank,
            BLOCK_R=min(rank, 64),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            GROUP=tile.group,
            PARTS=tile.parts,
            TMA=tma,
            K_MAJOR=b.stride(1) == 1,
            PRECISION=dot_precision(a.dtype),
        ),
    )
