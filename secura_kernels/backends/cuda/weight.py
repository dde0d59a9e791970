"""The weight-domain layer on the CUDA kernels: the two functions of ``reference.weight``.

W_eff is formed in scratch memory that the caching allocator hands from layer to layer of a shape,
and formed again in the backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..host import GateNumbers
from ..operands import CurOperands
from .passes import (
    MOST_TOKENS,
    WeightChange,
    core_gradient,
    decode,
    effective_weight,
    largest_weight_change,
    project,
    rows,
    weight_core_gradient,
)


def _change(layer: CurOperands) -> tuple[Tensor, WeightChange, Tensor | None]:
    """C, the change of W, and the bits of max(rho) where ``ref`` is "max"."""
    weight, norm = layer.weight, layer.norm
    source = (weight, layer.cols) if layer.C is None else (layer.C, None)
    C, P = project(*source, layer.core.float().T, layer.alpha, q_dtype=torch.float32)
    decay = None if layer.decay is None else layer.decay.float()
    change = WeightChange(weight, P, rows(layer), decay, GateNumbers.of(norm, weight.dtype))
    return C, change, largest_weight_change(change) if norm.ref == "max" else None


def forward(x: Tensor, layer: CurOperands, edge: float) -> tuple[Tensor, Tensor]:
    """y (M, N) and the count of gates <= ``edge``."""
    bias, adapter_bias = layer.bias, layer.adapter_bias
    _, change, largest = _change(layer.with_contiguous_vectors())
    moved = x.new_zeros(1 if edge else 0, dtype=torch.int64)
    if x.shape[0] <= MOST_TOKENS and not edge:
        y = decode(x, change, largest)
        for vector in (bias, adapter_bias):
            y = y if vector is None else y.add_(vector)
        return y.to(x.dtype), moved
    y = F.linear(x, effective_weight(change, largest, moved if edge else None, edge), bias)
    return (y if adapter_bias is None else y.add_(adapter_bias)), moved


def backward(
    dy: Tensor,
    x: Tensor,
    layer: CurOperands,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, core and adapter_bias; None where ``needs`` is False."""
    dx = dcore = dbias = None
    if needs[0] or needs[1]:
        C, change, largest = _change(layer.with_contiguous_vectors())
    if needs[0]:
        dx = dy @ effective_weight(change, largest)
    if needs[1]:
        Q = weight_core_gradient(dy, x, change, largest)
        # The pass takes its float32 matrix first, so what it gives is (alpha C^T Q)^T.
        dcore = core_gradient(Q[:, : layer.r], C, layer.alpha).T.contiguous()
        dcore = dcore.to(layer.core.dtype)
    if needs[2]:
        dbias = dy.sum(0, dtype=torch.float32).to(layer.adapter_bias.dtype)
    return dx, dcore, dbias
