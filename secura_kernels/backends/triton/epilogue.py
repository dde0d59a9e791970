"""The change of a base output on the kernels: the two functions of ``reference.epilogue``.

The output-domain layer is made of the others: ``outputs``, ``apply_change`` and ``gradients``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...settings import SMagNorm
from ..host import GateNumbers, cdiv, padded_rank, saved_for_backward
from ..operands import CurOperands
from .launch import addressable
from .passes import factors
from .passes.core_gradient import core_gradient
from .passes.down import down, project
from .passes.epilogue import epilogue
from .passes.gate_backward import gate_backward
from .tiles import tile_for


def forward(
    y0: Tensor, t: Tensor, layer: CurOperands, edge: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, what the backward pass needs of the gate, and the count of gates <= ``edge``."""
    t, layer = t.contiguous(), layer.with_contiguous_vectors()
    saved, moved, change = outputs(t, y0.shape[1], layer, edge, save)
    y = y0.clone(memory_format=torch.contiguous_format)  # the epilogue works in place
    _, h = project(t, None, layer.core, layer.alpha, q_dtype=t.dtype)
    apply_change(y, h, layer, change)
    return y, saved, moved


def outputs(
    like: Tensor, N: int, layer: CurOperands, edge: float, save: bool
) -> tuple[Tensor, Tensor, dict]:
    """What the backward pass needs of the gate and the count, allocated; and the arguments by which
    a pass fills them. ``like``: (M, any), in the layer's dtype."""
    norm = layer.norm
    saved, keep = saved_for_backward(like, N, norm, save)
    counting = bool(edge) and norm is not None
    moved = (
        like.new_zeros(1, dtype=torch.int64) if counting else like.new_empty(0, dtype=torch.int64)
    )
    return (
        saved,
        moved,
        dict(
            adapter_bias=layer.adapter_bias,
            decay=layer.decay,
            gate=None if norm is None else GateNumbers.of(norm, like.dtype),
            saved=keep,
            moved=moved if counting else None,
            edge=edge,
        ),
    )


def apply_change(y: Tensor, h: Tensor, layer: CurOperands, change: dict) -> None:
    """Turns y (M, N), the base output, into the layer's; ``change``: from ``outputs``."""
    M, N = y.shape
    C = factors.columns(layer, reads=cdiv(M, tile_for("epilogue", y, M, N, layer.r).m))
    if layer.norm is not None and layer.norm.ref == "max":
        change["largest"] = y.new_zeros(1, dtype=torch.int32)
        find = {name: change[name] for name in ("adapter_bias", "gate", "largest")}
        epilogue(y, h, C, layer.r, **find, find_largest=True)
    epilogue(y, h, C, layer.r, **change)


def backward(
    dy: Tensor,
    layer: CurOperands,
    t: Tensor,
    saved: Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of y0, t, core and adapter_bias; None where ``needs`` is False."""
    dy, layer = addressable(dy), layer.with_contiguous_vectors()
    found = gradients(
        dy, layer, None, t.contiguous(), saved.contiguous(), (needs[0] or needs[1], *needs[2:])
    )
    return (
        found.g if needs[0] else None,
        found.q[:, : layer.r].contiguous() if needs[1] else None,
        found.dcore,
        found.dadapter_bias,
    )


class Gradients(NamedTuple):
    """``g``: G' (M, N) with dT already in it, or db where R is stored and ``q``, dT (M, padded r),
    is still to be added as dT R. None for what was not asked for."""

    g: Tensor | None
    q: Tensor | None
    dcore: Tensor | None
    dadapter_bias: Tensor | None


def gradients(
    dy: Tensor,
    layer: CurOperands,
    rows: Tensor | None,
    t: Tensor,
    saved: Tensor,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """From dY and the saved gate everything but dX; without a gate g is dY itself, and q is there
    whatever ``rows`` is.

    Args:
        rows: (r,) where R is W[rows]; None where it is stored. needs: of x, core, adapter_bias.
    """
    found = (
        _gated(dy, layer, layer.norm, rows, t, saved, needs)
        if layer.norm is not None
        else _ungated(dy, layer, t, needs)
    )
    if not needs[2]:
        return found._replace(dadapter_bias=None)
    return found._replace(dadapter_bias=found.dadapter_bias.to(layer.adapter_bias.dtype))


def _ungated(
    dy: Tensor, layer: CurOperands, t: Tensor, needs: tuple[bool, bool, bool]
) -> Gradients:
    (M, N), core = dy.shape, layer.core
    dT = dcore = None
    if needs[0] or needs[1]:
        C = factors.columns(layer, reads=cdiv(M, tile_for("down", dy, M, N, layer.r).m))
        v, dT = down(dy, C, core, layer.alpha, p_dtype=torch.float32, transpose_core=True)
        dcore = core_gradient(v, t, core, layer.alpha, dy) if needs[1] else None
    return Gradients(dy, dT, dcore, dy.sum(0, dtype=torch.float32) if needs[2] else None)


def _gated(
    dy: Tensor,
    layer: CurOperands,
    norm: SMagNorm,
    rows: Tensor | None,
    t: Tensor,
    saved: Tensor,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    (M, N), r, core = dy.shape, layer.r, layer.core
    tile = tile_for("gate_backward", dy, M, N, r)
    g, v, dadapter_bias = gate_backward(
        dy,
        saved,
        factors.columns(layer, reads=cdiv(M, tile.m)),
        r,
        GateNumbers.of(norm, dy.dtype),
        decay=layer.decay,
        needs=needs,
    )
    q = dcore = None
    if v is not None:
        if g is not None and rows is None:
            q = dy.new_empty(M, padded_rank(r))
        dcore = core_gradient(
            v,
            t if needs[1] else None,
            core,
            layer.alpha,
            dy,
            g=g if rows is not None else None,
            rows=rows,
            q=q,
        )
    return Gradients(g, q, dcore, dadapter_bias)
