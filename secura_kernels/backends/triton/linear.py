"""The output-domain layer on the kernels: the same two functions as ``reference.linear``.

The derivation, and what each pass reads and writes, is in README.md beside this file.
"""

import torch.nn.functional as F
from torch import Tensor

from ..host import cdiv
from ..operands import CurOperands
from . import dispatch
from .epilogue import apply_change, gradients, outputs
from .launch import addressable
from .passes import factors
from .passes.down import down, project
from .passes.epilogue import epilogue
from .passes.product import product


def forward(
    x: Tensor, layer: CurOperands, edge: float, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, t, what the backward pass needs of the gate, and the count of gates <= ``edge``."""
    x, layer = addressable(x), layer.with_contiguous_vectors()
    (M, K), N, r = x.shape, layer.weight.shape[0], layer.r
    needs_down = layer.R is not None or layer.bias is not None  # else columns of y0 (identity 1)
    plan = dispatch.plan(
        M, N, K, r, x.dtype, x.device, layer.norm, needs_down=needs_down, operands=(x, layer.weight)
    )
    saved, moved, change = outputs(x, N, layer, edge, save)
    if plan.one_pass:
        t, h = down(x, factors.rows(layer), layer.core, layer.alpha, p_dtype=x.dtype)
        y = x.new_empty(M, N)
        product(
            x,
            layer.weight,
            h,
            factors.columns(layer, reads=cdiv(M, plan.tile.m)),
            r,
            y,
            plan.tile,
            bias=layer.bias,
            **change,
        )
        return y, t, saved, moved
    y = F.linear(x, layer.weight, layer.bias)
    if needs_down:
        t, h = down(x, factors.rows(layer), layer.core, layer.alpha, p_dtype=x.dtype)
    else:
        t, h = project(y, layer.rows, layer.core, layer.alpha, q_dtype=x.dtype)
    apply_change(y, h, layer, change)
    return y, t, saved, moved


def backward(
    dy: Tensor,
    layer: CurOperands,
    t: Tensor,
    saved: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, core and adapter_bias; None where ``needs`` is False."""
    dy, layer = addressable(dy), layer.with_contiguous_vectors()
    found = gradients(
        dy,
        layer,
        layer.rows if layer.R is None else None,
        t.contiguous(),
        saved.contiguous(),
        needs,
    )
    dx = None
    if needs[0] and layer.norm is None:
        dx = _dx_without_gate(dy, layer, found.q)
    elif needs[0]:
        dx = found.g @ layer.weight
        if layer.R is not None:
            dx.addmm_(found.q[:, : layer.r], layer.R)
    return dx, found.dcore, found.dadapter_bias


def _dx_without_gate(dy: Tensor, layer: CurOperands, dT: Tensor) -> Tensor:
    (M, N), K, weight = dy.shape, layer.weight.shape[1], layer.weight
    plan = dispatch.plan(
        M, K, N, layer.r, dy.dtype, dy.device, None, input_gradient=True, operands=(dy, weight.T)
    )
    R = factors.rows(layer)
    if plan.one_pass:
        dx = dy.new_empty(M, K)
        product(dy, weight.T, dT, R, layer.r, dx, plan.tile)
        return dx
    dx = dy @ weight
    epilogue(dx, dT, R, layer.r)
    return dx
