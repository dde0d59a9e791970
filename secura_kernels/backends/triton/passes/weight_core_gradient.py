"""*weight core gradient*: Q = (dW_eff * dgate) R^T (N, r), from dW_eff = dY^T X, the library's
product in the layer's dtype. d_core = alpha C^T Q follows (``core_gradient``).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...host import GateNumbers, cdiv, through_largest
from ..chips import processors, rank_block
from ..launch import WIDE_STEP, launch, wide_precision
from ..tiles import tile_for
from .effective_weight import _delta_weight_tile, _weight_tile
from .factors import Factor, _factor_tile
from .gate import _at_largest, _by_relative_magnitude, _gate, _relative_magnitude, _sign
from .tile_ops import _at_row, _divided_by_largest, _vector


@triton.jit
def _weight_core_gradient_kernel(
    grad_ptr, w_ptr, p_ptr, factor_ptr, index_ptr, decay_ptr, largest_ptr, through_ptr, q_ptr,
    statistics_ptr, N, K, R, FR, stride_wn, stride_wk, stride_pn, stride_fl, stride_fr,
    slope, offset, eps, beta, top, code_steps, tiles_per_program,
    FULL: tl.constexpr, STATISTICS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):
    groups = tl.cdiv(tl.cdiv(K, BLOCK_K), tiles_per_program)
    group = tl.program_id(0) % groups
    n0 = (tl.program_id(0) // groups) * BLOCK_N
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    r = tl.arange(0, RANK)
    c = _vector(decay_ptr, n0 + n, N, 1.0)[:, None]
    slope = _divided_by_largest(slope, largest_ptr)
    slope_z = slope * 0.6931471805599453
    largest = 0.0
    through = 0.0
    if FULL and largest_ptr is not None:
        largest = tl.load(largest_ptr).to(tl.float32, bitcast=True)
        if not STATISTICS:
            through = tl.load(through_ptr)
    q = tl.zeros((BLOCK_N, RANK), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    maxima = tl.zeros((BLOCK_N,), tl.float32)
    for i in range(0, tiles_per_program):
        k0 = (group * tiles_per_program + i) * BLOCK_K
        inside = (n0 + n < N)[:, None] & (k0 + k < K)[None, :]
        grad = tl.load(_at_row(grad_ptr, n0, K) + n[:, None] * K + (k0 + k)[None, :], mask=inside,
                       other=0.0).to(tl.float32)
        b = _weight_tile(w_ptr, stride_wn, stride_wk, n0, n, N, k0, k, K)
        d = _delta_weight_tile(p_ptr, stride_pn, factor_ptr, index_ptr, stride_fl, stride_fr, n0, n,
                               N, k0, k, K, FR, RANK, BLOCK_R, WIDE)
        dd = c * _gate(b, d, slope, offset, eps, beta)[1] * grad
        if FULL:
            rho = _relative_magnitude(b, d, eps)
            by_rho = _by_relative_magnitude(grad, b, d, c, rho, slope_z, offset, beta)
            if STATISTICS:
                total += tl.sum(by_rho * rho, 1)
                maxima += tl.sum(tl.where(inside, _at_largest(rho, largest), 0.0), 1)
            elif largest_ptr is not None:
                by_rho -= through * _at_largest(rho, largest)
            dd += by_rho / (tl.abs(b) + eps) * _sign(d)
        if not STATISTICS:
            factor = _factor_tile(factor_ptr, index_ptr, stride_fl, stride_fr, k0, k, K, r, FR)
            q = tl.dot(dd, factor.to(tl.float32), q, input_precision=WIDE)  # [BLOCK_N, RANK]
    if STATISTICS:
        tl.store(statistics_ptr + tl.program_id(0) * 2, tl.sum(total, 0))
        tl.store(statistics_ptr + tl.program_id(0) * 2 + 1, tl.sum(maxima, 0))
    else:
        q_ptr += (group.to(tl.int64) * N + n0) * R
        tl.store(q_ptr + n[:, None] * R + r[None, :], q,
                 mask=(n0 + n < N)[:, None] & (r < R)[None, :])


def weight_core_gradient(grad: Tensor, weight: Tensor, P: Tensor, factor: Factor, r: int,
                         gate: GateNumbers, largest: Tensor | None, *, decay: Tensor | None,
                         full: bool) -> Tensor:
    """Q (N, r) float32. grad: dW_eff (N, K), contiguous; ``full``: with the gate's own derivative;
    other arguments as in ``effective_weight``."""
    N, K = grad.shape
    tile = tile_for("weight_core_gradient_full" if full else "weight_core_gradient", grad, N, K, r)
    # Enough programs to fill the chip, no more: each group of tiles writes a Q of its own.
    across = cdiv(K, tile.n)
    groups = min(across, max(1, 4 * processors(grad.device) // cdiv(N, tile.m)))
    tiles_per_program = cdiv(across, groups)
    groups = cdiv(across, tiles_per_program)
    programs = groups * cdiv(N, tile.m)
    rank = rank_block(r)
    fixed = dict(
        grad_ptr=grad, w_ptr=weight, p_ptr=P, **factor.arguments(), decay_ptr=decay,
        largest_ptr=largest, N=N, K=K, R=r, stride_wn=weight.stride(0),
        stride_wk=weight.stride(1), stride_pn=P.stride(0), **gate.arguments(),
        tiles_per_program=tiles_per_program, FULL=full, RANK=rank, BLOCK_R=min(rank, WIDE_STEP),
        BLOCK_N=tile.m, BLOCK_K=tile.n, WIDE=wide_precision(grad.dtype))
    through = None
    if full and largest is not None:
        statistics = grad.new_empty(programs, 2, dtype=torch.float32)
        launch(_weight_core_gradient_kernel, programs, tile, grad.device, **fixed,
               through_ptr=None, q_ptr=None, statistics_ptr=statistics, STATISTICS=True)
        through = through_largest(statistics, largest)
    q = grad.new_empty(groups, N, r, dtype=torch.float32)
    launch(_weight_core_gradient_kernel, programs, tile, grad.device, **fixed, through_ptr=through,
           q_ptr=q, statistics_ptr=None, STATISTICS=False)
    return q.sum(0)
