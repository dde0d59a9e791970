"""*gate backward*: from dY and the saved gate, in one pass, everything the backward pass needs.

    db = (beta - 1 + c) s dY       gradient of the base, which becomes G'
    dd = c s dY                    gradient of the change; c = 1 without importance decay
    v  = dd C                      (M, r), in parts
    dadapter_bias = column sums of dd

A program owns some rows and, where rows alone are too few programs, one of ``column_parts`` parts
of the columns, with a v of its own; *core gradient* adds the parts in order. No atomics: two runs
are bitwise equal. A full-derivative gate (``detach_gate=False``) saves the base output b instead of
s; the change and the gate's own derivative are formed again here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...host import GateNumbers, cdiv, through_largest
from ..chips import rank_block
from ..launch import Launch, dot_precision, launched
from ..tiles import Tile, column_parts, tile_for
from .factors import Factor, _factor_tile
from .gate import _at_largest, _by_relative_magnitude, _decode, _gate, _relative_magnitude, _sign
from .tile_ops import _at_row, _change, _divided_by_largest, _store, _vector


@triton.jit
def _full_gradients(
    dy, b, d, c, slope, offset, eps, beta, slope_z, through, largest, MAX: tl.constexpr
):
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
    dy_ptr,
    saved_ptr,
    h_ptr,
    factor_ptr,
    index_ptr,
    adapter_bias_ptr,
    decay_ptr,
    largest_ptr,
    through_ptr,
    g_ptr,
    v_ptr,
    bias_part_ptr,
    statistics_ptr,
    M,
    N,
    R,
    FR,
    columns,
    stride_dm,
    stride_dn,
    stride_vp,
    stride_hm,
    stride_fl,
    stride_fr,
    slope,
    offset,
    eps,
    beta,
    top,
    code_steps,
    FULL: tl.constexpr,
    STATISTICS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    parts = tl.cdiv(N, columns)
    block, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    m0 = block * BLOCK_M
    first, last = part * columns, min(N, part * columns + columns)
    m, M = tl.arange(0, BLOCK_M), M - m0
    k = tl.arange(0, RANK)
    dy_ptr, saved_ptr = _at_row(dy_ptr, m0, stride_dm), _at_row(saved_ptr, m0, N)
    if FULL:
        h_ptr = _at_row(h_ptr, m0, stride_hm)
    if g_ptr is not None:
        g_ptr = _at_row(g_ptr, m0, N)
    if v_ptr is not None:
        v_ptr = _at_row(_at_row(v_ptr, part, stride_vp), m0, R)
    if bias_part_ptr is not None:
        bias_part_ptr = _at_row(bias_part_ptr, block, N)
    # Without decay and with a constant gate dd is db / beta: one matrix serves for both.
    PROPORTIONAL: tl.constexpr = (decay_ptr is None) and (not FULL)
    dy_tile = _at_row(dy_ptr, first, stride_dn) + (
        (m * stride_dm)[:, None] + (tl.arange(0, BLOCK_N) * stride_dn)[None, :]
    )
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
    for n0 in range(first, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = (m < M)[:, None] & (n < N)[None, :]
        dy = tl.load(dy_tile, mask=inside, other=0.0).to(tl.float32)
        dy_tile += BLOCK_N * stride_dn
        # Eight columns a thread, as of dY: else each element is decoded in two layouts.
        saved = tl.load(
            saved_ptr + tl.max_contiguous(m[:, None] * N + n[None, :], (1, 8)), mask=inside, other=0
        )
        c = _vector(decay_ptr, n, N, 1.0)[None, :]
        if FULL:
            b = saved.to(tl.float32)
            d = _change(
                h_ptr,
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
            # Rows outside must not count as the largest change of a zero base.
            d = tl.where(inside, d + _vector(adapter_bias_ptr, n, N, 0.0)[None, :], 0.0)
            slope_z = slope * 0.6931471805599453
            if STATISTICS:
                rho = _relative_magnitude(b, d, eps)
                by_rho = _by_relative_magnitude(dy, b, d, c, rho, slope_z, offset, beta)
                total += tl.sum(by_rho * rho, 1)
                maxima += tl.sum(tl.where(inside, _at_largest(rho, largest), 0.0), 1)
            else:
                db, dd = _full_gradients(
                    dy,
                    b,
                    d,
                    c,
                    slope,
                    offset,
                    eps,
                    beta,
                    slope_z,
                    through,
                    largest,
                    largest_ptr is not None,
                )
        else:
            g = _decode(saved, top, code_steps) * dy
            db, dd = (beta - 1 + c) * g, c * g
        if not STATISTICS:
            if g_ptr is not None:
                _store(db, m, M, n, N, g_ptr)
            if bias_part_ptr is not None:
                tl.store(bias_part_ptr + n, tl.sum(dd, 0), mask=n < N)
            if v_ptr is not None:
                factor = _factor_tile(
                    factor_ptr, index_ptr, stride_fl, stride_fr, n0, tl.arange(0, BLOCK_N), N, k, FR
                )
                scaled = db if PROPORTIONAL else dd  # rounded once, as stored
                v = tl.dot(scaled.to(factor.dtype), factor, v, input_precision=PRECISION)
    if STATISTICS:
        tl.store(statistics_ptr + tl.program_id(0) * 2, tl.sum(total, 0))
        tl.store(statistics_ptr + tl.program_id(0) * 2 + 1, tl.sum(maxima, 0))
    elif v_ptr is not None:
        if PROPORTIONAL:
            v = v / beta
        tl.store(v_ptr + m[:, None] * R + k[None, :], v, mask=(m < M)[:, None] & (k < R)[None, :])


def gate_backward(
    dy: Tensor,
    saved: Tensor,
    factor: Factor,
    r: int,
    gate: GateNumbers,
    *,
    decay: Tensor | None,
    needs: tuple[bool, bool, bool],
    h: Tensor | None = None,
    adapter_bias: Tensor | None = None,
    largest: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """db (M, N), v (parts, M, r) float32 and dadapter_bias (N,) float32; None for what was not
    asked for.

    Args:
        dy: (M, N), any strides. saved: (M, N), what the forward pass saved. factor: C.
        needs: of x, core, adapter_bias. h: given for a full-derivative gate; then adapter_bias and
        largest count as well.
    """
    (M, N), wide = dy.shape, dict(dtype=torch.float32)
    full = h is not None
    blocks, _, parts = _split(dy, full, r)
    inputs = (dy, saved, h, factor, adapter_bias if full else None, decay, largest, r, gate)
    through = None
    if full and largest is not None:
        statistics = dy.new_empty(blocks * parts, 2, **wide)
        _launch_gate_backward(*inputs, statistics=statistics)
        through = through_largest(statistics, largest)
    g = torch.empty_like(saved, dtype=dy.dtype) if needs[0] else None
    v = dy.new_empty(parts, M, r, **wide) if needs[0] or needs[1] else None
    sums = dy.new_empty(blocks, N, **wide) if needs[2] else None
    _launch_gate_backward(*inputs, through=through, g=g, v=v, sums=sums)
    return g, v, None if sums is None else sums.sum(0)


def _tile(dy: Tensor, full: bool, r: int) -> Tile:
    return tile_for("gate_backward_full" if full else "gate_backward", dy, *dy.shape, r)


def _split(dy: Tensor, full: bool, r: int) -> tuple[int, int, int]:
    """Blocks of rows, the columns of a part, and the parts."""
    (M, N), tile = dy.shape, _tile(dy, full, r)
    columns = cdiv(cdiv(N, column_parts(M, N)), tile.n) * tile.n
    return cdiv(M, tile.m), columns, cdiv(N, columns)


@launched(_gate_backward_kernel)
def _launch_gate_backward(
    dy: Tensor,
    saved: Tensor,
    h: Tensor | None,
    factor: Factor,
    adapter_bias: Tensor | None,
    decay: Tensor | None,
    largest: Tensor | None,
    r: int,
    gate: GateNumbers,
    *,
    statistics: Tensor | None = None,
    through: Tensor | None = None,
    g: Tensor | None = None,
    v: Tensor | None = None,
    sums: Tensor | None = None,
) -> Launch:
    (M, N), full, rank = dy.shape, h is not None, rank_block(r)
    tile = _tile(dy, full, r)
    blocks, columns, parts = _split(dy, full, r)
    return Launch(
        blocks * parts,
        tile,
        dict(
            dy_ptr=dy,
            saved_ptr=saved,
            h_ptr=h,
            **factor.arguments(),
            adapter_bias_ptr=adapter_bias,
            decay_ptr=decay,
            largest_ptr=largest,
            through_ptr=through,
            g_ptr=g,
            v_ptr=v,
            bias_part_ptr=sums,
            statistics_ptr=statistics,
            M=M,
            N=N,
            R=r,
            columns=columns,
            stride_dm=dy.stride(0),
            stride_dn=dy.stride(1),
            stride_vp=M * r,
            stride_hm=h.stride(0) if full else 0,
            **gate.arguments(),
            FULL=full,
            RANK=rank,
            BLOCK_R=min(rank, 64),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            PRECISION=dot_precision(dy.dtype),
            STATISTICS=statistics is not None,
        ),
    )
