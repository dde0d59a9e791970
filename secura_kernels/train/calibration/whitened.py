"""The whitened basis: the moments of t = x R^T and v = g C, r x r, and the folds that they give."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...bases import inverse_root, orthonormal_basis, orthonormal_folds
from ...nn.adapter import Adapter


class Moments:
    """Sums of t^T t and v^T v (r, r), float64, over tokens."""

    def __init__(
        self, module: nn.Module, adapter: Adapter, chosen: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """chosen: cols and rows, in the place of the adapter's own."""
        self.module, self.adapter, self.chosen = module, adapter, chosen
        shape = dict(dtype=torch.float64, device=adapter.cols.device)
        self.t, self.v = (torch.zeros(adapter.r, adapter.r, **shape) for _ in range(2))
        self.tokens = torch.zeros((), **shape)

    @property
    def sums(self) -> list[Tensor]:
        return [self.t, self.v, self.tokens]

    def keep(self, x: Tensor) -> tuple[Tensor, Tensor]:
        C, R = self._sides()
        return F.linear(x, R.to(x.dtype)), C

    def add(self, t: Tensor, C: Tensor, g: Tensor) -> None:
        v = (g @ C.to(g.dtype)).double()
        self.t += t.double().mT @ t.double()
        self.v += v.mT @ v
        self.tokens += len(t)

    def finite(self) -> bool:
        return bool(self.t.isfinite().all() and self.v.isfinite().all())

    def reached(self) -> bool:
        """Whether any token reached the layer, and the layer the predictions."""
        return bool(self.t.any() and self.v.any())

    def _sides(self) -> tuple[Tensor, Tensor]:
        if self.chosen is None:
            return sides(self.module, self.adapter)
        weight, (cols, rows) = self.module.base_matrix().detach(), self.chosen
        return weight.index_select(1, cols), weight.index_select(0, rows)

    def joined(self, other: "Moments", weight: float) -> "Moments":
        """The mean of both, ``weight`` times as much of ``other``; as of one token."""
        out = Moments(self.module, self.adapter, self.chosen)
        for name in ("t", "v"):
            own, more = (getattr(m, name) / m.tokens for m in (self, other))
            setattr(out, name, (own + weight * more) / (1 + weight))
        out.tokens += 1
        return out

    def folds_without_metric(self) -> tuple[Tensor, Tensor]:
        """Those of an orthonormal basis, for a layer that nothing is known of."""
        _, S_c, _, S_r = orthonormal_basis(*self._sides())
        return orthonormal_folds(S_c, S_r)

    def folds(self, damping: float) -> tuple[Tensor, Tensor, float]:
        """The layer's folds, and what to multiply their product with so that a core changes W by as
        much as between orthonormal bases: ||C A V B R||_F^2 is on average
        ||C A||_F^2 ||B R||_F^2 for a V of independent unit elements, where those give r^2."""
        C, R = self._sides()
        fold_c, fold_r = (inverse_root(m / self.tokens, damping) for m in (self.v, self.t))
        size = (C.double() @ fold_c).norm() * (fold_r @ R.double()).norm()
        return fold_c, fold_r, self.adapter.r / float(size)


def sides(module: nn.Module, adapter: Adapter) -> tuple[Tensor, Tensor]:
    return tuple(
        side.detach()
        for side in adapter.C_and_R(None if adapter.C is not None else module.base_matrix())
    )
