"""The update of a base output on the CUDA kernels: the two functions of ``reference.epilogue``.

The output-domain layer is made of the others: ``outputs``, ``apply_change`` and ``gradients``.
"""

import torch
from torch import Tensor

from ...settings import SMagNorm
from ..host import GateNumbers, contiguous, saved_for_backward
from .passes import (
    Finish,
    GateGradients,
    columns,
    core_gradient,
    down,
    epilogue,
    gate_backward,
    project,
)


def forward(
    y0: Tensor, t: Tensor, core: Tensor, C: Tensor, adapter_bias: Tensor | None,
    decay: Tensor | None, alpha: float, norm: SMagNorm | None, edge: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, what the backward pass needs of the gate, and the count of gates <= ``edge``."""
    saved, moved, change = outputs(t, y0.shape[1], adapter_bias, decay, norm, edge, save)
    y = y0.clone(memory_format=torch.contiguous_format)  # the epilogue works in place
    _, h = project(t.contiguous(), None, core.float(), alpha, q_dtype=t.dtype)
    apply_change(y, h, columns(None, None, C), norm, change)
    return y, saved, moved


def outputs(like: Tensor, N: int, adapter_bias: Tensor | None, decay: Tensor | None,
            norm: SMagNorm | None, edge: float, save: bool) -> tuple[Tensor, Tensor, Finish]:
    """What the backward pass needs of the gate and the count, allocated; and what fills them.
    ``like``: (M, any), in the layer's dtype."""
    saved, keep, save_base = saved_for_backward(like, N, norm, save)
    moved = like.new_zeros(1 if edge and norm is not None else 0, dtype=torch.int64)
    gate = None if norm is None else GateNumbers.of(norm, like.dtype)
    return saved, moved, Finish(*_vectors(adapter_bias, decay), gate, keep, save_base,
                                moved if moved.numel() else None, edge)


def _vectors(*vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    return contiguous(*(None if v is None else v.float() for v in vectors))


def apply_change(y: Tensor, h: Tensor, side: Tensor, norm: SMagNorm | None, change: Finish) -> None:
    """Turns y (M, N), the base output, into the layer's."""
    largest = None
    if norm is not None and norm.ref == "max":
        largest = y.new_zeros(1, dtype=torch.int32)
        epilogue(y, h, side, change, largest, find_largest=True)
    epilogue(y, h, side, change, largest)


def backward(
    dy: Tensor, core: Tensor, C: Tensor, adapter_bias: Tensor | None, decay: Tensor | None,
    t: Tensor, saved: Tensor, alpha: float, norm: SMagNorm | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of y0, t, core and adapter_bias; None where ``needs`` is False."""
    t, saved = contiguous(t, saved)
    found = gradients(dy, columns(None, None, C), None, core.float(), adapter_bias, decay, t, saved,
                      alpha, norm, (needs[0] or needs[1], *needs[2:]))
    return (found.g if needs[0] else None,
            found.q[:, :core.shape[0]].contiguous() if needs[1] else None,
            core_gradient(found.v, t, alpha).to(core.dtype) if needs[2] else None,
            found.dadapter_bias.to(adapter_bias.dtype) if needs[3] else None)


def gradients(dy: Tensor, side: Tensor, rows: Tensor | None, core: Tensor,
              adapter_bias: Tensor | None, decay: Tensor | None, t: Tensor, saved: Tensor,
              alpha: float, norm: SMagNorm | None,
              needs: tuple[bool, bool, bool]) -> GateGradients:
    """From dY and the saved gate everything but dX and dcore; without a gate g is dY itself, and q
    is there whatever ``rows`` is. ``core``: float32; ``needs``: of x, core, adapter_bias."""
    if norm is None:
        v = dT = None
        if needs[0] or needs[1]:
            v, dT = down(dy, side, core.T, alpha, p_dtype=torch.float32)
        return GateGradients(dy, dT, v, dy.sum(0, dtype=torch.float32) if needs[2] else None)
    adapter_bias, decay = _vectors(adapter_bias, decay)
    more = {}
    if not norm.detach_gate:
        _, h = project(t, None, core, alpha, q_dtype=dy.dtype)
        more = dict(change=h @ side.T, adapter_bias=adapter_bias, ref_max=norm.ref == "max")
    return gate_backward(dy, saved, side, rows, core, alpha, GateNumbers.of(norm, dy.dtype),
                         decay=decay, needs=needs, **more)
