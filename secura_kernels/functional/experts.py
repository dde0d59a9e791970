"""The products of a mixture of experts: each row with the matrix of its own expert.

Rows are sorted by expert, so that an expert's rows lie together (``Routing``). A change of rank r
is then two small grouped products beside the base's own, and three in the backward pass, whatever
the number of experts; no change (E, N, K) is ever formed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPED = (torch.float32, torch.bfloat16, torch.float16)  # what torch's grouped_mm multiplies


@dataclass(frozen=True)
class Routing:
    """Which rows belong to which expert: S = tokens x k rows, sorted by expert.

    Attributes:
        experts: (S,) int64, the expert of each row, ascending.
        tokens: (S,) int64, the token that each row is of.
        order: (S,) int64, a row's place among the S choices before sorting.
        ends: (E,) int32, where each expert's rows end.
        k: how many experts a token has.
    """

    experts: Tensor
    tokens: Tensor
    order: Tensor
    ends: Tensor
    k: int

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> "Routing":
        """``chosen``: (tokens, k) int64, the experts of each token, each in [0, experts)."""
        k = chosen.shape[-1]
        sorted_experts, order = chosen.reshape(-1).sort(stable=True)
        return cls(sorted_experts, order // k, order, _ends(sorted_experts, experts), k)

    def only(self, kept: Tensor) -> "Routing":
        """Of some of the rows: (S,) bool."""
        experts = self.experts[kept]
        ends = _ends(experts, len(self.ends))
        return Routing(experts, self.tokens[kept], self.order[kept], ends, self.k)

    def back(self, rows: Tensor) -> Tensor:
        """Rows (S, ...) in the order of the choices again."""
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(place), device=place.device)
        return rows[place]


def _ends(sorted_experts: Tensor, experts: int) -> Tensor:
    every = torch.arange(experts, device=sorted_experts.device)
    return torch.searchsorted(sorted_experts, every, right=True).to(torch.int32)


def grouped_product(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Each group's rows with its own matrix: (S, K), (E, K, N) -> (S, N).

    torch's ``grouped_mm`` where it can: float32, bfloat16 and float16, on GPUs from compute
    capability 8.0, rows of whole 16 bytes. Elsewhere, as in float64, a product for each expert
    that has rows, for which the host waits for ``ends``.

    Args:
        ends: (E,) int32, where the groups end; the last one is S.
    """
    if _has_grouped_mm(x, *matrices.shape[1:]):
        return F.grouped_mm(x, matrices, offs=ends)
    parts, start = [x.new_zeros(0, matrices.shape[-1])], 0
    with torch.autocast(x.device.type, enabled=False):  # of which grouped_mm knows nothing either
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                parts.append(x[start:end] @ matrices[expert])
            start = end
    return torch.cat(parts)


def _has_grouped_mm(x: Tensor, *sizes: int) -> bool:
    """Whether torch's own can multiply rows of x and of such sizes."""
    whole = 16 // x.element_size()
    if x.dtype not in GROUPED or not len(x) or any(size % whole for size in sizes):
        return False
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0)


def frozen_product(
    x: Tensor, stack: Tensor, ends: Tensor, index: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """``grouped_product`` with matrices that are not trained: neither x nor what is gathered from
    ``stack`` is kept for the backward pass, which gathers again.

    Args:
        stack: (E, P, Q), frozen. index: (E, r): the rows of each matrix that are taken; None: all.
        transposed: multiply with the transposed matrices.
    """
    return _FrozenProduct.apply(x, stack, ends, index, transposed)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stack, ends, index, transposed):
        ctx.save_for_backward(stack, ends, index)
        ctx.transposed = transposed
        return _product(x, stack, ends, index, transposed)

    @staticmethod
    def backward(ctx, grad):
        stack, ends, index = ctx.saved_tensors
        grad = grad.contiguous()
        return _FrozenProduct.apply(grad, stack, ends, index, not ctx.transposed), *[None] * 4


def _product(
    x: Tensor, stack: Tensor, ends: Tensor, index: Tensor | None, transposed: bool
) -> Tensor:
    if index is not None and len(x) <= len(stack):  # one token: most experts have no row
        experts = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)
        own = stack[experts[:, None], index[experts]]  # (S, r, Q)
        with torch.autocast(x.device.type, enabled=False):
            return (x[:, None] @ (own.mT if transposed else own))[:, 0]
    matrices = stack if index is None else rows_of(stack, index)
    return grouped_product(x, matrices.mT if transposed else matrices, ends)


def rows_of(stack: Tensor, index: Tensor) -> Tensor:
    """(E, P, Q), (E, r) -> (E, r, Q): some rows of each matrix."""
    return stack[torch.arange(len(stack), device=stack.device)[:, None], index]


def cur_experts(
    x: Tensor, weight: Tensor, core: Tensor, cols: Tensor, rows: Tensor, routing: Routing
) -> Tensor:
    """(S, K) -> (S, N): x W^T + x R^T core^T C^T with each row's own expert's W, core, C and R.

    C and R are columns and rows of W, so that the change joins the operands of the base's own
    products, forwards and backwards, and each of the two is rounded once::

        y  = (x + scatter_J(h)) W^T       t = x R^T     h  = t core^T
        dx = (dy + scatter_I(dt)) W       v = dy C      dt = v core      dcore = v^T t

    Kept for the backward pass: t (S, r). Second derivatives are possible.

    Args:
        weight: (E, N, K), frozen, of x's dtype. core: (E, r, r), in which alpha is; used in x's
            dtype. cols, rows: (E, r) int64, J and I.
    """
    core = core.to(x.dtype)
    return _CurExperts.apply(x, weight, core, cols, rows, routing.experts, routing.ends)[0]


class _CurExperts(torch.autograd.Function):
    """y, and t: an output for the sake of second derivatives, since dcore is a function of it."""

    @staticmethod
    def forward(ctx, x, weight, core, cols, rows, experts, ends):
        t = _product(x, weight, ends, rows, transposed=True)
        h = grouped_product(t, core.mT, ends)
        ctx.save_for_backward(t, weight, core, cols, rows, experts, ends)
        ctx.set_materialize_grads(False)
        return grouped_product(x.scatter_add(1, cols[experts], h), weight.mT, ends), t

    @staticmethod
    def backward(ctx, dy, dt):
        t, weight, core, cols, rows, experts, ends = ctx.saved_tensors
        dx = dcore = None
        if dy is not None:
            dy = dy.contiguous()
            v = frozen_product(dy, weight.mT, ends, cols, transposed=True)
            if ctx.needs_input_grad[0]:
                through_core = grouped_product(v, core, ends)
                dt = through_core if dt is None else dt + through_core
            if ctx.needs_input_grad[2]:
                dcore = grouped_outer_product(v, t, ends)
        if ctx.needs_input_grad[0] and dt is not None:
            dy = dt.new_zeros(len(dt), weight.shape[1]) if dy is None else dy
            dx = frozen_product(dy.scatter_add(1, rows[experts], dt), weight, ends)
        return dx, None, dcore, None, None, None, None


def grouped_outer_product(v: Tensor, t: Tensor, ends: Tensor) -> Tensor:
    """v^T t of each group's rows: (S, p), (S, q) -> (E, p, q), zero for a group without rows."""
    if _has_grouped_mm(v, v.shape[1], t.shape[1]):
        return F.grouped_mm(v.mT, t, offs=ends)
    parts, start = [], 0
    with torch.autocast(v.device.type, enabled=False):
        for end in ends.tolist():
            parts.append(v[start:end].mT @ t[start:end])
            start = end
    return torch.stack(parts)
