"""What ends *down* and *project*: p (M, r) is stored, and q = alpha p core^T made of it.

With a task gate, whose formulas are in ``reference/task_gate.py``, q is multiplied by the openness
of p; or in a backward pass, where t is given, p by that of t, and q is the gradient of t. A program
has whole rows, so that their sums over r cost no pass of their own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...host import padded_rank
from ..chips import rank_block
from ..launch import WIDE_STEP, strides, wide_precision
from ..tiles import Tile


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
        p = _columns(p_ptr, m, M, k, R)
        core = tl.load(
            core_ptr + j[None, :] * stride_cj + k[:, None] * stride_ck,
            mask=(j < R)[None, :] & (k < R)[:, None],
            other=0.0,
        )
        q = tl.dot(p, core.to(tl.float32), q, input_precision=WIDE)
    return alpha * q


@triton.jit
def _columns(ptr, m, M, k, R):
    """A matrix (M, R) at columns ``k``, float32."""
    inside = (m < M)[:, None] & (k < R)[None, :]
    return tl.load(ptr + m[:, None] * R + k[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _openness(t_ptr, gate_ptr, m, M, R, STEP: tl.constexpr):
    """sigmoid(w . t + c) of rows of t (M, R): [BLOCK_M]. gate_ptr: (R, 2), w and shares of c."""
    logit = tl.zeros((m.shape[0],), tl.float32)
    for k0 in tl.range(0, R, STEP, num_stages=1):
        k = k0 + tl.arange(0, STEP)
        w = tl.load(gate_ptr + 2 * k, mask=k < R, other=0.0).to(tl.float32)
        c = tl.load(gate_ptr + 2 * k + 1, mask=k < R, other=0.0).to(tl.float32)
        logit += tl.sum(_columns(t_ptr, m, M, k, R) * w[None, :] + c[None, :], 1)
    return tl.sigmoid(logit)


@triton.jit
def _multiply_rows(p_ptr, s, m, M, R, STEP: tl.constexpr):
    """p (M, R) *= s [BLOCK_M], in memory: in registers, as a whole, it spills."""
    for k0 in tl.range(0, R, STEP, num_stages=1):
        k = k0 + tl.arange(0, STEP)
        p = s[:, None] * _columns(p_ptr, m, M, k, R)
        tl.debug_barrier()  # several threads may hold one element
        inside = (m < M)[:, None] & (k < R)[None, :]
        tl.store(p_ptr + m[:, None] * R + k[None, :], p.to(p_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_and_project(
    p,
    m,
    M,
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
    RANK: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Stores p [BLOCK_M, RANK] rounded to its dtype, and q of the rounded p; through a task gate,
    or (``t_ptr``) through the derivative of one."""
    k = tl.arange(0, RANK)
    tl.store(
        p_ptr + m[:, None] * R + k[None, :],
        p.to(p_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (k < R)[None, :],
    )
    tl.debug_barrier()  # p is read back by other threads of this program
    if t_ptr is not None:
        s = _openness(t_ptr, gate_ptr, m, M, R, 16)  # more at a time spill at r = 150
        _multiply_rows(p_ptr, s, m, M, R, STEP)
        tl.debug_barrier()
        along = tl.zeros((m.shape[0],), tl.float32)  # q . t, the gradient of s times s
        for j0 in tl.range(0, R, BLOCK_J, num_stages=1):
            j = j0 + tl.arange(0, BLOCK_J)
            q = _times_core(
                p_ptr, core_ptr, stride_cj, stride_ck, m, M, j, R, alpha, BLOCK_J, STEP, WIDE
            )
            along += tl.sum(q * _columns(t_ptr, m, M, j, R), 1)
        along *= 1 - s
    elif gate_ptr is not None:
        s = _openness(p_ptr, gate_ptr, m, M, R, STEP)
    for j0 in tl.range(0, stride_qm, BLOCK_J, num_stages=1):
        j = j0 + tl.arange(0, BLOCK_J)
        q = _times_core(
            p_ptr, core_ptr, stride_cj, stride_ck, m, M, j, R, alpha, BLOCK_J, STEP, WIDE
        )
        if t_ptr is not None:
            w = tl.load(gate_ptr + 2 * j, mask=j < R, other=0.0).to(tl.float32)
            q += along[:, None] * w[None, :]
        elif gate_ptr is not None:
            q *= s[:, None]
        tl.store(
            q_ptr + m[:, None] * stride_qm + j[None, :],
            q.to(q_ptr.dtype.element_ty),
            mask=(m < M)[:, None] & (j < stride_qm)[None, :],
        )


def outputs(
    a: Tensor, core: Tensor, p_dtype: torch.dtype, q_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    M, r = a.shape[0], core.shape[0]
    return a.new_empty(M, r, dtype=p_dtype), a.new_empty(M, padded_rank(r), dtype=q_dtype)


def arguments(
    a: Tensor,
    core: Tensor,
    p: Tensor,
    q: Tensor,
    alpha: float,
    tile: Tile,
    transpose_core: bool,
    task_gate: Tensor | None,
) -> dict:
    M, r = p.shape
    stride_cj, stride_ck = strides(core.T if transpose_core else core)
    # Else a word of a gated rank 64 in 16 rows spills on some chips.
    few = task_gate is not None and (tile.m, rank_block(r)) == (16, 64)
    return dict(
        core_ptr=core,
        gate_ptr=task_gate,
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
        BLOCK_J=min(rank_block(r), 32 if few else 64),
        STEP=min(rank_block(r), WIDE_STEP),
        WIDE=wide_precision(a.dtype),
    )
