"""*gate backward*: from dY and the saved gate, in one pass, everything the backward pass needs.

    db = (beta - 1 + c) s dY       gradient of the base, G' once dT is scattered into it
    dd = c s dY                    gradient of the change; c = 1 without importance decay
    v  = dd C                      (M, r)
    dT = alpha v core              added to columns I of db (identity 3), so that dX = G' W
    dadapter_bias = column sums of dd

A program owns whole rows: no atomics, and two runs are bitwise equal. A full-derivative gate
(``detach_gate=False``) saves the base output b instead of s; the change and the gate's own
derivative are formed again here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernel_host import GateGradients, GateNumbers, cdiv, padded_rank, through_largest
from .chips import rank_block
from .finish import _at_row, _change, _divided_by_largest, _store, _vector
from .gate import _at_largest, _by_relative_magnitude, _decode, _gate, _relative_magnitude, _sign
from .launch import WIDE_STEP, dot_precision, launch, strides, wide_precision
from .low_rank import _times_core
from .sides import Side, _side_tile
from .tiles import tile_for


@triton.jit
def _full_gradients(dy, b, d, c, slope, offset, eps, beta, slope_z, through, largest,
                    MAX: tl.constexpr):
    """db, dd with the gate's own derivative [``reference.gate.gate_gradient``]."""
    s = _gate(b, d, slope, offset, eps, beta)[1]
    rho = _relative_magnitude(b, d, eps)
    by_rho = _by_relative_magnitude(dy, b, d, c, rho, slope_z, offset, beta)
    if MAX:
        by_rho -= through * _at_largest(rho, largest)
    by_d = by_rho / (tl.abs(b) + eps)
    db = (beta - 1 + c) * s * dy - by_d * rho * _sign(b)
    return db, c * s * dy + by_d * _sign(d)


@triton.jit(do_not_specialize=["M"])
def _gate_backward_kernel(
    dy_ptr, saved_ptr, h_ptr, side_ptr, index_ptr, rows_ptr, core_ptr, adapter_bias_ptr, decay_ptr,
    largest_ptr, through_ptr, g_ptr, v_ptr, q_ptr, bias_part_ptr, statistics_ptr, M, N, R, SR,
    stride_dm, stride_dn, stride_hm, stride_sl, stride_sr, stride_cj, stride_ck, stride_qm,
    slope, offset, eps, beta, top, code_steps, code_low, alpha,
    FULL: tl.constexpr, STATISTICS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):
    m0 = tl.program_id(0) * BLOCK_M
    m, M = tl.arange(0, BLOCK_M), M - m0
    k = tl.arange(0, RANK)
    dy_ptr, saved_ptr = _at_row(dy_ptr, m0, stride_dm), _at_row(saved_ptr, m0, N)
    if FULL:
        h_ptr = _at_row(h_ptr, m0, stride_hm)
    if g_ptr is not None:
        g_ptr = _at_row(g_ptr, m0, N)
    if v_ptr is not None:
        v_ptr = _at_row(v_ptr, m0, R)
    if q_ptr is not None:
        q_ptr = _at_row(q_ptr, m0, stride_qm)
    if bias_part_ptr is not None:
        bias_part_ptr = _at_row(bias_part_ptr, tl.program_id(0), N)
    # Without decay and with a constant gate dd is db / beta: one matrix serves for both.
    PROPORTIONAL: tl.constexpr = (decay_ptr is None) and (not FULL)
    dy_tile = dy_ptr + (m * stride_dm)[:, None] + (tl.arange(0, BLOCK_N) * stride_dn)[None, :]
    slope = _divided_by_largest(slope, largest_ptr)
    largest = 0.0
    through = 0.0
    if FULL and largest_ptr is not None:
        largest = tl.load(largest_ptr).to(tl.float32, bitcast=True)
        if not STATISTICS:
            through = tl.load(through_ptr)
    v = tl.zeros((BLOCK_M, RANK), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    maxima = tl.zeros((BLOCK_M,), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = (m < M)[:, None] & (n < N)[None, :]
        dy = tl.load(dy_tile, mask=inside, other=0.0).to(tl.float32)
        dy_tile += BLOCK_N * stride_dn
        # Eight columns a thread, as of dY: else each element is decoded in two layouts.
        saved = tl.load(saved_ptr + tl.max_contiguous(m[:, None] * N + n[None, :], (1, 8)),
                        mask=inside, other=0)
        c = _vector(decay_ptr, n, N, 1.0)[None, :]
        if FULL:
            b = saved.to(tl.float32)
            d = _change(h_ptr, stride_hm, side_ptr, index_ptr, stride_sl, stride_sr, m, M, n0,
                        tl.arange(0, BLOCK_N), N, SR, tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
                        BLOCK_R, RANK, PRECISION)
            # Rows outside must not count as the largest change of a zero base.
            d = tl.where(inside, d + _vector(adapter_bias_ptr, n, N, 0.0)[None, :], 0.0)
            slope_z = slope * 0.6931471805599453
            if STATISTICS:
                rho = _relative_magnitude(b, d, eps)
                by_rho = _by_relative_magnitude(dy, b, d, c, rho, slope_z, offset, beta)
                total += tl.sum(by_rho * rho, 1)
                maxima += tl.sum(tl.where(inside, _at_largest(rho, largest), 0.0), 1)
            else:
                db, dd = _full_gradients(dy, b, d, c, slope, offset, eps, beta, slope_z, through,
                                         largest, largest_ptr is not None)
        else:
            g = _decode(saved, top, code_steps) * dy
            db, dd = (beta - 1 + c) * g, c * g
        if not STATISTICS:
            if g_ptr is not None:
                _store(db, m, M, n, N, g_ptr)
            if bias_part_ptr is not None:
                tl.store(bias_part_ptr + n, tl.sum(dd, 0), mask=n < N)
            if v_ptr is not None:
                side = _side_tile(side_ptr, index_ptr, stride_sl, stride_sr, n0,
                                  tl.arange(0, BLOCK_N), N, k, SR)
                factor = db if PROPORTIONAL else dd  # rounded once, as stored
                v = tl.dot(factor.to(side.dtype), side, v, input_precision=PRECISION)
    if STATISTICS:
        tl.store(statistics_ptr + tl.program_id(0) * 2, tl.sum(total, 0))
        tl.store(statistics_ptr + tl.program_id(0) * 2 + 1, tl.sum(maxima, 0))
    elif v_ptr is not None:
        if PROPORTIONAL:
            v = v / beta
        tl.store(v_ptr + m[:, None] * R + k[None, :], v, mask=(m < M)[:, None] & (k < R)[None, :])
        if g_ptr is not None:
            tl.debug_barrier()  # v and g are read back by other threads of this program
            for j0 in tl.range(0, R, BLOCK_J, num_stages=1):
                j = j0 + tl.arange(0, BLOCK_J)
                dt = _times_core(v_ptr, core_ptr, stride_cj, stride_ck, m, M, j, R, alpha, BLOCK_J,
                                 STEP, WIDE)
                if rows_ptr is None:
                    inside = (m < M)[:, None] & (j < stride_qm)[None, :]
                    tl.store(q_ptr + m[:, None] * stride_qm + j[None, :],
                             dt.to(q_ptr.dtype.element_ty), mask=inside)
                else:
                    _add_to_columns(dt, j, rows_ptr, m, M, N, R, g_ptr, BLOCK_J)


@triton.jit
def _add_to_columns(dt, j, rows_ptr, m, M, N, R, g_ptr, BLOCK_J: tl.constexpr):
    """g[:, rows[j]] += dt, for rows of g that this program owns and has written.

    Duplicates among rows[j] take turns: the first occurrences, then the second ones, and so on.
    """
    at = tl.load(rows_ptr + j, mask=j < R, other=-1)
    earlier = (at[:, None] == at[None, :]) & (j[None, :] < j[:, None])
    turn = tl.sum(earlier.to(tl.int32), 1)
    turns = tl.max(tl.where(j < R, turn, 0), 0) + 1
    pointers = g_ptr + m[:, None] * N + at[None, :]
    for i in range(0, turns):
        mask = (m < M)[:, None] & ((j < R) & (turn == i))[None, :]
        old = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        tl.store(pointers, (old + dt).to(g_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # the next turn may add to the same element


def gate_backward(dy: Tensor, saved: Tensor, side: Side, rows: Tensor | None, core: Tensor,
                  alpha: float, gate: GateNumbers, *, decay: Tensor | None,
                  needs: tuple[bool, bool, bool], h: Tensor | None = None,
                  adapter_bias: Tensor | None = None,
                  largest: Tensor | None = None) -> GateGradients:
    """Args:
        dy: (M, N), any strides. saved: (M, N), what the forward pass saved. side: C.
        rows: (r,) where R is W[rows]; None where it is stored. needs: of x, core, adapter_bias.
        h: given for a full-derivative gate; then adapter_bias and largest count as well.
    """
    M, N = dy.shape
    r = core.shape[0]
    full = h is not None
    tile = tile_for("gate_backward_full" if full else "gate_backward", dy, M, N, r)
    programs = cdiv(M, tile.m)
    rank = rank_block(r)
    stride_cj, stride_ck = strides(core.T)
    fixed = dict(
        dy_ptr=dy, saved_ptr=saved, h_ptr=h, **side.arguments(), rows_ptr=rows, core_ptr=core,
        adapter_bias_ptr=adapter_bias if full else None, decay_ptr=decay, largest_ptr=largest,
        M=M, N=N, R=r, stride_dm=dy.stride(0), stride_dn=dy.stride(1),
        stride_hm=h.stride(0) if full else 0, stride_cj=stride_cj, stride_ck=stride_ck,
        stride_qm=padded_rank(r), **gate.arguments(), alpha=alpha, FULL=full, RANK=rank,
        BLOCK_R=min(rank, 64), BLOCK_J=min(rank, 64), STEP=min(rank, WIDE_STEP), BLOCK_M=tile.m,
        BLOCK_N=tile.n, PRECISION=dot_precision(dy.dtype), WIDE=wide_precision(dy.dtype))
    through = None
    if full and largest is not None:
        statistics = dy.new_empty(programs, 2, dtype=torch.float32)
        launch(_gate_backward_kernel, programs, tile, dy.device, **fixed, through_ptr=None,
               g_ptr=None, v_ptr=None, q_ptr=None, bias_part_ptr=None, statistics_ptr=statistics,
               STATISTICS=True)
        through = through_largest(statistics, largest)
    g = torch.empty_like(saved, dtype=dy.dtype) if needs[0] else None
    v = dy.new_empty(M, r, dtype=torch.float32) if needs[0] or needs[1] else None
    q = dy.new_empty(M, padded_rank(r)) if needs[0] and rows is None else None
    part = dy.new_empty(programs, N, dtype=torch.float32) if needs[2] else None
    launch(_gate_backward_kernel, programs, tile, dy.device, **fixed, through_ptr=through, g_ptr=g,
           v_ptr=v, q_ptr=q, bias_part_ptr=part, statistics_ptr=None, STATISTICS=False)
    return GateGradients(g, q, v, None if part is None else part.sum(0))
