"""The output-domain layer on the CUDA kernels: the two functions of ``reference.linear``."""

import torch.nn.functional as F
from torch import Tensor

from ..operands import CurOperands
from .epilogue import apply_change, gradients, outputs
from .passes import Finish, columns, core_gradient, down, epilogue, product, project, rows
from .plan import one_pass


def forward(
    x: Tensor, layer: CurOperands, edge: float, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, t, what the backward pass needs of the gate, and the count of gates <= ``edge``."""
    layer, core = layer.with_contiguous_vectors(), layer.core.float()
    weight, bias, alpha = layer.weight, layer.bias, layer.alpha
    saved, moved, finish = outputs(x, weight.shape[0], layer, edge, save)
    C = columns(layer)
    if one_pass(x, weight, layer.norm):
        t, h = down(x, rows(layer), core, alpha, p_dtype=x.dtype)
        return product(x, weight, h, C, bias, finish), t, saved, moved
    y = F.linear(x, weight, bias)
    if layer.R is None and bias is None:
        t, h = project(y, layer.rows, core, alpha, q_dtype=x.dtype)  # identity 1
    else:
        t, h = down(x, rows(layer), core, alpha, p_dtype=x.dtype)
    apply_change(y, h, C, layer.norm, finish)
    return y, t, saved, moved


def backward(
    dy: Tensor,
    layer: CurOperands,
    t: Tensor,
    saved: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, core and adapter_bias; None where ``needs`` is False."""
    layer, t = layer.with_contiguous_vectors(), t.contiguous()
    tied_rows = layer.rows if layer.R is None else None
    found = gradients(dy, layer, tied_rows, saved.contiguous(), needs)
    dx = None
    if needs[0] and layer.norm is None:
        dx = _dx_without_gate(dy, layer.weight, rows(layer), found.q)
    elif needs[0]:
        dx = found.g @ layer.weight
        if layer.R is not None:
            dx.addmm_(found.q[:, : layer.r], layer.R)
    dcore = core_gradient(found.v, t, layer.alpha).to(layer.core.dtype) if needs[1] else None
    return dx, dcore, found.dadapter_bias.to(layer.adapter_bias.dtype) if needs[2] else None


def _dx_without_gate(dy: Tensor, weight: Tensor, R: Tensor, dT: Tensor) -> Tensor:
    if one_pass(dy, weight.T, None):
        return product(dy, weight.T, dT, R, None, Finish())
    dx = dy @ weight
    epilogue(dx, dT, R, Finish())
    return dx
