"""The output-domain layer on the kernels: the same two functions as ``reference.linear``.

The derivation, and what each pass reads and writes, is in README.md beside this file.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ...settings import SMagNorm
from ..host import cdiv, contiguous
from . import dispatch
from .epilogue import apply_change, gradients, outputs
from .launch import addressable
from .passes import factors
from .passes.down import down, project
from .passes.epilogue import epilogue
from .passes.product import product


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor, cols: Tensor | None,
    rows: Tensor | None, C: Tensor | None, R: Tensor | None, adapter_bias: Tensor | None,
    decay: Tensor | None, alpha: float, norm: SMagNorm | None, edge: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, t, what the backward pass needs of the gate, and the count of gates <= ``edge``."""
    (M, K), N, r = x.shape, weight.shape[0], core.shape[0]
    x = addressable(x)
    bias, cols, rows, adapter_bias, decay = contiguous(bias, cols, rows, adapter_bias, decay)
    needs_down = R is not None or bias is not None  # else t is columns of y0 (identity 1)
    plan = dispatch.plan(M, N, K, r, x.dtype, x.device, norm, needs_down=needs_down,
                         operands=(x, weight))
    saved, moved, change = outputs(x, N, adapter_bias, decay, norm, edge, save)
    columns = partial(factors.columns, weight, cols, C)
    if plan.one_pass:
        t, h = down(x, factors.rows(weight, rows, R), core, alpha, p_dtype=x.dtype)
        y = x.new_empty(M, N)
        product(x, weight, h, columns(reads=cdiv(M, plan.tile.m)), r, y, plan.tile, bias=bias,
                **change)
        return y, t, saved, moved
    y = F.linear(x, weight, bias)
    if needs_down:
        t, h = down(x, factors.rows(weight, rows, R), core, alpha, p_dtype=x.dtype)
    else:
        t, h = project(y, rows, core, alpha, q_dtype=x.dtype)
    apply_change(y, h, columns, r, norm, change)
    return y, t, saved, moved


def backward(
    dy: Tensor, weight: Tensor, core: Tensor, cols: Tensor | None, rows: Tensor | None,
    C: Tensor | None, R: Tensor | None, adapter_bias: Tensor | None, decay: Tensor | None,
    t: Tensor, saved: Tensor, alpha: float, norm: SMagNorm | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, core and adapter_bias; None where ``needs`` is False."""
    dy = addressable(dy)
    cols, rows, adapter_bias, decay, t, saved = contiguous(
        cols, rows, adapter_bias, decay, t, saved)
    found = gradients(dy, partial(factors.columns, weight, cols, C),
                      rows if R is None else None, core, adapter_bias, decay, t, saved,
                      alpha, norm, needs)
    dx = None
    if needs[0] and norm is None:
        dx = _dx_without_gate(dy, weight, core.shape[0], rows, R, found.q)
    elif needs[0]:
        dx = found.g @ weight
        if R is not None:
            dx.addmm_(found.q[:, :core.shape[0]], R)
    return dx, found.dcore, found.dadapter_bias.to(adapter_bias.dtype) if needs[2] else None


def _dx_without_gate(dy, weight, r, rows, R, dT):
    (M, N), K = dy.shape, weight.shape[1]
    plan = dispatch.plan(M, K, N, r, dy.dtype, dy.device, None, input_gradient=True,
                         operands=(dy, weight.T))
    factor = factors.rows(weight, rows, R)
    if plan.one_pass:
        dx = dy.new_empty(M, K)
        product(dy, weight.T, dT, factor, r, dx, plan.tile)
        return dx
    dx = dy @ weight
    epilogue(dx, dT, factor, r)
    return dx
