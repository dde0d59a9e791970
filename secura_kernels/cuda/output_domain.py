"""The output-domain layer on the CUDA kernels: the two functions of ``reference.output_domain``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernel_host import GateNumbers, contiguous, saved_for_backward
from ..smagnorm import SMagNorm
from .passes import (
    Finish,
    columns,
    core_gradient,
    down,
    epilogue,
    gate_backward,
    product,
    project,
    rows,
)
from .plan import one_pass


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor, cols: Tensor | None,
    row_index: Tensor | None, C: Tensor | None, R: Tensor | None, adapter_bias: Tensor | None,
    decay: Tensor | None, alpha: float, norm: SMagNorm | None, edge: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, t, what the backward pass needs of the gate, and the count of gates <= ``edge``."""
    bias, cols, row_index, *vectors = contiguous(bias, cols, row_index,
                                                 *as_float32(adapter_bias, decay))
    core = core.float()
    saved, keep, save_base = saved_for_backward(x, weight.shape[0], norm, save)
    moved = x.new_zeros(1 if edge and norm is not None else 0, dtype=torch.int64)
    finish = Finish(*vectors, None if norm is None else GateNumbers.of(norm, x.dtype), keep,
                    save_base, moved if moved.numel() else None, edge)
    side = columns(weight, cols, C)
    if one_pass(x, weight, norm):
        t, h = down(x, rows(weight, row_index, R), core, alpha, p_dtype=x.dtype)
        return product(x, weight, h, side, bias, finish), t, saved, moved
    y = F.linear(x, weight, bias)
    if R is None and bias is None:
        t, h = project(y, row_index, core, alpha, q_dtype=x.dtype)  # identity 1
    else:
        t, h = down(x, rows(weight, row_index, R), core, alpha, p_dtype=x.dtype)
    largest = None
    if norm is not None and norm.ref == "max":
        largest = x.new_zeros(1, dtype=torch.int32)
        epilogue(y, h, side, finish, largest, find_largest=True)
    epilogue(y, h, side, finish, largest)
    return y, t, saved, moved


def as_float32(*vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if v is None else v.float() for v in vectors)


def backward(
    dy: Tensor, weight: Tensor, core: Tensor, cols: Tensor | None, row_index: Tensor | None,
    C: Tensor | None, R: Tensor | None, adapter_bias: Tensor | None, decay: Tensor | None,
    t: Tensor, saved: Tensor, alpha: float, norm: SMagNorm | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, core and adapter_bias; None where ``needs`` is False."""
    cols, row_index, t, saved = contiguous(cols, row_index, t, saved)
    side, wide_core = columns(weight, cols, C), core.float()
    if norm is None:
        dx, v, dbias = _backward_without_gate(
            dy, weight, wide_core, side, row_index, R, alpha, needs)
    else:
        dx, v, dbias = _backward_of_gate(
            dy, weight, wide_core, side, row_index, R, adapter_bias, decay, t, saved, alpha, norm,
            needs)
    dcore = core_gradient(v, t, alpha).to(core.dtype) if needs[1] else None
    return dx, dcore, dbias.to(adapter_bias.dtype) if needs[2] else None


def _backward_without_gate(dy, weight, core, side, row_index, R, alpha, needs):
    dx = v = None
    if needs[0] or needs[1]:
        v, dT = down(dy, side, core.T, alpha, p_dtype=torch.float32)
    if needs[0]:
        R_side = rows(weight, row_index, R)
        if one_pass(dy, weight.T, None):
            dx = product(dy, weight.T, dT, R_side, None, Finish())
        else:
            dx = dy @ weight
            epilogue(dx, dT, R_side, Finish())
    return dx, v, dy.sum(0, dtype=torch.float32) if needs[2] else None


def _backward_of_gate(dy, weight, core, side, row_index, R, adapter_bias, decay, t, saved, alpha,
                      norm, needs):
    adapter_bias, decay = contiguous(*as_float32(adapter_bias, decay))
    more = {}
    if not norm.detach_gate:
        _, h = project(t, None, core, alpha, q_dtype=dy.dtype)
        more = dict(change=h @ side.T, adapter_bias=adapter_bias, ref_max=norm.ref == "max")
    found = gate_backward(dy, saved, side, row_index, core, alpha, GateNumbers.of(norm, dy.dtype),
                          decay=decay, needs=needs, **more)
    dx = None
    if needs[0]:
        dx = found.g @ weight
        if R is not None:
            dx.addmm_(found.q[:, :core.shape[0]], R)
    return dx, found.v, found.dadapter_bias
