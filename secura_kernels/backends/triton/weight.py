"""The weight-domain layer on the kernels: the same two functions as ``reference.weight``.

W_eff is formed in scratch memory that the caching allocator hands from layer to layer of a shape,
and formed again in the backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...settings import SMagNorm
from ..host import GateNumbers, contiguous
from .launch import addressable
from .passes import factors
from .passes.core_gradient import core_gradient
from .passes.decode import MOST_TOKENS, decode
from .passes.down import project
from .passes.effective_weight import effective_weight
from .passes.weight_core_gradient import weight_core_gradient


class _Change:
    """What every pass of a layer needs: P = alpha C core, R, the gate, and max(rho) where used."""

    def __init__(self, weight, core, cols, rows, C, R, alpha, norm):
        self.weight, self.r = weight, core.shape[0]
        source = (weight, cols) if C is None else (C, None)
        self.C, self.P = project(*source, core, alpha, q_dtype=torch.float32, transpose_core=True)
        self.factor = factors.rows(weight, rows, R)
        self.gate = GateNumbers.of(norm, weight.dtype)
        self.largest = None
        if norm.ref == "max":
            self.largest = weight.new_zeros(1, dtype=torch.int32)
            effective_weight(*self.arguments(), find_largest=True)

    def arguments(self) -> tuple:
        return self.weight, self.P, self.factor, self.r, self.gate, self.largest


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor, cols: Tensor | None,
    rows: Tensor | None, C: Tensor | None, R: Tensor | None, adapter_bias: Tensor | None,
    decay: Tensor | None, alpha: float, norm: SMagNorm, edge: float,
) -> tuple[Tensor, Tensor]:
    """y (M, N) and the count of gates <= ``edge``."""
    x = addressable(x)
    bias, cols, rows, adapter_bias, decay = contiguous(bias, cols, rows, adapter_bias, decay)
    change = _Change(weight, core, cols, rows, C, R, alpha, norm)
    moved = x.new_zeros(1 if edge else 0, dtype=torch.int64)
    if x.shape[0] <= MOST_TOKENS and not edge:
        y = decode(x, *change.arguments(), bias=bias, adapter_bias=adapter_bias, decay=decay)
        return y, moved
    effective = effective_weight(*change.arguments(), decay=decay, edge=edge,
                                 moved=moved if edge else None)
    y = F.linear(x, effective, bias)
    return (y if adapter_bias is None else y.add_(adapter_bias)), moved


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, core: Tensor, cols: Tensor | None,
    rows: Tensor | None, C: Tensor | None, R: Tensor | None, adapter_bias: Tensor | None,
    decay: Tensor | None, alpha: float, norm: SMagNorm, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, core and adapter_bias; None where ``needs`` is False."""
    dy, x = addressable(dy), addressable(x)
    cols, rows, adapter_bias, decay = contiguous(cols, rows, adapter_bias, decay)
    dx = dcore = dbias = None
    if needs[0] or needs[1]:
        change = _Change(weight, core, cols, rows, C, R, alpha, norm)
    if needs[0]:
        dx = dy @ effective_weight(*change.arguments(), decay=decay)
    if needs[1]:
        Q = weight_core_gradient(dy.T @ x, *change.arguments(), decay=decay,
                                 full=not norm.detach_gate)
        dcore = core_gradient(change.C, Q, core, alpha, dy)
    if needs[2]:
        dbias = dy.sum(0, dtype=torch.float32).to(adapter_bias.dtype)
    return dx, dcore, dbias
