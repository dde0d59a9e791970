"""*one pass* without a gate where the bulk-copy engine reaches all: y = a B^T + h C^T + biases.

Every operand is loaded by bulk copies, h C^T is one more step behind those over K, and y leaves
in halves by bulk stores. Up to rank 64 the loops over tiles and over K are one (FLAT), and the next
tile's first operands are copied while this one is stored: the pass takes some 5 % longer than the
library's a B^T alone (README.md). Higher ranks would need more shared memory than there is.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...host import cdiv
from ..chips import processors, rank_block
from ..launch import Launch, launched
from ..tiles import Tile
from .bulk_copies import described, has_descriptor
from .factors import Factor
from .tile_ops import _tile_position, _vector


@triton.jit(do_not_specialize=["M"])
def _bulk_product_kernel(
    a_ptr,
    b_ptr,
    h_ptr,
    factor_ptr,
    bias_ptr,
    adapter_bias_ptr,
    y_ptr,
    M,
    N,
    K,
    RANKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    B_ROWS: tl.constexpr,
    FACTOR_ROWS: tl.constexpr,
    FLAT: tl.constexpr,
):
    # ROWS: the matrix lies as (N, ·), as W forwards and a copied C, else as (·, N).
    HALF: tl.constexpr = BLOCK_N // 2
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0), flatten=FLAT):
        row, column = _tile_position(tile, rows, columns, GROUP)
        m0, n0 = row * BLOCK_M, column * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            a = a_ptr.load([m0, k0])
            b = tl.trans(b_ptr.load([n0, k0])) if B_ROWS else b_ptr.load([k0, n0])
            acc = tl.dot(a, b, acc)
        for r0 in tl.static_range(0, RANKS, BLOCK_R):
            h = h_ptr.load([m0, r0])
            c = tl.trans(factor_ptr.load([n0, r0])) if FACTOR_ROWS else factor_ptr.load([r0, n0])
            acc = tl.dot(h, c, acc)
        if bias_ptr is not None or adapter_bias_ptr is not None:
            n = n0 + tl.arange(0, BLOCK_N)
            acc += (_vector(bias_ptr, n, N, 0.0) + _vector(adapter_bias_ptr, n, N, 0.0))[None, :]
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        y_ptr.store([m0, n0], left.to(y_ptr.dtype))
        y_ptr.store([m0, n0 + HALF], right.to(y_ptr.dtype))


def reaches(a: Tensor, b: Tensor) -> bool:
    """Whether bulk copies can move a, b and a b^T."""
    rows = b.shape[0] * b.element_size()
    return has_descriptor(a, b) and rows % 16 == 0


@launched(_bulk_product_kernel)
def launch_bulk_product(
    a: Tensor,
    b: Tensor,
    h: Tensor,
    factor: Factor,
    y: Tensor,
    tile: Tile,
    bias: Tensor | None,
    adapter_bias: Tensor | None,
) -> Launch:
    (M, K), N = a.shape, b.shape[0]
    tiles = cdiv(M, tile.m) * cdiv(N, tile.n)
    block = min(rank_block(h.shape[1]), 64)
    return Launch(
        min(tiles, processors(a.device)) if tile.persistent else tiles,
        tile,
        dict(
            a_ptr=described(a, tile.m, tile.k),
            b_ptr=described(b, tile.n, tile.k),
            h_ptr=described(h, tile.m, block),
            factor_ptr=described(factor.matrix, tile.n, block),
            bias_ptr=bias,
            adapter_bias_ptr=adapter_bias,
            y_ptr=described(y, tile.m, tile.n // 2),
            M=M,
            N=N,
            K=K,
            RANKS=cdiv(h.shape[1], block) * block,
            BLOCK_R=block,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            GROUP=tile.group,
            B_ROWS=b.stride(1) == 1,
            FACTOR_ROWS=factor.by_rows,
            FLAT=tile.persistent and h.shape[1] <= block,
        ),
    )
