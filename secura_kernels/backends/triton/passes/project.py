"""*project*: p = a[:, index] and q = alpha p core^T.

Forward over a library product y0: p = t, by identity 1. In the weight domain: a = W, index = cols,
so p = C and q = P = alpha C core.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...host import cdiv
from ..launch import Launch, launched
from ..tiles import tile_for
from .low_rank import _store_and_project, arguments, outputs
from .tile_ops import _at_row


@triton.jit(do_not_specialize=["M"])
def _project_kernel(
    a_ptr,
    index_ptr,
    core_ptr,
    gate_ptr,
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
        gate_ptr,
        None,
        stride_cj,
        stride_ck,
        stride_qm,
        alpha,
        RANK,
        BLOCK_J,
        STEP,
        WIDE,
    )


def project(
    a: Tensor,
    index: Tensor | None,
    core: Tensor,
    alpha: float,
    *,
    q_dtype: torch.dtype,
    transpose_core: bool = False,
    task_gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """p = a[:, index] (M, r), and q = alpha p core^T (M, padded r) in ``q_dtype``."""
    p, q = outputs(a, core, a.dtype, q_dtype)
    _launch_project(a, index, core, p, q, alpha, transpose_core, task_gate)
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
    task_gate: Tensor | None,
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
            **arguments(a, core, p, q, alpha, tile, transpose_core, task_gate),
        ),
    )
