"""*core gradient*: what follows from v = dd C, which *gate backward* leaves in parts.

d_core = alpha v^T t (r, r) in float32, split over M and added in a fixed order
dT = alpha v core    added to columns I of G' (identity 3), or stored where R is stored
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...host import cdiv, padded_rank
from ...operands import CurOperands
from ..chips import rank_block
from ..launch import Launch, launched, strides, wide_precision
from ..tiles import tile_for
from .tile_ops import _at_row

FEWEST_ROWS = 64  # of a program
MOST_PARTS = 256  # each is (r, r) in memory


@triton.jit
def _whole(v_ptr, stride_vp, parts, offsets, mask):
    """Elements of v, the sum of its parts, in float32."""
    v = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    for part in tl.range(1, parts, loop_unroll_factor=4):  # several loads wait at a time
        v += tl.load(_at_row(v_ptr, part, stride_vp) + offsets, mask=mask, other=0.0).to(tl.float32)
    return v


@triton.jit
def _turns(rows_ptr, j, R):
    """rows[j], the turn of each, and how many turns there are: duplicates take turns, the first
    occurrences, then the second ones, and so on."""
    at = tl.load(rows_ptr + j, mask=j < R, other=-1)
    earlier = (at[:, None] == at[None, :]) & (j[None, :] < j[:, None])
    turn = tl.sum(earlier.to(tl.int32), 1)
    return at, turn, tl.max(tl.where(j < R, turn, 0), 0) + 1


@triton.jit
def _add_to_columns(dt, j, at, turn, turns, m, M, N, R, g_ptr):
    """g[:, at] += dt, for rows of g that no other program reads or writes."""
    pointers = g_ptr + m[:, None] * N + at[None, :]
    for i in range(0, turns):
        mask = (m < M)[:, None] & ((j < R) & (turn == i))[None, :]
        old = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        tl.store(pointers, (old + dt).to(g_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # the next turn, or block of ranks, may add to the same element


@triton.jit
def _core_tile(core_ptr, stride_cj, stride_ck, j, k, R):
    return tl.load(
        core_ptr + j[None, :] * stride_cj + k[:, None] * stride_ck,
        mask=(j < R)[None, :] & (k < R)[:, None],
        other=0.0,
    ).to(tl.float32)


@triton.jit(do_not_specialize=["M", "parts"])
def _core_gradient_kernel(
    v_ptr,
    t_ptr,
    out_ptr,
    core_ptr,
    rows_ptr,
    g_ptr,
    q_ptr,
    M,
    N,
    R,
    parts,
    rows_per_program,
    stride_vp,
    stride_vm,
    stride_tm,
    stride_cj,
    stride_ck,
    stride_qm,
    alpha,
    CORE: tl.constexpr,
    SPREAD: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
):
    # A block of rows has a program for each block of d_core, and for dT one for each BLOCK_M rows.
    # Where d_core is a single block, one program makes both of v as it is read once.
    blocks = tl.cdiv(R, BLOCK_R)
    chunks = tl.cdiv(rows_per_program, BLOCK_M) * SPREAD
    tasks = 1 if ONE_BLOCK else blocks * blocks * CORE + chunks
    # The last rows first: *gate backward* has left their G' in the L2.
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    program, task = place // tasks, place % tasks
    m0 = program * rows_per_program
    M -= m0
    v_ptr = _at_row(v_ptr, m0, stride_vm)
    if CORE:
        t_ptr = _at_row(t_ptr, m0, stride_tm)
        out_ptr = _at_row(out_ptr, program, R * R)
    if SPREAD:
        if g_ptr is not None:
            g_ptr = _at_row(g_ptr, m0, N)
        else:
            q_ptr = _at_row(q_ptr, m0, stride_qm)
    k = tl.arange(0, BLOCK_R)
    if ONE_BLOCK:
        acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
        if SPREAD:
            core = _core_tile(core_ptr, stride_cj, stride_ck, k, k, R)
            if g_ptr is not None:
                at, turn, turns = _turns(rows_ptr, k, R)
        for first in tl.range(0, rows_per_program, BLOCK_M, num_stages=1):
            m = first + tl.arange(0, BLOCK_M)
            inside = (m < M)[:, None] & (k < R)[None, :]
            v = _whole(v_ptr, stride_vp, parts, m[:, None] * stride_vm + k[None, :], inside)
            if CORE:
                t = tl.load(t_ptr + m[:, None] * stride_tm + k[None, :], mask=inside, other=0.0)
                acc = tl.dot(tl.trans(v), t.to(tl.float32), acc, input_precision=WIDE)
            if SPREAD:
                dt = alpha * tl.dot(v, core, input_precision=WIDE)
                if g_ptr is not None:
                    _add_to_columns(dt, k, at, turn, turns, m, M, N, R, g_ptr)
                else:
                    tl.store(
                        q_ptr + m[:, None] * stride_qm + k[None, :],
                        dt.to(q_ptr.dtype.element_ty),
                        mask=(m < M)[:, None] & (k < stride_qm)[None, :],
                    )
        if CORE:
            tl.store(
                out_ptr + k[:, None] * R + k[None, :],
                alpha * acc,
                mask=(k < R)[:, None] & (k < R)[None, :],
            )
    elif CORE and task < blocks * blocks:
        i = (task // blocks) * BLOCK_R + k
        j = (task % blocks) * BLOCK_R + k
        acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
        for first in tl.range(0, rows_per_program, BLOCK_M, num_stages=1):
            m = first + tl.arange(0, BLOCK_M)
            v = _whole(
                v_ptr,
                stride_vp,
                parts,
                m[:, None] * stride_vm + i[None, :],
                (m < M)[:, None] & (i < R)[None, :],
            )
            t = tl.load(
                t_ptr + m[:, None] * stride_tm + j[None, :],
                mask=(m < M)[:, None] & (j < R)[None, :],
                other=0.0,
            )
            acc = tl.dot(tl.trans(v), t.to(tl.float32), acc, input_precision=WIDE)
        tl.store(
            out_ptr + i[:, None] * R + j[None, :],
            alpha * acc,
            mask=(i < R)[:, None] & (j < R)[None, :],
        )
    elif SPREAD:
        m = (task - blocks * blocks * CORE) * BLOCK_M + tl.arange(0, BLOCK_M)
        for j0 in tl.range(0, R, BLOCK_R, num_stages=1):
            j = j0 + k
            dt = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for k0 in tl.range(0, R, BLOCK_R, num_stages=1):
                v = _whole(
                    v_ptr,
                    stride_vp,
                    parts,
                    m[:, None] * stride_vm + (k0 + k)[None, :],
                    (m < M)[:, None] & (k0 + k < R)[None, :],
                )
                core = _core_tile(core_ptr, stride_cj, stride_ck, j, k0 + k, R)
                dt = tl.dot(v, core, dt, input_precision=WIDE)
            if g_ptr is not None:
                at, turn, turns = _turns(rows_ptr, j, R)
                _add_to_columns(alpha * dt, j, at, turn, turns, m, M, N, R, g_ptr)
            else:
                tl.store(
                    q_ptr + m[:, None] * stride_qm + j[None, :],
                    (alpha * dt).to(q_ptr.dtype.element_ty),
                    mask=(m < M)[:, None] & (j < stride_qm)[None, :],
                )


def programs_over_rows(M: int) -> int:
    return cdiv(M, rows_per_program(M))


def rows_per_program(M: int) -> int:
    return max(FEWEST_ROWS, cdiv(cdiv(M, MOST_PARTS), FEWEST_ROWS) * FEWEST_ROWS)


def core_gradient(
    v: Tensor,
    t: Tensor,
    layer: CurOperands,
    *,
    g: Tensor | None = None,
    q: Tensor | None = None,
) -> Tensor:
    """alpha v^T t (r, r) in core's dtype.

    Args:
        v: (parts, M, r), whose sum counts, or (M, r). t: (M, r). Rows of both are contiguous.
        g, q: as in ``t_gradient``, or neither.
    """
    v, core = v if v.dim() == 3 else v[None], layer.core
    out = core.new_empty(programs_over_rows(v.shape[1]), *core.shape, dtype=torch.float32)
    _launch(v, t, out, layer, g, q)
    return out.sum(0).to(core.dtype)


def t_gradient(v: Tensor, layer: CurOperands, *, g: Tensor | None, q: Tensor | None) -> None:
    """dT alone: added to columns ``layer.rows`` of g (M, N), contiguous, or written to q (M, padded
    r). v: (parts, M, r)."""
    _launch(v, None, None, layer, g, q)


def _launch(
    v: Tensor,
    t: Tensor | None,
    out: Tensor | None,
    layer: CurOperands,
    g: Tensor | None,
    q: Tensor | None,
) -> None:
    rows = None if g is None else layer.rows
    _launch_core_gradient(v, t, layer.core, out, g, rows, q, layer.alpha, layer.dtype)


@launched(_core_gradient_kernel)
def _launch_core_gradient(
    v: Tensor,
    t: Tensor | None,
    core: Tensor,
    out: Tensor | None,
    g: Tensor | None,
    rows: Tensor | None,
    q: Tensor | None,
    alpha: float,
    dtype: torch.dtype,
) -> Launch:
    (parts, M, r), block = v.shape, min(rank_block(v.shape[2]), 64)
    tile = tile_for("core_gradient", v, M, r, r, dtype=dtype)
    programs, spread, one_block = programs_over_rows(M), g is not None or q is not None, r <= block
    chunks = cdiv(rows_per_program(M), tile.m) * spread
    tasks = 1 if one_block else cdiv(r, block) ** 2 * (t is not None) + chunks
    stride_cj, stride_ck = strides(core.T)
    return Launch(
        programs * tasks,
        tile,
        dict(
            v_ptr=v,
            t_ptr=t,
            out_ptr=out,
            core_ptr=core,
            rows_ptr=rows,
            g_ptr=g,
            q_ptr=q,
            M=M,
            N=0 if g is None else g.shape[1],
            R=r,
            parts=parts,
            rows_per_program=rows_per_program(M),
            stride_vp=v.stride(0),
            stride_vm=v.stride(1),
            stride_tm=0 if t is None else t.stride(0),
            stride_cj=stride_cj,
            stride_ck=stride_ck,
            stride_qm=padded_rank(r),
            alpha=alpha,
            CORE=t is not None,
            SPREAD=spread,
            ONE_BLOCK=one_block,
            BLOCK_M=tile.m,
            BLOCK_R=block,
            WIDE=wide_precision(dtype),
        ),
    )
