"""*effective weight*: W_eff = S-MagNorm(W, delta_W) by one elementwise pass over W.

delta_W = P R with P = alpha C core (N, r) in float32, tile by tile; it is never stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...host import GateNumbers, cdiv
from ...passes import WeightChange
from ..chips import rank_block
from ..launch import WIDE_STEP, Launch, launched, wide_precision
from ..tiles import tile_for
from .exact import _dot_exact
from .factors import Factor, _factor_tile
from .gate import _relative_magnitude
from .tile_ops import _at_row, _divided_by_largest, _gate_and_store, _raise_largest, _vector


@triton.jit
def _weight_tile(w_ptr, stride_wn, stride_wk, n0, n, N, k0, k, K):
    """W at rows ``n0 + n``, columns ``k0 + k`` in float32."""
    w_ptr += tl.cast(n0, tl.int64) * stride_wn + tl.cast(k0, tl.int64) * stride_wk
    return tl.load(
        w_ptr + (n * stride_wn)[:, None] + (k * stride_wk)[None, :],
        mask=(n0 + n < N)[:, None] & (k0 + k < K)[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _delta_weight_tile(
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
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
):
    """delta_W = P R at rows ``n0 + n``, columns ``k0 + k``: [BLOCK_N, BLOCK_K] float32."""
    p_ptr = _at_row(p_ptr, n0, stride_pn)
    delta = tl.zeros((n.shape[0], k.shape[0]), tl.float32)
    for r0 in tl.range(0, RANK, BLOCK_R, num_stages=1):
        r = r0 + tl.arange(0, BLOCK_R)
        p = tl.load(
            p_ptr + n[:, None] * stride_pn + r[None, :],
            mask=(n0 + n < N)[:, None] & (r < stride_pn)[None, :],
            other=0.0,
        )
        factor = _factor_tile(factor_ptr, index_ptr, stride_fl, stride_fr, k0, k, K, r, FR)
        delta = _dot_exact(p, tl.trans(factor), delta, WIDE)
    return delta


@triton.jit
def _effective_weight_kernel(
    w_ptr,
    p_ptr,
    factor_ptr,
    index_ptr,
    decay_ptr,
    out_ptr,
    moved_ptr,
    largest_ptr,
    N,
    K,
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
    edge,
    FIND_LARGEST: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    columns = tl.cdiv(K, BLOCK_K)
    n0, k0 = (tl.program_id(0) // columns) * BLOCK_N, (tl.program_id(0) % columns) * BLOCK_K
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
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
    k += k0
    if FIND_LARGEST:
        _raise_largest(_relative_magnitude(b, d, eps), n, N - n0, k, K, largest_ptr)
    else:
        slope = _divided_by_largest(slope, largest_ptr)
        _gate_and_store(
            b,
            d,
            _vector(decay_ptr, n0 + n, N, 1.0)[:, None],
            n,
            N - n0,
            k,
            K,
            _at_row(out_ptr, n0, K),
            None,
            moved_ptr,
            slope,
            offset,
            eps,
            beta,
            top,
            code_steps,
            edge,
        )


def effective_weight(
    change: WeightChange, moved: Tensor | None = None, edge: float = 0.0
) -> Tensor:
    """W_eff (N, K), contiguous, in W's dtype; ``moved``, ``edge``: as of ``Finish``."""
    layer, _, P, R, gate, largest = change
    W = layer.weight
    out = torch.empty(W.shape, dtype=W.dtype, device=W.device)
    _launch_effective_weight(W, P, R, layer.decay, out, moved, largest, layer.r, gate, edge)
    return out


def largest_weight_change(change: WeightChange) -> Tensor:
    """(1,) int32: the bits of max(rho)."""
    layer, _, P, R, gate, _ = change
    largest = P.new_zeros(1, dtype=torch.int32)
    _launch_effective_weight(layer.weight, P, R, None, None, None, largest, layer.r, gate, 0.0)
    return largest


@launched(_effective_weight_kernel)
def _launch_effective_weight(
    weight: Tensor,
    P: Tensor,
    factor: Factor,
    decay: Tensor | None,
    out: Tensor | None,
    moved: Tensor | None,
    largest: Tensor | None,
    r: int,
    gate: GateNumbers,
    edge: float,
) -> Launch:
    (N, K), rank = weight.shape, rank_block(r)
    tile = tile_for("effective_weight", weight, N, K, r)
    return Launch(
        cdiv(N, tile.m) * cdiv(K, tile.n),
        tile,
        dict(
            w_ptr=weight,
            p_ptr=P,
            **factor.arguments(),
            decay_ptr=decay,
            out_ptr=out,
            moved_ptr=moved,
            largest_ptr=largest,
            N=N,
            K=K,
            stride_wn=weight.stride(0),
            stride_wk=weight.stride(1),
            stride_pn=P.stride(0),
            **gate.arguments(),
            edge=edge,
            FIND_LARGEST=out is None,
            RANK=rank,
            BLOCK_R=min(rank, WIDE_STEP),
            BLOCK_N=tile.m,
            BLOCK_K=tile.n,
            WIDE=wide_precision(weight.dtype),
        ),
    )
