"""*adapter sums*: gradients of the cores and adapter biases, sums over each adapter's rows.

d_core = alpha v^T t (r, r) and d_adapter_bias = column sums of G, for every adapter, in float32.

Rows are walked in the order of their adapters. A program owns a chunk of that order, and leaves a
part for each adapter in it: part number chunk + adapter, which no other pair has, as in this order
neither falls and one of them rises from each pair to the next. A second kernel adds the parts of an
adapter, which lie in a row, in order. No atomics: two runs are bitwise equal.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...host import cdiv
from ..chips import rank_block
from ..launch import Launch, launched, wide_precision
from ..tiles import tile_for
from .core_gradient import programs_over_rows, rows_per_program
from .tile_ops import _at_row


class Order(NamedTuple):
    """``order`` (I,): the ids' places, sorted by adapter; ``starts`` (A + 1,): where in it each
    adapter begins, after those without one."""

    order: Tensor
    starts: Tensor


def order_of(adapter: Tensor, adapters: int) -> Order:
    """Of (I,) ids; numbers above the last adapter's are its. Nothing is read on the host."""
    ordered, order = adapter.clamp(max=adapters - 1).sort(stable=True)
    numbers = torch.arange(adapters + 1, device=adapter.device)
    return Order(order, torch.searchsorted(ordered, numbers))


@triton.jit
def _start(starts_ptr, adapter, S):
    """The place of an adapter's first row; in 32 bits, as 64-bit divisions are calls."""
    return tl.load(starts_ptr + adapter).to(tl.int32) * S


@triton.jit
def _piece(adapter_ptr, order_ptr, starts_ptr, place, last, S, A):
    """The adapter at a place of the order, and where its rows in [place, last) end."""
    at = tl.load(order_ptr + place // S)
    adapter = tl.minimum(tl.load(adapter_ptr + at), A - 1).to(tl.int32)
    return adapter, tl.minimum(last, _start(starts_ptr, adapter + 1, S))


@triton.jit
def _rows(order_ptr, place, end, S):
    """Rows at places of the order, in 64 bits; 0 from ``end`` on."""
    at = tl.load(order_ptr + place // S, mask=place < end, other=0)
    return tl.where(place < end, at * S + place % S, 0)


@triton.jit(do_not_specialize=["M", "S", "A"])
def _cores_kernel(
    v_ptr,
    t_ptr,
    adapter_ptr,
    order_ptr,
    starts_ptr,
    out_ptr,
    M,
    S,
    R,
    A,
    rows_per_program,
    alpha,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
):
    blocks = tl.cdiv(R, BLOCK_R)
    chunk, block = tl.program_id(0) // (blocks * blocks), tl.program_id(0) % (blocks * blocks)
    i = (block // blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = (block % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = chunk * rows_per_program
    last = tl.minimum(first + rows_per_program, M)
    first = tl.maximum(first, _start(starts_ptr, 0, S))
    while first < last:
        adapter, end = _piece(adapter_ptr, order_ptr, starts_ptr, first, last, S, A)
        acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
        while first < end:
            place = first + tl.arange(0, BLOCK_M)
            row = _rows(order_ptr, place, end, S) * R
            v = tl.load(
                v_ptr + row[:, None] + i[None, :],
                mask=(place < end)[:, None] & (i < R)[None, :],
                other=0.0,
            )
            t = tl.load(
                t_ptr + row[:, None] + j[None, :],
                mask=(place < end)[:, None] & (j < R)[None, :],
                other=0.0,
            )
            acc = tl.dot(tl.trans(v), t.to(tl.float32), acc, input_precision=WIDE)
            first += BLOCK_M
        tl.store(
            _at_row(out_ptr, chunk + adapter, R * R) + i[:, None] * R + j[None, :],
            alpha * acc,
            mask=(i < R)[:, None] & (j < R)[None, :],
        )
        first = end


@triton.jit(do_not_specialize=["M", "S", "A"])
def _bias_kernel(
    g_ptr,
    adapter_ptr,
    order_ptr,
    starts_ptr,
    out_ptr,
    M,
    S,
    N,
    A,
    rows_per_program,
    stride_gm,
    stride_gn,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    columns = tl.cdiv(N, BLOCK_N)
    chunk = tl.program_id(0) // columns
    n = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = chunk * rows_per_program
    last = tl.minimum(first + rows_per_program, M)
    first = tl.maximum(first, _start(starts_ptr, 0, S))
    while first < last:
        adapter, end = _piece(adapter_ptr, order_ptr, starts_ptr, first, last, S, A)
        total = tl.zeros((BLOCK_N,), tl.float32)
        while first < end:
            place = first + tl.arange(0, BLOCK_M)
            g = tl.load(
                g_ptr
                + (_rows(order_ptr, place, end, S) * stride_gm)[:, None]
                + (n * stride_gn)[None, :],
                mask=(place < end)[:, None] & (n < N)[None, :],
                other=0.0,
            )
            total += tl.sum(g.to(tl.float32), 0)
            first += BLOCK_M
        tl.store(_at_row(out_ptr, chunk + adapter, N) + n, scale * total, mask=n < N)
        first = end


@triton.jit(do_not_specialize=["S"])
def _sum_kernel(parts_ptr, starts_ptr, out_ptr, S, width, rows_per_program, BLOCK_N: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK_N)
    adapter = tl.program_id(0) // blocks
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, end = _start(starts_ptr, adapter, S), _start(starts_ptr, adapter + 1, S)
    chunk, last = first // rows_per_program, tl.cdiv(end, rows_per_program)
    last = tl.where(first < end, last, chunk)  # an adapter without rows has no parts
    total = tl.zeros((BLOCK_N,), tl.float32)
    for at in range(chunk, last):
        total += tl.load(_at_row(parts_ptr, at + adapter, width) + n, mask=n < width, other=0.0)
    tl.store(
        _at_row(out_ptr, adapter, width) + n,
        total.to(out_ptr.dtype.element_ty),
        mask=n < width,
    )


def core_parts(
    v: Tensor, t: Tensor, adapter: Tensor, order: Order, alpha: float, adapters: int
) -> Tensor:
    """Parts of alpha v^T t of each adapter's rows, (parts, r, r).

    Args:
        v: (M, r) float32. t: (M, r), in the layer's dtype. Both contiguous.
        adapter: (I,) int64, each for M / I rows in a row.
    """
    parts = _parts(len(v), adapters, v, v.shape[1], v.shape[1])
    _launch_cores(v, t, adapter, *order, parts, adapters, alpha)
    return parts


def bias_parts(g: Tensor, adapter: Tensor, order: Order, scale: float, adapters: int) -> Tensor:
    """Parts of scale times the column sums of g (M, N) over each adapter's rows, (parts, N)."""
    parts = _parts(len(g), adapters, g, g.shape[1])
    _launch_bias(g, adapter, *order, parts, adapters, scale)
    return parts


def _parts(M: int, adapters: int, like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(programs_over_rows(M) + adapters - 1, *shape, dtype=torch.float32)


def sum_of_parts(parts: Tensor, order: Order, rows: int, out: Tensor) -> Tensor:
    """``out`` (A, ...), filled with the sum of each adapter's parts. rows: M."""
    _launch_sum(parts, *order, out, rows)
    return out


@launched(_cores_kernel)
def _launch_cores(
    v: Tensor,
    t: Tensor,
    adapter: Tensor,
    order: Tensor,
    starts: Tensor,
    out: Tensor,
    A: int,
    alpha: float,
) -> Launch:
    (M, r), block = v.shape, min(rank_block(v.shape[1]), 64)
    tile = tile_for("core_parts", t, M, r, r)
    return Launch(
        programs_over_rows(M) * cdiv(r, block) ** 2,
        tile,
        dict(
            v_ptr=v,
            t_ptr=t,
            adapter_ptr=adapter,
            order_ptr=order,
            starts_ptr=starts,
            out_ptr=out,
            M=M,
            S=M // max(1, len(adapter)),
            R=r,
            A=A,
            rows_per_program=rows_per_program(M),
            alpha=alpha,
            BLOCK_M=tile.m,
            BLOCK_R=block,
            WIDE=wide_precision(t.dtype),
        ),
    )


@launched(_bias_kernel)
def _launch_bias(
    g: Tensor,
    adapter: Tensor,
    order: Tensor,
    starts: Tensor,
    out: Tensor,
    A: int,
    scale: float,
) -> Launch:
    M, N = g.shape
    tile = tile_for("bias_parts", g, M, N, 1)
    return Launch(
        programs_over_rows(M) * cdiv(N, tile.n),
        tile,
        dict(
            g_ptr=g,
            adapter_ptr=adapter,
            order_ptr=order,
            starts_ptr=starts,
            out_ptr=out,
            M=M,
            S=M // max(1, len(adapter)),
            N=N,
            A=A,
            rows_per_program=rows_per_program(M),
            stride_gm=g.stride(0),
            stride_gn=g.stride(1),
            scale=scale,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
        ),
    )


@launched(_sum_kernel)
def _launch_sum(parts: Tensor, order: Tensor, starts: Tensor, out: Tensor, M: int) -> Launch:
    width = parts[0].numel() if len(parts) else 0
    tile = tile_for("sum_of_parts", out, len(out), width, 1)
    return Launch(
        len(out) * cdiv(width, tile.n),
        tile,
        dict(
            parts_ptr=parts,
            starts_ptr=starts,
            out_ptr=out,
            S=M // max(1, len(order)),
            width=width,
            rows_per_program=rows_per_program(M),
            BLOCK_N=tile.n,
        ),
    )
