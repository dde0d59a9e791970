"""No gate, or S-MagNorm in the output domain: forward and explicit backward.

Order of the low-rank path, and no other: ``t = x R^T`` -> ``h = alpha t core^T`` ->
``delta = h C^T + adapter_bias``; delta_W is never formed. Saved for the backward pass: t (M, r)
and the gate; not x, because W is frozen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gate_code import saved_dtype
from ..smagnorm import SMagNorm
from .blocks import chosen_columns, chosen_rows, row_blocks, wide_dtype
from .gate import (
    apply_gate,
    decode,
    encode,
    gate_gradient,
    inverse_gate,
    relative_magnitude,
    split_gradient,
)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    core: Tensor,
    cols: Tensor | None,
    rows: Tensor | None,
    C: Tensor | None,
    R: Tensor | None,
    adapter_bias: Tensor | None,
    decay: Tensor | None,
    alpha: float,
    norm: SMagNorm | None,
    edge: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer.

    Args:
        x: (M, K); weight: (N, K); bias: (N,); all of one dtype. core: (r, r), any float dtype.
        cols, rows: (r,) while C and R are tied to W; else C (N, r) and R (r, K).
        adapter_bias, decay: (N,), any float dtype.
        edge: count the gate's values at or under it (importance decay); 0: do not.
        save: whether a backward pass will follow.

    Returns:
        y (M, N); t (M, r); what the backward pass needs of the gate (M, N): s, coded as in
        ``gate.encode``, or the base output b where the gate is not detached, or nothing (0,);
        the count (1,) int64, or nothing (0,).
    """
    wide = wide_dtype(x.dtype)
    # The base output is F.linear's to the bit, so that an untrained layer is the base layer.
    y = F.linear(x, weight, bias)
    if R is None and bias is None:
        t = y.index_select(1, rows)  # identity 1: t = x R^T is r columns of the base product
    else:
        t = x @ chosen_rows(weight, rows, R).T
    h = project(t, core, alpha)
    Ct = chosen_columns(weight, cols, C).T
    if norm is None:
        y.addmm_(h, Ct)
        if adapter_bias is not None:
            y += adapter_bias
        return y, t, y.new_empty(0), y.new_empty(0, dtype=torch.int64)

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
    dtype = saved_dtype(x.dtype) if norm.detach_gate else x.dtype
    saved = torch.empty_like(y, dtype=dtype) if save else y.new_empty(0, dtype=dtype)
    moved = y.new_zeros(1 if edge else 0, dtype=torch.int64)
    for block in blocks:
        b, d = base_and_change(block)
        s = inverse_gate(b, d, norm, largest)
        if edge:
            moved += (s >= 1 / edge).sum()
        if save:
            saved = _put(saved, block, encode(s, norm, x.dtype) if norm.detach_gate else b)
        y = _put(y, block, apply_gate(b, d, s, norm, decay))
    return y, t, saved, moved


def _put(whole: Tensor, block: slice, part: Tensor) -> Tensor:
    """``whole`` with ``part`` in its place; the part itself where it is all of it."""
    if part.shape == whole.shape:
        return part.to(whole.dtype)
    whole[block] = part
    return whole


def backward(
    dy: Tensor,
    weight: Tensor,
    core: Tensor,
    cols: Tensor | None,
    rows: Tensor | None,
    C: Tensor | None,
    R: Tensor | None,
    adapter_bias: Tensor | None,
    decay: Tensor | None,
    t: Tensor,
    saved: Tensor,
    alpha: float,
    norm: SMagNorm | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (M, K), core (r, r) and adapter_bias (N,); None where ``needs`` is False.

    With the gate's constant s, G = dy * s (s = beta = 1 without a gate) and v = G C::

        dx = beta G W + alpha (v core) R      dcore = alpha v^T t      dadapter_bias = sum of G

    Plain differentiable operations throughout, so that it can be differentiated again.
    """
    wide = wide_dtype(dy.dtype)
    C = chosen_columns(weight, cols, C)
    db, dd, scale = _gradients_of_base_and_change(
        dy, core, C, adapter_bias, decay, t, saved, alpha, norm)
    v = (dd @ C).to(wide) * scale
    dx = dcore = dbias = None
    if needs[1]:
        dcore = (alpha * (v.T @ t.to(wide))).to(core.dtype)
    if needs[2]:
        dbias = (dd.sum(0, dtype=wide) * scale).to(adapter_bias.dtype)
    if needs[0]:
        dT = (alpha * (v @ core.to(wide))).to(dy.dtype)
        if R is None:
            # Identity 3: both terms of dx are one product with W. In place where db is ours alone.
            ours = db is not dy and not torch.is_grad_enabled()
            dx = (db.index_add_ if ours else db.index_add)(1, rows, dT) @ weight
        else:
            dx = (db @ weight).addmm(dT, R)
    return dx, dcore, dbias


def _gradients_of_base_and_change(dy, core, C, adapter_bias, decay, t, saved, alpha, norm):
    """(M, N) gradients of b and d of out = (beta b + d) / g in dy's dtype; d's is to be multiplied
    by the number returned third. Without decay the two are proportional, and one matrix serves:
    b's, beta s dy, which is dy itself where nothing moved."""
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
        b, d = saved.to(wide), (project(t, core, alpha) @ C.T).to(wide)
        if adapter_bias is not None:
            d = d + adapter_bias
        largest = None
        if norm.ref == "max" and d.numel():
            largest = relative_magnitude(b, d, norm.eps).amax()
        s = inverse_gate(b, d, norm, largest)
        db, dd = split_gradient(grad, s, norm, decay)
        more_db, more_dd = gate_gradient(grad, b, d, s, norm, decay, largest)
        db, dd = db + more_db, dd + more_dd
    return db.to(dy.dtype), dd.to(dy.dtype), 1.0


def project(t: Tensor, core: Tensor, alpha: float) -> Tensor:
    """h = alpha t core^T (M, r) in t's dtype, computed wide: it costs M r^2 only."""
    wide = wide_dtype(t.dtype)
    return (alpha * (t.to(wide) @ core.to(wide).T)).to(t.dtype)


def backward_of_saved(dt: Tensor, weight: Tensor, rows: Tensor | None, R: Tensor | None) -> Tensor:
    """dx from a gradient of t itself, which only a second differentiation produces."""
    return dt @ chosen_rows(weight, rows, R)
