"""S-MagNorm in the weight domain: W_eff = S-MagNorm(W, delta_W), y = x W_eff^T + biases.

W_eff depends on parameters only: it is formed again in the backward pass rather than kept. It is
row-blocked, so no other (N, K) matrix exists beside it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operands import CurOperands
from .blocks import row_blocks, wide_dtype
from .gate import apply_gate, gate_gradient, inverse_gate, relative_magnitude, split_gradient


class _Blocks:
    """Row blocks of b = W, d = delta_W = alpha C core R and s, formed on demand."""

    def __init__(self, layer: CurOperands) -> None:
        self.weight, self.decay, self.norm = layer.weight, layer.decay, layer.norm
        self.wide = wide_dtype(self.weight.dtype)
        self.C, self.R = layer.whole_C().to(self.wide), layer.whole_R().to(self.wide)
        self.core_R = layer.alpha * (layer.core.to(self.wide) @ self.R)  # (r, K)
        self.slices = list(row_blocks(*self.weight.shape))
        self.largest = None
        if self.norm.ref == "max":
            tops = [
                relative_magnitude(*self.base_and_change(i), self.norm.eps).amax()
                for i in self.slices
            ]
            self.largest = torch.stack(tops).amax()

    def base_and_change(self, block: slice) -> tuple[Tensor, Tensor]:
        return self.weight[block].to(self.wide), self.C[block] @ self.core_R

    def gate(self, block: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """b, d, s of a block and its decay factors (rows, 1)."""
        b, d = self.base_and_change(block)
        channel = None if self.decay is None else self.decay[block, None]
        return b, d, inverse_gate(b, d, self.norm, self.largest), channel


def effective_weight(layer: CurOperands, edge: float = 0.0) -> tuple[Tensor, Tensor]:
    """W_eff (N, K) in W's dtype, and the count of g <= edge (1,) int64 (nothing, (0,), for 0)."""
    weight, norm, blocks = layer.weight, layer.norm, _Blocks(layer)
    moved = weight.new_zeros(1 if edge else 0, dtype=torch.int64)
    out = []
    for block in blocks.slices:
        b, d, s, channel = blocks.gate(block)
        if edge:
            moved += (s >= 1 / edge).sum()
        if norm.detach_gate:
            s = s.detach()
        out.append(apply_gate(b, d, s, norm, channel).to(weight.dtype))
    return torch.cat(out), moved


def forward(x: Tensor, layer: CurOperands, edge: float) -> tuple[Tensor, Tensor]:
    """y (M, N) and the count of ``effective_weight``. Arguments as in ``linear.forward``."""
    effective, moved = effective_weight(layer, edge)
    y = F.linear(x, effective, layer.bias)
    return (y if layer.adapter_bias is None else y + layer.adapter_bias.to(y.dtype)), moved


def backward(
    dy: Tensor,
    x: Tensor,
    layer: CurOperands,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (M, K), core (r, r) and adapter_bias (N,); None where ``needs`` is False.

    dx = dy W_eff;  dcore = alpha C^T (dW_eff * s) R^T with dW_eff = dy^T x, block by block.
    """
    norm, blocks = layer.norm, _Blocks(layer)
    if norm.ref == "max" and not norm.detach_gate:
        # Each element's gradient reaches the one that sets the maximum: no block stands alone.
        blocks.slices = [slice(None)]
    effective, parts = [], []
    for block in blocks.slices:
        b, d, s, channel = blocks.gate(block)
        if norm.detach_gate:
            s = s.detach()
        if needs[0]:
            effective.append(apply_gate(b, d, s, norm, channel).to(layer.weight.dtype))
        if needs[1]:
            grad = (dy[:, block].T @ x).to(blocks.wide)
            dd = split_gradient(grad, s, norm, channel)[1]
            if not norm.detach_gate:
                dd = dd + gate_gradient(grad, b, d, s, norm, channel, blocks.largest)[1]
            parts.append(blocks.C[block].T @ (dd @ blocks.R.T))
    dx = dy @ torch.cat(effective) if needs[0] else None
    dcore = (layer.alpha * sum(parts)).to(layer.core.dtype) if needs[1] else None
    dbias = dy.sum(0, dtype=blocks.wide).to(layer.adapter_bias.dtype) if needs[2] else None
    return dx, dcore, dbias
