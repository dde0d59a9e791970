"""The core between C and R, from what is trained: products of r x r matrices, as one autograd node.

A layer's core takes up to five such products and as many again backward. On a GPU each costs the
host more than it costs the device; as nodes of their own they cost it twice as much.
"""

import torch
from torch import Tensor

from ..backends.reference import cabr_core, cabr_core_backward
from .registry import transformed


def folded_core(
    trained: tuple[Tensor, ...], fold_c: Tensor | None, fold_r: Tensor | None
) -> Tensor:
    """fold_c V fold_r (..., r, r) with V = U, or A^T B^T; V itself without folds.

    Args:
        trained: (U,) with U (..., r, r), or (A, B) with A (..., m, r) and B (..., r, m).
        fold_c, fold_r: (..., r, r), constants; or both None. What is computed is in the wider of
            their dtype and that of what is trained.
    """
    if len(trained) == 1 and fold_c is None:
        return trained[0]
    if transformed() or not torch.is_grad_enabled():
        return _core(trained, fold_c, fold_r)
    return _FoldedCore.apply(fold_c, fold_r, *trained)


def _core(trained: tuple[Tensor, ...], fold_c: Tensor | None, fold_r: Tensor | None) -> Tensor:
    core = trained[0] if len(trained) == 1 else cabr_core(*trained)
    if fold_c is None:
        return core
    wide = torch.promote_types(core.dtype, fold_c.dtype)
    return fold_c.to(wide) @ core.to(wide) @ fold_r.to(wide)


class _FoldedCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fold_c, fold_r, *trained):
        ctx.save_for_backward(fold_c, fold_r, *trained)
        return _core(trained, fold_c, fold_r)

    @staticmethod
    def backward(ctx, grad):
        fold_c, fold_r, *trained = ctx.saved_tensors
        if fold_c is not None:
            wide = grad.dtype
            grad = (fold_c.to(wide).mT @ (grad @ fold_r.to(wide).mT)).to(trained[0].dtype)
        found = (grad,) if len(trained) == 1 else cabr_core_backward(grad, *trained)
        return (None, None, *found)
