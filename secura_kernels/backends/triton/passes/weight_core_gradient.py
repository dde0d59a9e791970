"""*weight core gradient*: Q = (dW_eff * dgate) R^T (N, r), from dW_eff = dY^T X, the library's
product in the layer's dtype. d_core = alpha C^T Q follows (``core_gradient``).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...host import GateNumbers, cdiv
from ...passes import WeightChange
from ..chips import processors, rank_block
from ..launch import Launch, launched, wide_precision
from ..tiles import tile_for
from .effective_weight import _delta_weight_tile, _weight_tile
from .exact import _dot_exact, exact_step
from .factors import Factor, _factor_tile
from .gate import _gate
from .tile_ops import _at_row, _divided_by_largest, _vector


@triton.jit
def _weight_core_gradient_kernel(
    grad_ptr,
    w_ptr,
    p_ptr,
    factor_ptr,
    index_ptr,
    decay_ptr,
    largest_ptr,
    q_ptr,
    N,
    K,
    R,
    FR,
    stride_wn,
    stride_wk,
    stride_pn,
    stride_fl,
    stride_fr,
    slope,
    offset,
    eps,
    beta,
    top,
    code_steps,
    tiles_per_program,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    groups = tl.cdiv(tl.cdiv(K, BLOCK_K), tiles_per_program)
    group = tl.program_id(0) % groups
    n0 = (tl.program_id(0) // groups) * BLOCK_N
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    r = tl.arange(0, RANK)
    c = _vector(decay_ptr, n0 + n, N, 1.0)[:, None]
    slope = _divided_by_largest(slope, largest_ptr)
    q = tl.zeros((BLOCK_N, RANK), tl.float32)
    for i in range(0, tiles_per_program):
        k0 = (group * tiles_per_program + i) * BLOCK_K
        inside = (n0 + n < N)[:, None] & (k0 + k < K)[None, :]
        grad = tl.load(
            _at_row(grad_ptr, n0, K) + n[:, None] * K + (k0 + k)[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        b = _weight_tile(w_ptr, stride_wn, stride_wk, n0, n, N, k0, k, K)
        d = _delta_weight_tile(
            p_ptr,
            stride_pn,
            factor_ptr,
            index_ptr,
            stride_fl,
            stride_fr,
            n0,
            n,
            N,
            k0,
            k,
            K,
            FR,
            RANK,
            BLOCK_R,
            WIDE,
        )
        dd = c * _gate(b, d, slope, offset, eps, beta)[1] * grad
        factor = _factor_tile(factor_ptr, index_ptr, stride_fl, stride_fr, k0, k, K, r, FR)
        q = _dot_exact(dd, factor, q, WIDE)  # [BLOCK_N, RANK]
    q_ptr += (group.to(tl.int64) * N + n0) * R
    tl.store(q_ptr + n[:, None] * R + r[None, :], q, mask=(n0 + n < N)[:, None] & (r < R)[None, :])


def weight_core_gradient(dy: Tensor, x: Tensor, change: WeightChange) -> Tensor:
    """Q (N, r) float32, of dW_eff = dY^T x, the library's product."""
    return contracted(dy.T @ x, change)


def contracted(grad: Tensor, change: WeightChange) -> Tensor:
    """Q (N, r) float32 of grad, dW_eff (N, K), contiguous."""
    layer, _, P, R, gate, largest = change
    r = layer.r
    q = grad.new_empty(_split(grad, r)[1], grad.shape[0], r, dtype=torch.float32)
    _launch_weight_core_gradient(grad, layer.weight, P, R, layer.decay, largest, r, gate, q)
    return q.sum(0)


def _split(grad: Tensor, r: int) -> tuple[int, int, int]:
    """Tiles of a program, groups of tiles along K, and programs: enough to fill the chip, no more,
    as each group writes a Q of its own."""
    (N, K), tile = grad.shape, tile_for("weight_core_gradient", grad, *grad.shape, r)
    across = cdiv(K, tile.n)
    groups = min(across, max(1, 4 * processors(grad.device) // cdiv(N, tile.m)))
    tiles_per_program = cdiv(across, groups)
    groups = cdiv(across, tiles_per_program)
    return tiles_per_program, groups, groups * cdiv(N, tile.m)


@launched(_weight_core_gradient_kernel)
def _launch_weight_core_gradient(
    grad: Tensor,
    weight: Tensor,
    P: Tensor,
    factor: Factor,
    decay: Tensor | None,
    largest: Tensor | None,
    r: int,
    gate: GateNumbers,
    q: Tensor,
) -> Launch:
    (N, K), rank = grad.shape, rank_block(r)
    tile = tile_for("weight_core_gradient", grad, N, K, r)
    tiles_per_program, _, programs = _split(grad, r)
    return Launch(
        programs,
        tile,
        dict(
            grad_ptr=grad,
            w_ptr=weight,
            p_ptr=P,
            **factor.arguments(),
            decay_ptr=decay,
            largest_ptr=largest,
            q_ptr=q,
            N=N,
            K=K,
            R=r,
            stride_wn=weight.stride(0),
            stride_wk=weight.stride(1),
            stride_pn=P.stride(0),
            **gate.arguments(),
            tiles_per_program=tiles_per_program,
            RANK=rank,
            BLOCK_R=exact_step(grad.dtype, rank),
            BLOCK_N=tile.m,
            BLOCK_K=tile.n,
            WIDE=wide_precision(grad.dtype),
        ),
    )
