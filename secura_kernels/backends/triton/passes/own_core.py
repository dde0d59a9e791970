"""*own core*: q = alpha p core^T, each row with its adapter's core; zero in rows without one.

Forward: p = t, so q = h. Backward: p = v, so q = dT = alpha v core (``cores`` transposed by their
strides). A program owns some rows and takes the adapters among them in turn: one or two where rows
of one adapter lie together, as samples and packed sequences do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...host import cdiv, padded_rank
from ..chips import rank_block
from ..launch import WIDE_STEP, Launch, launched, wide_precision
from ..tiles import tile_for
from .low_rank import _times_core
from .tile_ops import _at_row


@triton.jit
def _adapters(adapter_ptr, m0, m, M, S, A):
    """The adapter of each row; -1 where there is none. An undefined one must not be read out of
    bounds."""
    ids = tl.load(adapter_ptr + (m0 + m) // S, mask=m < M, other=-1)
    return tl.maximum(tl.minimum(ids, A - 1), -1).to(tl.int32)


@triton.jit(do_not_specialize=["M", "S", "A"])
def _own_core_kernel(
    p_ptr,
    adapter_ptr,
    cores_ptr,
    q_ptr,
    M,
    S,
    R,
    A,
    stride_ca,
    stride_cj,
    stride_ck,
    stride_qm,
    alpha,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    blocks = tl.cdiv(stride_qm, BLOCK_J)
    m0 = (tl.program_id(0) // blocks) * BLOCK_M
    j = (tl.program_id(0) % blocks) * BLOCK_J + tl.arange(0, BLOCK_J)
    m, M = tl.arange(0, BLOCK_M), M - m0
    p_ptr, q_ptr = _at_row(p_ptr, m0, R), _at_row(q_ptr, m0, stride_qm)
    ids = _adapters(adapter_ptr, m0, m, M, S, A)
    q = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    adapter = tl.max(ids, 0)
    while adapter >= 0:
        core_ptr = _at_row(cores_ptr, adapter, stride_ca)
        own = _times_core(
            p_ptr, core_ptr, stride_cj, stride_ck, m, M, j, R, alpha, BLOCK_J, STEP, WIDE
        )
        q = tl.where((ids == adapter)[:, None], own, q)
        adapter = tl.max(tl.where(ids < adapter, ids, -1), 0)
    tl.store(
        q_ptr + m[:, None] * stride_qm + j[None, :],
        q.to(q_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (j < stride_qm)[None, :],
    )


def own_core(p: Tensor, cores: Tensor, adapter: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """q (M, padded r) in ``dtype``, which is the layer's.

    Args:
        p: (M, r), contiguous. cores: (A, r, r), any strides.
        adapter: (I,) int64, contiguous, each for M / I rows in a row; negative: none.
    """
    q = p.new_empty(len(p), padded_rank(p.shape[1]), dtype=dtype)
    _launch_own_core(p, cores, adapter, q, alpha)
    return q


@launched(_own_core_kernel)
def _launch_own_core(p: Tensor, cores: Tensor, adapter: Tensor, q: Tensor, alpha: float) -> Launch:
    (M, r), rank = p.shape, rank_block(p.shape[1])
    tile, block = tile_for("own_core", q, M, r, r), min(rank, 64)
    return Launch(
        cdiv(M, tile.m) * cdiv(q.shape[1], block),
        tile,
        dict(
            p_ptr=p,
            adapter_ptr=adapter,
            cores_ptr=cores,
            q_ptr=q,
            M=M,
            S=M // max(1, len(adapter)),
            R=r,
            A=len(cores),
            stride_ca=cores.stride(0),
            stride_cj=cores.stride(1),
            stride_ck=cores.stride(2),
            stride_qm=q.stride(0),
            alpha=alpha,
            BLOCK_M=tile.m,
            BLOCK_J=block,
            STEP=min(rank, WIDE_STEP),
            WIDE=wide_precision(q.dtype),
        ),
    )
