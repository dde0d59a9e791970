"""The output-domain layer on the kernels: the same two functions as ``reference.output_domain``.

The derivation, and what each pass reads and writes, is in README.md beside this file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernel_host import GateNumbers, cdiv, contiguous, saved_for_backward
from ..smagnorm import SMagNorm
from . import dispatch, sides
from .core_gradient import core_gradient
from .epilogue import epilogue
from .gate_backward import gate_backward
from .launch import addressable
from .low_rank import down, project
from .product import has_descriptor, product
from .tiles import tile_for


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
                         aligned=has_descriptor(x, weight))
    gate = None if norm is None else GateNumbers.of(norm, x.dtype)
    saved, keep, save_base = saved_for_backward(x, N, norm, save)
    moved = x.new_zeros(1 if edge and norm is not None else 0, dtype=torch.int64)
    change = dict(adapter_bias=adapter_bias, decay=decay, gate=gate, saved=keep,
                  save_base=save_base, moved=moved if moved.numel() else None, edge=edge)
    if plan.one_pass:
        t, h = down(x, sides.rows(weight, rows, R), core, alpha, p_dtype=x.dtype)
        y = x.new_empty(M, N)
        side = sides.columns(weight, cols, C, reads=cdiv(M, plan.tile.m))
        product(x, weight, h, side, r, y, plan.tile, bias=bias, **change)
        return y, t, saved, moved
    y = F.linear(x, weight, bias)
    if needs_down:
        t, h = down(x, sides.rows(weight, rows, R), core, alpha, p_dtype=x.dtype)
    else:
        t, h = project(y, rows, core, alpha, q_dtype=x.dtype)
    tile = tile_for("epilogue", y, M, N, r)
    side = sides.columns(weight, cols, C, reads=cdiv(M, tile.m))
    if norm is not None and norm.ref == "max":
        largest = x.new_zeros(1, dtype=torch.int32)
        epilogue(y, h, side, r, adapter_bias=adapter_bias, gate=gate, largest=largest,
                 find_largest=True)
        change["largest"] = largest
    epilogue(y, h, side, r, **change)
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
    if norm is None:
        dx, v, dbias = _backward_without_gate(
            dy, weight, core, cols, rows, C, R, alpha, needs)
    else:
        dx, v, dbias = _backward_of_gate(
            dy, weight, core, cols, rows, C, R, adapter_bias, decay, t, saved, alpha, norm, needs)
    dcore = core_gradient(v, t, core, alpha, dy) if needs[1] else None
    return dx, dcore, dbias.to(adapter_bias.dtype) if needs[2] else None


def _backward_without_gate(dy, weight, core, cols, rows, C, R, alpha, needs):
    (M, N), K, r = dy.shape, weight.shape[1], core.shape[0]
    dx = v = None
    if needs[0] or needs[1]:
        side = sides.columns(weight, cols, C, reads=cdiv(M, tile_for("down", dy, M, N, r).m))
        v, dT = down(dy, side, core, alpha, p_dtype=torch.float32, transpose_core=True)
    if needs[0]:
        plan = dispatch.plan(M, K, N, r, dy.dtype, dy.device, None, input_gradient=True,
                             aligned=has_descriptor(dy, weight.T))
        side = sides.rows(weight, rows, R)
        if plan.one_pass:
            dx = dy.new_empty(M, K)
            product(dy, weight.T, dT, side, r, dx, plan.tile)
        else:
            dx = dy @ weight
            epilogue(dx, dT, side, r)
    return dx, v, dy.sum(0, dtype=torch.float32) if needs[2] else None


def _backward_of_gate(dy, weight, core, cols, rows, C, R, adapter_bias, decay, t, saved, alpha,
                      norm, needs):
    M, N = dy.shape
    r = core.shape[0]
    gate = GateNumbers.of(norm, dy.dtype)
    more = {}
    if not norm.detach_gate:
        _, h = project(t, None, core, alpha, q_dtype=dy.dtype)
        more = dict(h=h, adapter_bias=adapter_bias)
        if norm.ref == "max":
            more["largest"] = dy.new_zeros(1, dtype=torch.int32)
            tile = tile_for("epilogue", dy, M, N, r)
            side = sides.columns(weight, cols, C, reads=cdiv(M, tile.m))
            epilogue(saved, h, side, r, adapter_bias=adapter_bias, gate=gate,
                     largest=more["largest"], find_largest=True)
    tile = tile_for("gate_backward" if norm.detach_gate else "gate_backward_full", dy, M, N, r)
    side = sides.columns(weight, cols, C, reads=cdiv(M, tile.m))
    found = gate_backward(dy, saved, side, rows if R is None else None, core, alpha, gate,
                          decay=decay, needs=needs, **more)
    dx = None
    if needs[0]:
        dx = found.g @ weight
        if R is not None:
            dx.addmm_(found.q[:, :r], R)
    return dx, found.v, found.dadapter_bias
