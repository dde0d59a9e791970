"""*decode*: y = x W_eff^T for few tokens, W_eff formed tile by tile in the loop and never stored.

At M <= 64 the layer's time is that of reading W: writing and reading W_eff as well would triple it.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...host import GateNumbers, cdiv
from ...passes import WeightChange
from ..chips import rank_block
from ..launch import WIDE_STEP, Launch, dot_precision, launched, wide_precision
from ..tiles import tile_for
from .effective_weight import _delta_weight_tile, _weight_tile
from .factors import Factor
from .gate import _apply_gate, _gate
from .tile_ops import _divided_by_largest, _store, _vector

MOST_TOKENS = 64


@triton.jit(do_not_specialize=["M"])
def _decode_kernel(
    x_ptr,
    w_ptr,
    p_ptr,
    factor_ptr,
    index_ptr,
    bias_ptr,
    adapter_bias_ptr,
    decay_ptr,
    largest_ptr,
    y_ptr,
    M,
    N,
    K,
    FR,
    stride_xm,
    stride_xk,
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
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    n0 = tl.program_id(0) * BLOCK_N
    c = _vector(decay_ptr, n0 + n, N, 1.0)[:, None]
    x_tile = x_ptr + (m * stride_xm)[:, None] + (k * stride_xk)[None, :]
    slope = _divided_by_largest(slope, largest_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x = tl.load(x_tile, mask=(m < M)[:, None] & (k0 + k < K)[None, :], other=0.0)
        x_tile += BLOCK_K * stride_xk
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
        s = _gate(b, d, slope, offset, eps, beta)[1]
        effective = _apply_gate(b, d, s, beta, c).to(x.dtype)  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(x, tl.trans(effective), acc, input_precision=PRECISION)
    n += n0
    acc += (_vector(bias_ptr, n, N, 0.0) + _vector(adapter_bias_ptr, n, N, 0.0))[None, :]
    _store(acc, m, M, n, N, y_ptr)


def decode(x: Tensor, change: WeightChange) -> Tensor:
    """y (M, N) = x W_eff^T + biases; x: (M, K), M <= MOST_TOKENS."""
    layer, _, P, R, gate, largest = change
    y = x.new_empty(x.shape[0], layer.weight.shape[0])
    vectors = layer.bias, layer.adapter_bias, layer.decay
    _launch_decode(x, layer.weight, P, R, *vectors, largest, y, layer.r, gate)
    return y


@launched(_decode_kernel)
def _launch_decode(
    x: Tensor,
    weight: Tensor,
    P: Tensor,
    factor: Factor,
    bias: Tensor | None,
    adapter_bias: Tensor | None,
    decay: Tensor | None,
    largest: Tensor | None,
    y: Tensor,
    r: int,
    gate: GateNumbers,
) -> Launch:
    (M, K), N, rank = x.shape, weight.shape[0], rank_block(r)
    tile = tile_for("decode", x, N, K, r)
    return Launch(
        cdiv(N, tile.m) if M else 0,
        tile,
        dict(
            x_ptr=x,
            w_ptr=weight,
            p_ptr=P,
            **factor.arguments(),
            bias_ptr=bias,
            adapter_bias_ptr=adapter_bias,
            decay_ptr=decay,
            largest_ptr=largest,
            y_ptr=y,
            M=M,
            N=N,
            K=K,
            stride_xm=x.stride(0),
            stride_xk=x.stride(1),
            stride_wn=weight.stride(0),
            stride_wk=weight.stride(1),
            stride_pn=P.stride(0),
            **gate.arguments(),
            RANK=rank,
            BLOCK_R=min(rank, WIDE_STEP),
            BLOCK_M=max(16, triton.next_power_of_2(M)),
            BLOCK_N=tile.m,
            BLOCK_K=tile.k,
            PRECISION=dot_precision(x.dtype),
            WIDE=wide_precision(x.dtype),
        ),
    )
