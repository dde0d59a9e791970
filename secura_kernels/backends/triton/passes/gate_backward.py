"""*gate backward*: from dY and the saved gate, in one pass, everything the backward pass needs.

    db = (beta - 1 + c) s dY       gradient of the base, which becomes G'
    dd = c s dY                    gradient of the change; c = 1 without importance decay
    v  = dd C                      (M, r), in parts
    dadapter_bias = column sums of dd

A program owns some rows and, where rows alone are too few programs, one of ``column_parts`` parts
of the columns, with a v of its own; *core gradient* adds the parts in order. No atomics: two runs
are bitwise equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...host import GateNumbers, cdiv
from ..chips import rank_block
from ..launch import Launch, dot_precision, launched
from ..tiles import Tile, column_parts, tile_for
from .bulk_copies import described
from .factors import Factor, _described_factor_tile, _factor_tile
from .gate import _decode
from .tile_ops import _at_row, _store, _vector


@triton.jit(do_not_specialize=["M"])
def _gate_backward_kernel(
    dy_ptr,
    saved_ptr,
    factor_ptr,
    index_ptr,
    decay_ptr,
    g_ptr,
    v_ptr,
    bias_part_ptr,
    M,
    N,
    R,
    FR,
    columns,
    stride_dm,
    stride_dn,
    stride_vp,
    stride_fl,
    stride_fr,
    beta,
    top,
    code_steps,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    FACTOR_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    parts = tl.cdiv(N, columns)
    block, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    m0 = block * BLOCK_M
    first, last = part * columns, min(N, part * columns + columns)
    m, M = tl.arange(0, BLOCK_M), M - m0
    k = tl.arange(0, RANK)
    dy_ptr, saved_ptr = _at_row(dy_ptr, m0, stride_dm), _at_row(saved_ptr, m0, N)
    if g_ptr is not None:
        g_ptr = _at_row(g_ptr, m0, N)
    if v_ptr is not None:
        v_ptr = _at_row(_at_row(v_ptr, part, stride_vp), m0, R)
    if bias_part_ptr is not None:
        bias_part_ptr = _at_row(bias_part_ptr, block, N)
    # Without decay dd is db / beta: one matrix serves for both.
    PROPORTIONAL: tl.constexpr = decay_ptr is None
    dy_tile = _at_row(dy_ptr, first, stride_dn) + (
        (m * stride_dm)[:, None] + (tl.arange(0, BLOCK_N) * stride_dn)[None, :]
    )
    v = tl.zeros((BLOCK_M, RANK), tl.float32)
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
        g = _decode(saved, top, code_steps) * dy
        db, dd = (beta - 1 + c) * g, c * g
        if g_ptr is not None:
            _store(db, m, M, n, N, g_ptr)
        if bias_part_ptr is not None:
            tl.store(bias_part_ptr + n, tl.sum(dd, 0), mask=n < N)
        if v_ptr is not None:
            if TMA:
                factor = _described_factor_tile(factor_ptr, n0, 0, FACTOR_ROWS)
            else:
                factor = _factor_tile(
                    factor_ptr, index_ptr, stride_fl, stride_fr, n0, tl.arange(0, BLOCK_N), N, k, FR
                )
            scaled = db if PROPORTIONAL else dd  # rounded once, as stored
            v = tl.dot(scaled.to(factor.dtype), factor, v, input_precision=PRECISION)
    if v_ptr is not None:
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """db (M, N), v (parts, M, r) float32 and dadapter_bias (N,) float32; None for what was not
    asked for.

    Args:
        dy: (M, N), any strides. saved: (M, N), what the forward pass saved. factor: C.
        needs: of x, core, adapter_bias.
    """
    (M, N), wide = dy.shape, dict(dtype=torch.float32)
    tile = tile_for(_row(needs[2]), dy, M, N, r)
    if tile.tma:
        factor = factor.aligned(N)
    elif factor.scattered:
        factor = factor.copied(N, cdiv(M, tile.m))
    blocks, _, parts = _split(dy, tile, needs[2])
    g = torch.empty_like(saved, dtype=dy.dtype) if needs[0] else None
    v = dy.new_empty(parts, M, r, **wide) if needs[0] or needs[1] else None
    sums = dy.new_empty(blocks, N, **wide) if needs[2] else None
    _launch_gate_backward(dy, saved, factor, decay, r, gate, g, v, sums)
    return g, v, None if sums is None else sums.sum(0)


def _row(bias: bool) -> str:
    """Of the tile table: column sums cost a block of few rows as much as one of many."""
    return "gate_backward_and_bias" if bias else "gate_backward"


def _split(dy: Tensor, tile: Tile, bias: bool) -> tuple[int, int, int]:
    """Blocks of rows, the columns of a part, and the parts."""
    M, N = dy.shape
    columns = cdiv(cdiv(N, column_parts(M, N, bias)), tile.n) * tile.n
    return cdiv(M, tile.m), columns, cdiv(N, columns)


@launched(_gate_backward_kernel)
def _launch_gate_backward(
    dy: Tensor,
    saved: Tensor,
    factor: Factor,
    decay: Tensor | None,
    r: int,
    gate: GateNumbers,
    g: Tensor | None,
    v: Tensor | None,
    sums: Tensor | None,
) -> Launch:
    M, N = dy.shape
    bias = sums is not None
    tile = tile_for(_row(bias), dy, M, N, r)
    blocks, columns, parts = _split(dy, tile, bias)
    arguments = factor.arguments()
    if tile.tma:
        arguments["factor_ptr"] = described(factor.matrix, tile.n, rank_block(r))
    return Launch(
        blocks * parts,
        tile,
        dict(
            dy_ptr=dy,
            saved_ptr=saved,
            **arguments,
            decay_ptr=decay,
            g_ptr=g,
            v_ptr=v,
            bias_part_ptr=sums,
            M=M,
            N=N,
            R=r,
            columns=columns,
            stride_dm=dy.stride(0),
            stride_dn=dy.stride(1),
            stride_vp=M * r,
            beta=gate.beta,
            top=gate.top,
            code_steps=gate.code_steps,
            RANK=rank_block(r),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            TMA=tile.tma,
            FACTOR_ROWS=factor.by_rows,
            PRECISION=dot_precision(dy.dtype),
        ),
    )
