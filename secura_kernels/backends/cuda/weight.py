"""The weight-domain layer on the CUDA kernels: the two functions of ``reference.weight``.

W_eff is formed in scratch memory that the caching allocator hands from layer to layer of a shape,
and formed again in the backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...settings import SMagNorm
from ..host import GateNumbers, contiguous
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


def _change(weight, core, cols, row_index, C, R, decay, alpha, norm):
    """C, the change of W, and the bits of max(rho) where ``ref`` is "max"."""
    cols, row_index, decay = contiguous(cols, row_index, None if decay is None else decay.float())
    source = (weight, cols) if C is None else (C, None)
    C, P = project(*source, core.float().T, alpha, q_dtype=torch.float32)
    change = WeightChange(weight, P, rows(weight, row_index, R), decay,
                          GateNumbers.of(norm, weight.dtype))
    return C, change, largest_weight_change(change) if norm.ref == "max" else None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor, cols: Tensor | None,
    row_index: Tensor | None, C: Tensor | None, R: Tensor | None, adapter_bias: Tensor | None,
    decay: Tensor | None, alpha: float, norm: SMagNorm, edge: float,
) -> tuple[Tensor, Tensor]:
    """y (M, N) and the count of gates <= ``edge``."""
    _, change, largest = _change(weight, core, cols, row_index, C, R, decay, alpha, norm)
    moved = x.new_zeros(1 if edge else 0, dtype=torch.int64)
    if x.shape[0] <= MOST_TOKENS and not edge:
        y = decode(x, change, largest)
        for vector in (bias, adapter_bias):
            y = y if vector is None else y.add_(vector)
        return y.to(x.dtype), moved
    y = F.linear(x, effective_weight(change, largest, moved if edge else None, edge), bias)
    return (y if adapter_bias is None else y.add_(adapter_bias)), moved


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, core: Tensor, cols: Tensor | None,
    row_index: Tensor | None, C: Tensor | None, R: Tensor | None, adapter_bias: Tensor | None,
    decay: Tensor | None, alpha: float, norm: SMagNorm, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, core and adapter_bias; None where ``needs`` is False."""
    dx = dcore = dbias = None
    if needs[0] or needs[1]:
        C, change, largest = _change(weight, core, cols, row_index, C, R, decay, alpha, norm)
    if needs[0]:
        dx = dy @ effective_weight(change, largest)
    if needs[1]:
        Q = weight_core_gradient(dy, x, change, largest, full=not norm.detach_gate)
        # The pass takes its float32 matrix first, so what it gives is (alpha C^T Q)^T.
        dcore = core_gradient(Q[:, :core.shape[0]], C, alpha).T.contiguous().to(core.dtype)
    if needs[2]:
        dbias = dy.sum(0, dtype=torch.float32).to(adapter_bias.dtype)
    return dx, dcore, dbias
