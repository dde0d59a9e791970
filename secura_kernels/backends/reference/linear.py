"""No gate, or S-MagNorm in the output domain: forward and explicit backward.

Order of the low-rank path, and no other: ``t = x R^T`` -> ``h = alpha t core^T`` ->
``delta = h C^T + adapter_bias``; delta_W is never formed. Saved for the backward pass: t (M, r)
and the gate; not x, because W is frozen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operands import CurOperands
from . import epilogue


def forward(
    x: Tensor, layer: CurOperands, edge: float, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer.

    Args:
        x: (M, K), of W's dtype.
        edge: count the gate's values at or under it (importance decay); 0: do not.
        save: whether a backward pass will follow.

    Returns:
        y (M, N); t (M, r); and what ``epilogue.apply_change`` returns beside y.
    """
    # The base output is F.linear's to the bit, so that an untrained layer is the base layer.
    y = F.linear(x, layer.weight, layer.bias)
    if layer.R is None and layer.bias is None:
        t = y.index_select(1, layer.rows)  # identity 1: t = x R^T is r columns of the base product
    else:
        t = x @ layer.whole_R().T
    y, saved, moved = epilogue.apply_change(y, t, layer, edge, save)
    return y, t, saved, moved


def backward(
    dy: Tensor,
    layer: CurOperands,
    t: Tensor,
    saved: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (M, K), core (r, r) and adapter_bias (N,); None where ``needs`` is False.

    With the gate's constant s, G = dy * s (s = beta = 1 without a gate) and v = G C::

        dx = beta G W + alpha (v core) R      dcore = alpha v^T t      dadapter_bias = sum of G

    With a task gate: see ``epilogue.backward``.

    Plain differentiable operations throughout, so that it can be differentiated again.
    """
    db, dT, dcore, dbias = epilogue.backward(dy, layer, t, saved, (needs[0], *needs))
    dx = None
    if needs[0]:
        in_place = not torch.is_grad_enabled()
        if layer.R is None:
            # Identity 3: both terms of dx are one product with W. db may be dy, which is not ours.
            ours = in_place and db is not dy
            dx = (db.index_add_ if ours else db.index_add)(1, layer.rows, dT) @ layer.weight
        else:
            dx = db @ layer.weight
            dx = (dx.addmm_ if in_place else dx.addmm)(dT, layer.R)
    return dx, dcore, dbias


def backward_of_saved(dt: Tensor, layer: CurOperands) -> Tensor:
    """dx from a gradient of t itself, which only a second differentiation produces."""
    return dt @ layer.whole_R()
