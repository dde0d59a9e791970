"""The change of a base output on the kernels: the two functions of ``reference.epilogue``.

The output-domain layer is made of the others: ``outputs``, ``apply_change`` and ``gradients``.
``columns(reads=)`` returns C, copied out of W where it is read more than twice.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...settings import SMagNorm
from ..host import GateNumbers, cdiv, contiguous, padded_rank, saved_for_backward
from .launch import addressable
from .passes import factors
from .passes.core_gradient import core_gradient
from .passes.down import down, project
from .passes.epilogue import epilogue
from .passes.factors import Factor
from .passes.gate_backward import gate_backward
from .tiles import tile_for


def forward(
    y0: Tensor, t: Tensor, core: Tensor, C: Tensor, adapter_bias: Tensor | None,
    decay: Tensor | None, alpha: float, norm: SMagNorm | None, edge: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, what the backward pass needs of the gate, and the count of gates <= ``edge``."""
    t, adapter_bias, decay = contiguous(t, adapter_bias, decay)
    saved, moved, change = outputs(t, y0.shape[1], adapter_bias, decay, norm, edge, save)
    y = y0.clone(memory_format=torch.contiguous_format)  # the epilogue works in place
    _, h = project(t, None, core, alpha, q_dtype=t.dtype)
    apply_change(y, h, partial(factors.columns, None, None, C), core.shape[0], norm, change)
    return y, saved, moved


def outputs(like: Tensor, N: int, adapter_bias: Tensor | None, decay: Tensor | None,
            norm: SMagNorm | None, edge: float, save: bool) -> tuple[Tensor, Tensor, dict]:
    """What the backward pass needs of the gate and the count, allocated; and the arguments by which
    a pass fills them. ``like``: (M, any), in the layer's dtype."""
    saved, keep, save_base = saved_for_backward(like, N, norm, save)
    counting = bool(edge) and norm is not None
    moved = like.new_zeros(1, dtype=torch.int64) if counting \
        else like.new_empty(0, dtype=torch.int64)
    return saved, moved, dict(
        adapter_bias=adapter_bias, decay=decay,
        gate=None if norm is None else GateNumbers.of(norm, like.dtype), saved=keep,
        save_base=save_base, moved=moved if counting else None, edge=edge)


def apply_change(y: Tensor, h: Tensor, columns: Callable[..., Factor], r: int, norm: SMagNorm | None,
           change: dict) -> None:
    """Turns y (M, N), the base output, into the layer's; ``change``: from ``outputs``."""
    M, N = y.shape
    factor = columns(reads=cdiv(M, tile_for("epilogue", y, M, N, r).m))
    if norm is not None and norm.ref == "max":
        change["largest"] = _largest(y, h, factor, r, change["adapter_bias"], change["gate"])
    epilogue(y, h, factor, r, **change)


def _largest(b: Tensor, h: Tensor, factor: Factor, r: int, adapter_bias: Tensor | None,
             gate: GateNumbers) -> Tensor:
    """(1,) int32: the bits of max(rho)."""
    largest = b.new_zeros(1, dtype=torch.int32)
    epilogue(b, h, factor, r, adapter_bias=adapter_bias, gate=gate, largest=largest,
             find_largest=True)
    return largest


def backward(
    dy: Tensor, core: Tensor, C: Tensor, adapter_bias: Tensor | None, decay: Tensor | None,
    t: Tensor, saved: Tensor, alpha: float, norm: SMagNorm | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of y0, t, core and adapter_bias; None where ``needs`` is False."""
    dy, r = addressable(dy), core.shape[0]
    adapter_bias, decay, t, saved = contiguous(adapter_bias, decay, t, saved)
    found = gradients(dy, partial(factors.columns, None, None, C), None, core, adapter_bias, decay,
                      t, saved, alpha, norm, (needs[0] or needs[1], *needs[2:]))
    return (found.g if needs[0] else None,
            found.q[:, :r].contiguous() if needs[1] else None, found.dcore,
            found.dadapter_bias.to(adapter_bias.dtype) if needs[3] else None)


class Gradients(NamedTuple):
    """``g``: G' (M, N) with dT already in it, or db where R is stored and ``q``, dT (M, padded r),
    is still to be added as dT R. None for what was not asked for."""

    g: Tensor | None
    q: Tensor | None
    dcore: Tensor | None
    dadapter_bias: Tensor | None


def gradients(dy: Tensor, columns: Callable[..., Factor], rows: Tensor | None, core: Tensor,
              adapter_bias: Tensor | None, decay: Tensor | None, t: Tensor, saved: Tensor,
              alpha: float, norm: SMagNorm | None,
              needs: tuple[bool, bool, bool]) -> Gradients:
    """From dY and the saved gate everything but dX; without a gate g is dY itself, and q is there
    whatever ``rows`` is. ``needs``: of x, core, adapter_bias."""
    M, N = dy.shape
    r = core.shape[0]
    if norm is None:
        dT = dcore = None
        if needs[0] or needs[1]:
            factor = columns(reads=cdiv(M, tile_for("down", dy, M, N, r).m))
            v, dT = down(dy, factor, core, alpha, p_dtype=torch.float32, transpose_core=True)
            dcore = core_gradient(v, t, core, alpha, dy) if needs[1] else None
        return Gradients(dy, dT, dcore, dy.sum(0, dtype=torch.float32) if needs[2] else None)
    gate = GateNumbers.of(norm, dy.dtype)
    more = {}
    if not norm.detach_gate:
        _, h = project(t, None, core, alpha, q_dtype=dy.dtype)
        more = dict(h=h, adapter_bias=adapter_bias)
        if norm.ref == "max":
            factor = columns(reads=cdiv(M, tile_for("epilogue", dy, M, N, r).m))
            more["largest"] = _largest(saved, h, factor, r, adapter_bias, gate)
    tile = tile_for("gate_backward" if norm.detach_gate else "gate_backward_full", dy, M, N, r)
    g, v, dadapter_bias = gate_backward(dy, saved, columns(reads=cdiv(M, tile.m)), r, gate,
                                        decay=decay, needs=needs, **more)
    q = dcore = None
    if v is not None:
        if g is not None and rows is None:
            q = dy.new_empty(M, padded_rank(r))
        dcore = core_gradient(v, t if needs[1] else None, core, alpha, dy,
                              g=g if rows is not None else None, rows=rows, q=q)
    return Gradients(g, q, dcore, dadapter_bias)
