"""The change of a base output y0 that somebody else computed: forward and explicit backward.

``delta = h C^T + adapter_bias`` with ``h = alpha t core^T``; y = y0 + delta, or S-MagNorm(y0,
delta). The output-domain layer is a base product, t, and this.
"""

import torch
from torch import Tensor

from ..gate_code import saved_dtype
from ..operands import CurOperands
from .blocks import row_blocks, wide_dtype
from .gate import (
    apply_gate,
    decode,
    encode,
    gate_gradient,
    inverse_gate,
    relative_magnitude,
    split_gradient,
)
from .task_gate import gradient_of_t, openness


def forward(
    y0: Tensor, t: Tensor, layer: CurOperands, edge: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y0 (M, N) is left as it is; otherwise ``apply_change``."""
    y = y0.clone(memory_format=torch.contiguous_format)
    return apply_change(y, t, layer, edge, save)


def apply_change(
    y: Tensor, t: Tensor, layer: CurOperands, edge: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Turns a base output into the layer's.

    Args:
        y: (M, N), contiguous; it is written over, or becomes one of the results.
        t: (M, r), x R^T, of y's dtype. layer: its W, bias and R are not read where C is stored.
        edge: count the gate's values at or under it (importance decay); 0: do not.
        save: whether a backward pass will follow.

    Returns:
        y (M, N); what the backward pass needs of the gate (M, N): s, coded as in ``gate.encode``,
        or the base output b where the gate is not detached, or nothing (0,); the count (1,) int64,
        or nothing (0,).
    """
    adapter_bias, norm = layer.adapter_bias, layer.norm
    wide = wide_dtype(y.dtype)
    h, Ct = project(t, layer), layer.whole_C().T
    if norm is None:
        if adapter_bias is not None:  # as one rank more: y is rounded once
            h = torch.cat([h, h.new_ones(h.shape[0], 1)], 1)
            Ct = torch.cat([Ct, adapter_bias.to(y.dtype)[None]])
        y.addmm_(h, Ct)
        return y, y.new_empty(0), y.new_empty(0, dtype=torch.int64)

    def base_and_change(block: slice) -> tuple[Tensor, Tensor]:
        b, d = y[block].to(wide), (h[block] @ Ct).to(wide)
        return b, d if adapter_bias is None else d + adapter_bias

    blocks = list(row_blocks(*y.shape))
    largest = None
    if norm.ref == "max":
        largest = y.new_zeros((), dtype=wide)
        for block in blocks:
            b, d = base_and_change(block)
            largest = torch.maximum(largest, relative_magnitude(b, d, norm.eps).amax())
    dtype = saved_dtype(y.dtype) if norm.detach_gate else y.dtype
    saved = torch.empty_like(y, dtype=dtype) if save else y.new_empty(0, dtype=dtype)
    moved = y.new_zeros(1 if edge else 0, dtype=torch.int64)
    for block in blocks:
        b, d = base_and_change(block)
        s = inverse_gate(b, d, norm, largest)
        if edge:
            moved += (s >= 1 / edge).sum()
        if save:
            saved = _put(saved, block, encode(s, norm, t.dtype) if norm.detach_gate else b)
        y = _put(y, block, apply_gate(b, d, s, norm, layer.decay))
    return y, saved, moved


def _put(whole: Tensor, block: slice, part: Tensor) -> Tensor:
    """``whole`` with ``part`` in its place; the part itself where it is all of it."""
    if part.shape == whole.shape:
        return part.to(whole.dtype)
    whole[block] = part
    return whole


def backward(
    dy: Tensor,
    layer: CurOperands,
    t: Tensor,
    saved: Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of y0 (M, N), t (M, r), core (r, r) and adapter_bias (N,); None where ``needs`` is
    False. ``saved``: s coded, or the base output y0 itself where the gate is not detached.

    With the gate's constant s, G = dy * s (s = beta = 1 without a gate) and v = G C::

        dy0 = beta G      dt = alpha v core      dcore = alpha v^T t      dadapter_bias = sum of G

    With a task gate v is that times the gate, and dt has what comes through the gate too.

    Plain differentiable operations throughout, so that it can be differentiated again. Without a
    gate dy0 is dy itself.
    """
    wide = wide_dtype(dy.dtype)
    db, dd, scale = _gradients_of_base_and_change(dy, layer, t, saved)
    dt = dcore = dbias = None
    if needs[1] or needs[2]:
        v = (dd @ layer.whole_C()).to(wide) * scale
        if layer.task_gate is not None:
            s = openness(t, layer.task_gate)
            v = v * s
    if needs[1]:
        dt = layer.alpha * (v @ layer.core.to(wide))
        if layer.task_gate is not None:
            dt = gradient_of_t(dt, t, s, layer.task_gate)
        dt = dt.to(dy.dtype)
    if needs[2]:
        dcore = (layer.alpha * (v.T @ t.to(wide))).to(layer.core.dtype)
    if needs[3]:
        dbias = (dd.sum(0, dtype=wide) * scale).to(layer.adapter_bias.dtype)
    return db if needs[0] else None, dt, dcore, dbias


def _gradients_of_base_and_change(
    dy: Tensor, layer: CurOperands, t: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor, float]:
    """(M, N) gradients of b and d of out = (beta b + d) / g in dy's dtype; d's is to be multiplied
    by the number returned third. Without decay the two are proportional, and one matrix serves:
    b's, beta s dy, which is dy itself where nothing moved."""
    norm, decay = layer.norm, layer.decay
    if norm is None:
        return dy, dy, 1.0
    wide = wide_dtype(dy.dtype)
    grad = dy.to(wide)
    if norm.detach_gate:
        s = decode(saved, norm, wide)
        if decay is None:
            db = (grad * s).mul_(norm.base_weight).to(dy.dtype)
            return db, db, 1 / norm.base_weight
        db, dd = split_gradient(grad, s, norm, decay)
    else:
        b, d = saved.to(wide), (project(t, layer) @ layer.whole_C().T).to(wide)
        if layer.adapter_bias is not None:
            d = d + layer.adapter_bias
        largest = None
        if norm.ref == "max":
            rho = relative_magnitude(b, d, norm.eps)
            largest = rho.amax() if rho.numel() else rho.new_zeros(())
        s = inverse_gate(b, d, norm, largest)
        db, dd = split_gradient(grad, s, norm, decay)
        more_db, more_dd = gate_gradient(grad, b, d, s, norm, decay, largest)
        db, dd = db + more_db, dd + more_dd
    return db.to(dy.dtype), dd.to(dy.dtype), 1.0


def project(t: Tensor, layer: CurOperands) -> Tensor:
    """h = alpha t core^T (M, r) in t's dtype, times the task gate; computed wide: it costs M r^2
    only."""
    wide = wide_dtype(t.dtype)
    h = layer.alpha * (t.to(wide) @ layer.core.to(wide).T)
    return (h if layer.task_gate is None else h * openness(t, layer.task_gate)).to(t.dtype)
