"""Rows by their adapter: products of each row with its own core, and sums over an adapter's rows.

Rows are sorted by adapter and cut into blocks of one adapter each, so that a batched product takes
a core a block. How many blocks there may be follows from shapes alone: nothing is read on the host.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 32  # of a block: fewer gather more cores, more are filled up with rows of zeros


class Blocks(NamedTuple):
    """``rows`` (P, ROWS) int64, the rows of each block, M where there is none; ``adapter`` (P,),
    its core's number (any, in a block without rows)."""

    rows: Tensor
    adapter: Tensor


def of_each_row(adapter: Tensor, rows: int, adapters: int) -> Tensor:
    """The adapter of each of ``rows`` rows, (I,) ids standing for ``rows / I`` rows each; numbers
    above the last adapter's are its."""
    return adapter.clamp(max=adapters - 1).repeat_interleave(
        rows // max(1, len(adapter)), output_size=rows
    )


def blocks_of(ids: Tensor, adapters: int) -> Blocks:
    """Blocks of rows whose adapters are ``ids`` (M,); rows with a negative one are in none."""
    M = len(ids)
    ordered, order = ids.sort(stable=True)
    numbers = torch.arange(adapters + 1, device=ids.device)
    starts = torch.searchsorted(ordered, numbers)  # [A + 1], in the sorted order
    pieces = (starts.diff() + ROWS - 1).div(ROWS, rounding_mode="floor")  # [A], blocks of each
    after = pieces.cumsum(0)
    block = torch.arange(min(M, M // ROWS + adapters), device=ids.device)
    adapter = torch.searchsorted(after, block, right=True)  # [P]; A in a block too many
    known = adapter.clamp(max=adapters - 1)
    first = after - pieces
    at = (starts[known] + (block - first[known]) * ROWS)[:, None]
    at = at + torch.arange(ROWS, device=ids.device)  # [P, ROWS]
    inside = (at < starts[known + 1][:, None]) & (adapter < adapters)[:, None]
    return Blocks(torch.where(inside, order[at.clamp(max=M - 1)], M), known)


def times_cores(p: Tensor, cores: Tensor, blocks: Blocks) -> Tensor:
    """p core^T (M, r) with each row's core; zero in rows without one."""
    found = _gathered(p, blocks) @ cores.index_select(0, blocks.adapter).mT
    whole = p.new_zeros(len(p) + 1, p.shape[1])  # the last takes the rows that are none
    return whole.index_copy(0, blocks.rows.flatten(), found.flatten(0, 1))[:-1]


def core_sums(v: Tensor, t: Tensor, blocks: Blocks, adapters: int) -> Tensor:
    """v^T t (A, r, r) over each adapter's rows."""
    parts = _gathered(v, blocks).mT @ _gathered(t, blocks)
    return sums(parts, blocks.adapter, adapters)


def sums(values: Tensor, ids: Tensor, adapters: int) -> Tensor:
    """The sum of the values (n, ...) of each adapter, (A, ...); negative ids are left out."""
    total = values.new_zeros(adapters + 1, *values.shape[1:])
    ids = torch.where(ids < 0, adapters, ids)
    if values.is_cuda:  # there index_add adds by atomics, and this in the order of a stable sort
        return total.index_put((ids,), values, accumulate=True)[:-1]
    return total.index_add(0, ids, values)[:-1]


def _gathered(p: Tensor, blocks: Blocks) -> Tensor:
    """[P, ROWS, r], zeros where there is no row."""
    return torch.cat([p, p.new_zeros(1, p.shape[1])])[blocks.rows]
