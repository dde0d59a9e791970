"""The output-domain layer on the CUDA kernels: the two functions of ``reference.linear``."""

import torch.nn.functional as F
from torch import Tensor

from ...settings import SMagNorm
from ..host import contiguous
from .epilogue import apply_change, gradients, outputs
from .passes import Finish, columns, core_gradient, down, epilogue, product, project, rows
from .plan import one_pass


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor, cols: Tensor | None,
    row_index: Tensor | None, C: Tensor | None, R: Tensor | None, adapter_bias: Tensor | None,
    decay: Tensor | None, alpha: float, norm: SMagNorm | None, edge: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, t, what the backward pass needs of the gate, and the count of gates <= ``edge``."""
    bias, cols, row_index = contiguous(bias, cols, row_index)
    core = core.float()
    saved, moved, finish = outputs(x, weight.shape[0], adapter_bias, decay, norm, edge, save)
    side = columns(weight, cols, C)
    if one_pass(x, weight, norm):
        t, h = down(x, rows(weight, row_index, R), core, alpha, p_dtype=x.dtype)
        return product(x, weight, h, side, bias, finish), t, saved, moved
    y = F.linear(x, weight, bias)
    if R is None and bias is None:
        t, h = project(y, row_index, core, alpha, q_dtype=x.dtype)  # identity 1
    else:
        t, h = down(x, rows(weight, row_index, R), core, alpha, p_dtype=x.dtype)
    apply_change(y, h, side, norm, finish)
    return y, t, saved, moved


def backward(
    dy: Tensor, weight: Tensor, core: Tensor, cols: Tensor | None, row_index: Tensor | None,
    C: Tensor | None, R: Tensor | None, adapter_bias: Tensor | None, decay: Tensor | None,
    t: Tensor, saved: Tensor, alpha: float, norm: SMagNorm | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, core and adapter_bias; None where ``needs`` is False."""
    cols, row_index, t, saved = contiguous(cols, row_index, t, saved)
    found = gradients(dy, columns(weight, cols, C), row_index if R is None else None,
                      core.float(), adapter_bias, decay, t, saved, alpha, norm, needs)
    dx = None
    if needs[0] and norm is None:
        dx = _dx_without_gate(dy, weight, rows(weight, row_index, R), found.q)
    elif needs[0]:
        dx = found.g @ weight
        if R is not None:
            dx.addmm_(found.q[:, :core.shape[0]], R)
    dcore = core_gradient(found.v, t, alpha).to(core.dtype) if needs[1] else None
    return dx, dcore, found.dadapter_bias.to(adapter_bias.dtype) if needs[2] else None


def _dx_without_gate(dy, weight, R_side, dT):
    if one_pass(dy, weight.T, None):
        return product(dy, weight.T, dT, R_side, None, Finish())
    dx = dy @ weight
    epilogue(dx, dT, R_side, Finish())
    return dx
