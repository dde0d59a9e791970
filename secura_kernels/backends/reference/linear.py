"""No gate, or S-MagNorm in the output domain: forward and explicit backward.

Order of the low-rank path, and no other: ``t = x R^T`` -> ``h = alpha t core^T`` ->
``delta = h C^T + adapter_bias``; delta_W is never formed. Saved for the backward pass: t (M, r)
and the gate; not x, because W is frozen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...settings import SMagNorm
from . import epilogue
from .blocks import chosen_columns, chosen_rows


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
    # The base output is F.linear's to the bit, so that an untrained layer is the base layer.
    y = F.linear(x, weight, bias)
    if R is None and bias is None:
        t = y.index_select(1, rows)  # identity 1: t = x R^T is r columns of the base product
    else:
        t = x @ chosen_rows(weight, rows, R).T
    y, saved, moved = epilogue.apply_change(y, t, core, chosen_columns(weight, cols, C), adapter_bias,
                                    decay, alpha, norm, edge, save)
    return y, t, saved, moved


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
    db, dT, dcore, dbias = epilogue.backward(
        dy, core, chosen_columns(weight, cols, C), adapter_bias, decay, t, saved, alpha, norm,
        (needs[0], *needs))
    dx = None
    if needs[0]:
        if R is None:
            # Identity 3: both terms of dx are one product with W. In place where db is ours alone.
            ours = db is not dy and not torch.is_grad_enabled()
            dx = (db.index_add_ if ours else db.index_add)(1, rows, dT) @ weight
        else:
            dx = (db @ weight).addmm(dT, R)
    return dx, dcore, dbias


def backward_of_saved(dt: Tensor, weight: Tensor, rows: Tensor | None, R: Tensor | None) -> Tensor:
    """dx from a gradient of t itself, which only a second differentiation produces."""
    return dt @ chosen_rows(weight, rows, R)
