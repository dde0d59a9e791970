"""*down*: p = a S^T and q = alpha p core^T in one kernel, a read once.

Forward: a = x, S = R, so p = t and q = h. Backward without a gate: a = dY, S = C^T, so p = v and
q = dT = alpha v core (``core`` transposed by its strides). Where p is already there as columns of a
matrix (identity 1: t = y0[:, rows]), *project* gathers them instead.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...host import cdiv, padded_rank
from ..chips import rank_block
from ..launch import WIDE_STEP, Launch, dot_precision, launched, strides, wide_precision
from ..tiles import Tile, tile_for
from .bulk_copies import described, has_descriptor
from .factors import Factor, _described_factor_tile, _factor_tile
from .tile_ops import _at_row


@triton.jit
def _times_core(
    p_ptr,
    core_ptr,
    stride_cj,
    stride_ck,
    m,
    M,
    j,
    R,
    alpha,
    BLOCK_J: tl.constexpr,
    STEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """alpha p core^T at output columns ``j``: [BLOCK_M, BLOCK_J] float32.

    p (M, R) is read back from memory, where this program has just written it: a rank of 256 held in
    registers as an operand spills thousands of bytes.
    """
    q = tl.zeros((m.shape[0], BLOCK_J), tl.float32)
    for k0 in tl.range(0, R, STEP, num_stages=1):
        k = k0 + tl.arange(0, STEP)
        p = tl.load(
            p_ptr + m[:, None] * R + k[None, :], mask=(m < M)[:, None] & (k < R)[None, :], other=0.0
        )
        core = tl.load(
            core_ptr + j[None, :] * stride_cj + k[:, None] * stride_ck,
            mask=(j < R)[None, :] & (k < R)[:, None],
            other=0.0,
        )
        q = tl.dot(p.to(tl.float32), core.to(tl.float32), q, input_precision=WIDE)
    return alpha * q


@triton.jit
def _store_and_project(
    p,
    m,
    M,
    R,
    p_ptr,
    q_ptr,
    core_ptr,
    stride_cj,
    stride_ck,
    stride_qm,
    alpha,
    RANK: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Stores p [BLOCK_M, RANK] rounded to its dtype, and q of the rounded p."""
    k = tl.arange(0, RANK)
    tl.store(
        p_ptr + m[:, None] * R + k[None, :],
        p.to(p_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (k < R)[None, :],
    )
    tl.debug_barrier()  # p is read back by other threads of this program
    for j0 in tl.range(0, stride_qm, BLOCK_J, num_stages=1):
        j = j0 + tl.arange(0, BLOCK_J)
        q = _times_core(
            p_ptr, core_ptr, stride_cj, stride_ck, m, M, j, R, alpha, BLOCK_J, STEP, WIDE
        )
        tl.store(
            q_ptr + m[:, None] * stride_qm + j[None, :],
            q.to(q_ptr.dtype.element_ty),
            mask=(m < M)[:, None] & (j < stride_qm)[None, :],
        )


@triton.jit(do_not_specialize=["M"])
def _down_kernel(
    a_ptr,
    factor_ptr,
    index_ptr,
    core_ptr,
    p_ptr,
    q_ptr,
    M,
    K,
    R,
    FR,
    stride_am,
    stride_ak,
    stride_fl,
    stride_fr,
    stride_cj,
    stride_ck,
    stride_qm,
    alpha,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STEP: tl.constexpr,
    TMA: tl.constexpr,
    FACTOR_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    m0 = tl.program_id(0) * BLOCK_M
    m, rows_left = tl.arange(0, BLOCK_M), M - m0
    p_ptr, q_ptr = _at_row(p_ptr, m0, R), _at_row(q_ptr, m0, stride_qm)
    p = tl.zeros((BLOCK_M, RANK), tl.float32)
    if TMA:
        for k0 in range(0, K, BLOCK_K):
            a = a_ptr.load([m0, k0])
            factor = _described_factor_tile(factor_ptr, k0, 0, FACTOR_ROWS)
            p = tl.dot(a, factor, p, input_precision=PRECISION)
    else:
        r = tl.arange(0, RANK)
        k = tl.arange(0, BLOCK_K)
        a_tile = _at_row(a_ptr, m0, stride_am) + (
            (m * stride_am)[:, None] + (k * stride_ak)[None, :]
        )
        for k0 in range(0, K, BLOCK_K):
            a = tl.load(a_tile, mask=(m < rows_left)[:, None] & (k0 + k < K)[None, :], other=0.0)
            factor = _factor_tile(factor_ptr, index_ptr, stride_fl, stride_fr, k0, k, K, r, FR)
            p = tl.dot(a, factor, p, input_precision=PRECISION)  # [BLOCK_M, RANK]
            a_tile += BLOCK_K * stride_ak
    _store_and_project(
        p,
        m,
        rows_left,
        R,
        p_ptr,
        q_ptr,
        core_ptr,
        stride_cj,
        stride_ck,
        stride_qm,
        alpha,
        RANK,
        BLOCK_J,
        STEP,
        WIDE,
    )


@triton.jit(do_not_specialize=["M"])
def _project_kernel(
    a_ptr,
    index_ptr,
    core_ptr,
    p_ptr,
    q_ptr,
    M,
    R,
    stride_am,
    stride_ak,
    stride_cj,
    stride_ck,
    stride_qm,
    alpha,
    BLOCK_M: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    # The last rows first: the product that wrote a has left them in the L2.
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    m, M = tl.arange(0, BLOCK_M), M - m0
    a_ptr, p_ptr = _at_row(a_ptr, m0, stride_am), _at_row(p_ptr, m0, R)
    q_ptr = _at_row(q_ptr, m0, stride_qm)
    r = tl.arange(0, RANK)
    where = r
    if index_ptr is not None:
        where = tl.load(index_ptr + r, mask=r < R, other=0)
    p = tl.load(
        (a_ptr + where.to(tl.int64) * stride_ak)[None, :] + (m * stride_am)[:, None],
        mask=(m < M)[:, None] & (r < R)[None, :],
        other=0.0,
    )
    _store_and_project(
        p,
        m,
        M,
        R,
        p_ptr,
        q_ptr,
        core_ptr,
        stride_cj,
        stride_ck,
        stride_qm,
        alpha,
        RANK,
        BLOCK_J,
        STEP,
        WIDE,
    )


def down(
    a: Tensor,
    factor: Factor,
    core: Tensor,
    alpha: float,
    *,
    p_dtype: torch.dtype,
    transpose_core: bool = False,
) -> tuple[Tensor, Tensor]:
    """p = a S^T (M, r) in ``p_dtype``, and q = alpha p core^T (M, padded r) in a's dtype.

    Args:
        a: (M, K), any strides. factor: S^T, (K, r). core: (r, r); ``transpose_core``: alpha p core.
    """
    (M, K), r = a.shape, core.shape[0]
    tile = tile_for("down", a, M, K, r)
    if tile.tma:
        factor = factor.aligned(K)
    elif factor.scattered:
        factor = factor.copied(K, cdiv(M, tile.m))
    p, q = _outputs(a, core, p_dtype, a.dtype)
    _launch_down(a, factor, core, p, q, alpha, transpose_core)
    return p, q


@launched(_down_kernel)
def _launch_down(
    a: Tensor,
    factor: Factor,
    core: Tensor,
    p: Tensor,
    q: Tensor,
    alpha: float,
    transpose_core: bool,
) -> Launch:
    M, K = a.shape
    tile = tile_for("down", a, M, K, core.shape[0])
    tma = tile.tma and has_descriptor(a, factor.matrix.T)  # its factor is aligned
    operands = dict(a_ptr=a) | factor.arguments()
    if tile.tma and not tma:  # no copies ahead: see the tile table on fences
        tile = replace(tile, stages=1)
    if tma:
        operands |= dict(
            a_ptr=described(a, tile.m, tile.k),
            factor_ptr=described(factor.matrix, tile.k, rank_block(core.shape[0])),
        )
    return Launch(
        cdiv(M, tile.m),
        tile,
        dict(
            **operands,
            K=K,
            stride_am=a.stride(0),
            stride_ak=a.stride(1),
            BLOCK_K=tile.k,
            TMA=tma,
            FACTOR_ROWS=factor.by_rows,
            PRECISION=dot_precision(a.dtype),
            **_arguments(a, core, p, q, alpha, tile, transpose_core),
        ),
    )


def project(
    a: Tensor,
    index: Tensor | None,
    core: Tensor,
    alpha: float,
    *,
    q_dtype: torch.dtype,
    transpose_core: bool = False,
) -> tuple[Tensor, Tensor]:
    """p = a[:, index] (M, r), and q = alpha p core^T (M, padded r) in ``q_dtype``."""
    p, q = _outputs(a, core, a.dtype, q_dtype)
    _launch_project(a, index, core, p, q, alpha, transpose_core)
    return p, q


@launched(_project_kernel)
def _launch_project(
    a: Tensor,
    index: Tensor | None,
    core: Tensor,
    p: Tensor,
    q: Tensor,
    alpha: float,
    transpose_core: bool,
) -> Launch:
    M, r = a.shape[0], core.shape[0]
    tile = tile_for("project", a, M, r, r)
    return Launch(
        cdiv(M, tile.m),
        tile,
        dict(
            a_ptr=a,
            index_ptr=index,
            stride_am=a.stride(0),
            stride_ak=a.stride(1),
            **_arguments(a, core, p, q, alpha, tile, transpose_core),
        ),
    )


def _outputs(
    a: Tensor, core: Tensor, p_dtype: torch.dtype, q_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    M, r = a.shape[0], core.shape[0]
    return a.new_empty(M, r, dtype=p_dtype), a.new_empty(M, padded_rank(r), dtype=q_dtype)


def _arguments(
    a: Tensor, core: Tensor, p: Tensor, q: Tensor, alpha: float, tile: Tile, transpose_core: bool
) -> dict:
    M, r = p.shape
    stride_cj, stride_ck = strides(core.T if transpose_core else core)
    return dict(
        core_ptr=core,
        p_ptr=p,
        q_ptr=q,
        M=M,
        R=r,
        stride_cj=stride_cj,
        stride_ck=stride_ck,
        stride_qm=q.stride(0),
        alpha=alpha,
        BLOCK_M=tile.m,
        RANK=rank_block(r),
        BLOCK_J=min(rank_block(r), 64),
        STEP=min(rank_block(r), WIDE_STEP),
        WIDE=wide_precision(a.dtype),
    )
