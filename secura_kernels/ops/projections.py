"""The input's gradient of layers that share their input: one product in the place of several.

Forwards each layer runs as it does alone. What it gives backwards is not dx but the gradients of
its base output and of t, which ``SharedInput`` collects: the layers take *tickets* in the place of
x, tensors without memory that stand in the graph for x W^T and x R^T.
"""

import torch
from torch import Tensor

from .epilogue import CurEpilogue
from .linear import cur_linear_fwd
from .registry import call


class SharedInput(torch.autograd.Function):
    """x -> a ticket (M, N_i) and one (M, r_i) of each layer: y tickets, then t tickets.

    Backwards they bring G_i, the gradient of layer i's base output, and dT_i, that of its t. By
    identity 3 (``reference.linear``) with W the layers' weights one under another::

        dx = (G_1 with dT_1 added at rows_1 | G_2 with dT_2 added at rows_2 | ...) W

    Where R is no slice of W: dx += dT_i R_i.

    Args:
        x: (..., K). weight: W (sum of N_i, K). dtype: of the layers' outputs, autocast's or x's.
        sizes, ranks: N_i and r_i. sides: of each layer rows (r_i,) int64, or R (r_i, K).
    """

    @staticmethod
    def forward(ctx, x, weight, dtype, sizes, ranks, *sides):
        ctx.shape, ctx.dtype, ctx.sizes = x.shape, x.dtype, sizes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, *sides)
        M = x.shape[:-1].numel()
        where = dict(dtype=dtype, device=x.device)
        return tuple(torch.empty_strided((M, n), (0, 0), **where) for n in (*sizes, *ranks))

    @staticmethod
    def backward(ctx, *gradients):
        weight, *sides = ctx.saved_tensors
        none = (None,) * (4 + len(sides))
        n = len(ctx.sizes)
        there = [i for i in range(n) if gradients[i] is not None]
        if not there:
            return None, *none
        G, dT = gradients[:n], gradients[n:]
        if len(there) < n:  # the others' outputs were not used
            blocks = weight.split(ctx.sizes)
            weight = torch.cat([blocks[i] for i in there])
        G = _side_by_side([(G[i], dT[i] if sides[i].ndim == 1 else None, sides[i]) for i in there])
        dx = G @ weight.to(G.dtype)
        for i in there:
            if sides[i].ndim == 2 and dT[i] is not None:
                add = dx.addmm if torch.is_grad_enabled() else dx.addmm_
                dx = add(dT[i], sides[i].to(dx.dtype))
        return dx.to(ctx.dtype).view(ctx.shape), *none


def _side_by_side(parts: list[tuple[Tensor, Tensor | None, Tensor]]) -> Tensor:
    """(M, sum of N_i): the G, with dT added at the columns ``rows``."""
    if torch.is_grad_enabled():  # to be differentiated again
        return torch.cat([G if dT is None else G.index_add(1, at, dT) for G, dT, at in parts], 1)
    whole = torch.cat([G for G, _, _ in parts], 1)
    blocks = whole.split([G.shape[1] for G, _, _ in parts], 1)
    for (_, dT, rows), block in zip(parts, blocks, strict=True):
        if dT is not None:
            block.index_add_(1, rows, dT)
    return whole


class CurLinearByTicket(torch.autograd.Function):
    """``CurLinear`` of a layer with tickets: the same forward pass, and gradients of the tickets,
    core and adapter_bias, which are those of an epilogue over the base output. x is a constant.
    The arguments begin as those of ``CurEpilogue``, whose backward pass reads them."""

    @staticmethod
    def forward(
        ctx, y_ticket, t_ticket, core, C, adapter_bias, decay, task_gate, x, layer, *settings
    ):
        ctx.alpha, ctx.norm, ctx.detach_gate, edge, ctx.impl = settings
        y, t, saved, moved = call(
            cur_linear_fwd,
            x,
            *layer,
            task_gate,
            ctx.alpha,
            ctx.norm,
            ctx.detach_gate,
            edge,
            True,
            ctx.impl,
        )
        if ctx.detach_gate:
            ctx.mark_non_differentiable(saved, moved)
        else:
            ctx.mark_non_differentiable(moved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(core, C, adapter_bias, decay, task_gate, t, saved)
        return y, t, saved, moved

    @staticmethod
    def backward(ctx, dy, dt, dsaved, _):
        dy0, dt0, *others = CurEpilogue.backward(ctx, dy)[:5]
        # Only a second differentiation brings gradients of what was saved.
        dt0 = dt if dt0 is None else dt0 if dt is None else dt0 + dt
        dy0 = dsaved if dy0 is None else dy0 if dsaved is None else dy0 + dsaved
        return dy0, dt0, *others, *[None] * 9
