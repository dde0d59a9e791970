"""C and R as the kernels read them: stored matrices, or columns and rows of W by index."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...host import cdiv, padded_rank
from ...operands import CurOperands
from ..chips import rank_block
from ..launch import Launch, launched
from ..tiles import tile_for
from .bulk_copies import reachable


class Factor(NamedTuple):
    """One factor of the CUR product, (long, r): element (j, k) is that of ``matrix``, which has
    these strides, in row j and column index[k]; k where there is no index. ``ranks`` of them can be
    read: r, or more where the matrix is padded with zeros."""

    matrix: Tensor
    index: Tensor | None
    stride_long: int
    stride_rank: int
    ranks: int

    @property
    def scattered(self) -> bool:
        """Whether each element lies in a memory sector of its own: columns of W."""
        return self.index is not None and self.stride_long != 1

    def copied(self, long: int, reads: int) -> "Factor":
        """A scattered (long, r) factor to be read ``reads`` times: gathered once where that
        pays, with rows that start on 16 bytes whatever r is."""
        if reads <= READS_BEFORE_COPY:
            return self
        matrix, index, stride_long, stride_rank, r = self
        ranks = padded_rank(r)
        out = torch.empty(long, ranks, dtype=matrix.dtype, device=matrix.device)
        _launch_gather(matrix, index, out, stride_long, stride_rank)
        return Factor(out, None, ranks, 1, ranks)

    def aligned(self, long: int) -> "Factor":
        """As bulk copies can reach it: a matrix of its own, with rows on 16 bytes. Itself where it
        is one, else a copy."""
        if self.scattered:
            return self.copied(long, READS_BEFORE_COPY + 1)
        matrix = self.matrix
        if self.index is not None:
            matrix = matrix.T[self.index].T  # index_select takes 10 us for 16 rows and fewer
        if not reachable(matrix):
            r = matrix.shape[1]
            padded = matrix.new_zeros(long, padded_rank(r))
            padded[:, :r] = matrix
            matrix = padded
        if matrix is self.matrix:
            return self
        return Factor(matrix, None, *matrix.stride(), matrix.shape[1])

    @property
    def by_rows(self) -> bool:
        """Whether its matrix lies as (long, r), as a copied C, and not as (r, long)."""
        return self.stride_rank == 1

    def arguments(self) -> dict:
        return dict(
            factor_ptr=self.matrix,
            index_ptr=self.index,
            FR=self.ranks,
            stride_fl=self.stride_long,
            stride_fr=self.stride_rank,
        )


# Re-reading columns of W costs a 32-byte sector an element; above this many blocks of rows that
# would each do it, one gathered copy (N, r) is cheaper.
READS_BEFORE_COPY = 2


@triton.jit
def _gather_kernel(
    w_ptr,
    cols_ptr,
    out_ptr,
    N,
    R,
    stride_wn,
    stride_wk,
    stride_on,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
):
    n0 = tl.program_id(0) * BLOCK_N
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, RANK)
    col = tl.load(cols_ptr + k, mask=k < R, other=0)
    w_ptr += tl.cast(n0, tl.int64) * stride_wn
    out_ptr += tl.cast(n0, tl.int64) * stride_on
    value = tl.load(
        (w_ptr + col * stride_wk)[None, :] + (n * stride_wn)[:, None],
        mask=(n0 + n < N)[:, None] & (k < R)[None, :],
        other=0.0,
    )
    tl.store(
        out_ptr + n[:, None] * stride_on + k[None, :],
        value,
        mask=(n0 + n < N)[:, None] & (k < stride_on)[None, :],
    )


@launched(_gather_kernel)
def _launch_gather(
    matrix: Tensor, index: Tensor, out: Tensor, stride_long: int, stride_rank: int
) -> Launch:
    long, r = out.shape[0], index.shape[0]
    tile = tile_for("gather", matrix, long, r, r)
    return Launch(
        cdiv(long, tile.m),
        tile,
        dict(
            w_ptr=matrix,
            cols_ptr=index,
            out_ptr=out,
            N=long,
            R=r,
            stride_wn=stride_long,
            stride_wk=stride_rank,
            stride_on=out.stride(0),
            BLOCK_N=tile.m,
            RANK=rank_block(r),
        ),
    )


def columns(layer: CurOperands) -> Factor:
    """C as (N, r)."""
    if layer.C is None:
        weight, cols = layer.weight, layer.cols
        return Factor(weight, cols, weight.stride(0), weight.stride(1), cols.shape[0])
    C = layer.C
    return Factor(C, None, C.stride(0), C.stride(1), C.shape[1])


def rows(layer: CurOperands) -> Factor:
    """R as (K, r)."""
    if layer.R is None:
        weight, index = layer.weight, layer.rows
        return Factor(weight.T, index, weight.stride(1), weight.stride(0), index.shape[0])
    R = layer.R
    return Factor(R.T, None, R.stride(1), R.stride(0), R.shape[0])


@triton.jit
def _described_factor_tile(factor_ptr, j0, r0, BY_ROWS: tl.constexpr):
    """The same as ``_factor_tile`` of an aligned factor's descriptor."""
    return factor_ptr.load([j0, r0]) if BY_ROWS else tl.trans(factor_ptr.load([r0, j0]))


@triton.jit
def _factor_tile(factor_ptr, index_ptr, stride_fl, stride_fr, j0, j, J, k, FR):
    """[long, rank] tile of a factor at positions ``j0 + j`` and ranks ``k``; zeros outside."""
    where = k
    if index_ptr is not None:
        where = tl.load(index_ptr + k, mask=k < FR, other=0)
    # One 64-bit move to j0, then offsets inside the tile fit in 32 bits.
    factor_ptr += tl.cast(j0, tl.int64) * stride_fl
    pointers = (factor_ptr + where.to(tl.int64) * stride_fr)[None, :] + (j * stride_fl)[:, None]
    return tl.load(pointers, mask=(j0 + j < J)[:, None] & (k < FR)[None, :], other=0.0)
