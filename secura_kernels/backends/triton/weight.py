"""The weight-domain layer on the kernels: the same two functions as ``reference.weight``.

W_eff is formed in scratch memory that the caching allocator hands from layer to layer of a shape,
and formed again in the backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..host import GateNumbers
from ..operands import CurOperands
from .launch import addressable
from .passes import factors
from .passes.core_gradient import core_gradient
from .passes.decode import MOST_TOKENS, decode
from .passes.down import project
from .passes.effective_weight import effective_weight
from .passes.weight_core_gradient import weight_core_gradient


class _Change:
    """What every pass of a layer needs: P = alpha C core, R, the gate, and max(rho) where used."""

    def __init__(self, layer: CurOperands) -> None:
        self.weight, self.r, norm = layer.weight, layer.r, layer.norm
        source = (layer.weight, layer.cols) if layer.C is None else (layer.C, None)
        self.C, self.P = project(
            *source, layer.core, layer.alpha, q_dtype=torch.float32, transpose_core=True
        )
        self.R = factors.rows(layer)
        self.gate = GateNumbers.of(norm, self.weight.dtype)
        self.largest = None
        if norm.ref == "max":
            self.largest = self.weight.new_zeros(1, dtype=torch.int32)
            effective_weight(*self.arguments(), find_largest=True)

    def arguments(self) -> tuple:
        return self.weight, self.P, self.R, self.r, self.gate, self.largest


def forward(x: Tensor, layer: CurOperands, edge: float) -> tuple[Tensor, Tensor]:
    """y (M, N) and the count of gates <= ``edge``."""
    x, layer = addressable(x), layer.with_contiguous_vectors()
    change, bias, adapter_bias = _Change(layer), layer.bias, layer.adapter_bias
    moved = x.new_zeros(1 if edge else 0, dtype=torch.int64)
    if x.shape[0] <= MOST_TOKENS and not edge:
        y = decode(x, *change.arguments(), bias=bias, adapter_bias=adapter_bias, decay=layer.decay)
        return y, moved
    effective = effective_weight(
        *change.arguments(), decay=layer.decay, edge=edge, moved=moved if edge else None
    )
    y = F.linear(x, effective, bias)
    return (y if adapter_bias is None else y.add_(adapter_bias)), moved


def backward(
    dy: Tensor,
    x: Tensor,
    layer: CurOperands,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, core and adapter_bias; None where ``needs`` is False."""
    dy, x, layer = addressable(dy), addressable(x), layer.with_contiguous_vectors()
    dx = dcore = dbias = None
    if needs[0] or needs[1]:
        change = _Change(layer)
    if needs[0]:
        dx = dy @ effective_weight(*change.arguments(), decay=layer.decay)
    if needs[1]:
        Q = weight_core_gradient(dy.T @ x, *change.arguments(), decay=layer.decay)
        dcore = core_gradient(change.C, Q, layer.core, layer.alpha, dy)
    if needs[2]:
        dbias = dy.sum(0, dtype=torch.float32).to(layer.adapter_bias.dtype)
    return dx, dcore, dbias
