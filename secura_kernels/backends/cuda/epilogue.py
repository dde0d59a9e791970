"""The change of a base output on the CUDA kernels: the two functions of ``reference.epilogue``.

The output-domain layer is made of the others: ``outputs``, ``apply_change`` and ``gradients``.
"""

import torch
from torch import Tensor

from ...settings import SMagNorm
from ..host import GateNumbers, contiguous, saved_for_backward
from ..operands import CurOperands
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
    y0: Tensor, t: Tensor, layer: CurOperands, edge: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, what the backward pass needs of the gate, and the count of gates <= ``edge``."""
    saved, moved, change = outputs(t, y0.shape[1], layer, edge, save)
    y = y0.clone(memory_format=torch.contiguous_format)  # the epilogue works in place
    _, h = project(t.contiguous(), None, layer.core.float(), layer.alpha, q_dtype=t.dtype)
    apply_change(y, h, columns(layer), layer.norm, change)
    return y, saved, moved


def outputs(
    like: Tensor, N: int, layer: CurOperands, edge: float, save: bool
) -> tuple[Tensor, Tensor, Finish]:
    """What the backward pass needs of the gate and the count, allocated; and what fills them.
    ``like``: (M, any), in the layer's dtype."""
    norm = layer.norm
    saved, keep = saved_for_backward(like, N, norm, save)
    moved = like.new_zeros(1 if edge and norm is not None else 0, dtype=torch.int64)
    gate = None if norm is None else GateNumbers.of(norm, like.dtype)
    return (
        saved,
        moved,
        Finish(*_vectors(layer), gate, keep, moved if moved.numel() else None, edge),
    )


def _vectors(layer: CurOperands) -> tuple[Tensor | None, ...]:
    """adapter_bias and decay as the passes take them."""
    return contiguous(
        *(None if v is None else v.float() for v in (layer.adapter_bias, layer.decay))
    )


def apply_change(y: Tensor, h: Tensor, C: Tensor, norm: SMagNorm | None, change: Finish) -> None:
    """Turns y (M, N), the base output, into the layer's."""
    largest = None
    if norm is not None and norm.ref == "max":
        largest = y.new_zeros(1, dtype=torch.int32)
        epilogue(y, h, C, change, largest, find_largest=True)
    epilogue(y, h, C, change, largest)


def backward(
    dy: Tensor,
    layer: CurOperands,
    t: Tensor,
    saved: Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of y0, t, core and adapter_bias; None where ``needs`` is False."""
    t = t.contiguous()
    found = gradients(dy, layer, None, saved.contiguous(), (needs[0] or needs[1], *needs[2:]))
    return (
        found.g if needs[0] else None,
        found.q[:, : layer.r].contiguous() if needs[1] else None,
        core_gradient(found.v, t, layer.alpha).to(layer.core.dtype) if needs[2] else None,
        found.dadapter_bias.to(layer.adapter_bias.dtype) if needs[3] else None,
    )


def gradients(
    dy: Tensor,
    layer: CurOperands,
    rows: Tensor | None,
    saved: Tensor,
    needs: tuple[bool, bool, bool],
) -> GateGradients:
    """From dY and the saved gate everything but dX and dcore; without a gate g is dY itself, and q
    is there whatever ``rows`` is.

    Args:
        rows: (r,) where R is W[rows]; None where it is stored. needs: of x, core, adapter_bias.
    """
    norm, core, alpha, C = layer.norm, layer.core.float(), layer.alpha, columns(layer)
    if norm is None:
        v = dT = None
        if needs[0] or needs[1]:
            v, dT = down(dy, C, core.T, alpha, p_dtype=torch.float32)
        return GateGradients(dy, dT, v, dy.sum(0, dtype=torch.float32) if needs[2] else None)
    return gate_backward(
        dy,
        saved,
        C,
        rows,
        core,
        alpha,
        GateNumbers.of(norm, dy.dtype),
        decay=_vectors(layer)[1],
        needs=needs,
    )
