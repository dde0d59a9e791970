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

from ...host import cdiv
from ..chips import rank_block
from ..launch import Launch, dot_precision, launched
from ..tiles import tile_for
from .bulk_copies import described, has_descriptor
from .factors import Factor, _described_factor_tile, _factor_tile
from .low_rank import _store_and_project, arguments, outputs
from .tile_ops import _at_row


@triton.jit(do_not_specialize=["M"])
def _down_kernel(
    a_ptr,
    factor_ptr,
    index_ptr,
    core_ptr,
    gate_ptr,
    t_ptr,
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
    if t_ptr is not None:
        t_ptr = _at_row(t_ptr, m0, R)
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
        gate_ptr,
        t_ptr,
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
    task_gate: Tensor | None = None,
    t: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """p = a S^T (M, r) in ``p_dtype``, and q = alpha p core^T (M, padded r) in a's dtype.

    Args:
        a: (M, K), any strides. factor: S^T, (K, r). core: (r, r); ``transpose_core``: alpha p core.
        task_gate, t: as ``backends/passes.py`` says, contiguous.
    """
    (M, K), r = a.shape, core.shape[0]
    tile = tile_for("down", a, M, K, r)
    if tile.tma:
        factor = factor.aligned(K)
    elif factor.scattered:
        factor = factor.copied(K, cdiv(M, tile.m))
    p, q = outputs(a, core, p_dtype, a.dtype)
    _launch_down(a, factor, core, p, q, alpha, transpose_core, task_gate, t)
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
    task_gate: Tensor | None,
    t: Tensor | None,
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
            t_ptr=t,
            PRECISION=dot_precision(a.dtype),
            **arguments(a, core, p, q, alpha, tile, transpose_core, task_gate),
        ),
    )
