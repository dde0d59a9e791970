"""The whitened basis of stacked experts: the moments of each expert's own tokens.

A general token moves the predictions through the experts that it is sent to alone. With the part
p_e of the tokens that expert e sees, a change of its weight costs p_e tr(delta_W^T Gamma_e delta_W
Sigma_e) / 2 nats a token of the whole text, Sigma_e and Gamma_e being means over its own tokens.
What few tokens need may move more.
"""

import math

import torch
from torch import Tensor, nn

from ...bases import inverse_root, orthonormal_basis, orthonormal_folds
from ...functional.experts import Routing, frozen_product, grouped_outer_product
from ...nn.adapter import Adapter


class Moments:
    """Sums of t^T t and v^T v (E, r, r), float64, over each expert's rows."""

    def __init__(self, module: nn.Module, adapter: Adapter) -> None:
        self.module, self.adapter = module, adapter
        (E,), r = adapter.stack, adapter.r
        shape = dict(dtype=torch.float64, device=adapter.cols.device)
        self.t, self.v = (torch.zeros(E, r, r, **shape) for _ in range(2))
        self.rows = torch.zeros(E, **shape)
        self.tokens = torch.zeros((), **shape)  # of all experts together
        self.counts = self.rows  # of rows, whatever they count for after ``joined``

    @property
    def sums(self) -> list[Tensor]:
        return [self.t, self.v, self.rows, self.tokens]

    def keep(self, x: Tensor, routing: Routing) -> tuple[Tensor, None]:
        weight = self.module.base_matrix().detach()
        R = None if self.adapter.C is None else self.adapter.R
        if R is None:
            t = frozen_product(x.to(weight.dtype), weight, routing.ends, self.adapter.rows, True)
        else:
            t = frozen_product(x.to(R.dtype), R, routing.ends, None, True)
        return t, None

    def add(self, t: Tensor, g: Tensor, routing: Routing) -> None:
        """Of the rows of ``routing``."""
        weight = self.module.base_matrix().detach()
        if self.adapter.C is None:
            columns = weight.mT, routing.ends, self.adapter.cols, True
        else:
            columns = self.adapter.C, routing.ends
        v = frozen_product(g.to(columns[0].dtype), *columns).double()
        self.t += grouped_outer_product(t.double(), t.double(), routing.ends)
        self.v += grouped_outer_product(v, v, routing.ends)
        self.rows += torch.bincount(routing.experts, minlength=len(self.rows))
        self.tokens += len(t) / routing.k

    def finite(self) -> bool:
        return bool(self.t.isfinite().all() and self.v.isfinite().all())

    def known(self) -> Tensor:
        """(E,): which experts saw as many tokens as their rank, and reached the predictions."""
        moved = self.t.flatten(1).any(1) & self.v.flatten(1).any(1)
        return moved & (self.counts >= self.adapter.r)

    def reached(self) -> bool:
        return bool(self.known().any())

    def joined(self, other: "Moments", weight: float) -> "Moments":
        """The mean of both, ``weight`` times as much of ``other``; as of one token."""
        out = Moments(self.module, self.adapter)
        for name in ("t", "v", "rows"):
            own, more = (getattr(m, name) / m.tokens for m in (self, other))
            setattr(out, name, (own + weight * more) / (1 + weight))
        out.tokens += 1
        out.counts = self.counts + other.counts
        return out

    def folds_without_metric(self) -> tuple[Tensor, Tensor]:
        """Those of orthonormal bases, for experts that nothing is known of."""
        _, S_c, _, S_r = orthonormal_basis(*self._sides())
        return orthonormal_folds(S_c, S_r)

    def folds(self, damping: float) -> tuple[Tensor, Tensor, float]:
        """As those of one weight; the number is the geometric mean of the known experts'. The
        others' folds are zero: ``completed``."""
        known, (C, R) = self.known(), self._sides()
        fold_c, fold_r = torch.zeros_like(self.v), torch.zeros_like(self.t)
        fold_c[known] = inverse_root(self.v[known] / self.tokens, damping)
        fold_r[known] = inverse_root(self.t[known] / self.rows[known, None, None], damping)
        left = torch.linalg.matrix_norm((C.double() @ fold_c)[known])
        right = torch.linalg.matrix_norm((fold_r @ R.double())[known])
        size = (self.adapter.r / (left * right)).log().mean().exp()
        return fold_c, fold_r, float(size)

    def completed(
        self, fold_c: Tensor, fold_r: Tensor, unit: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The folds with orthonormal ones where an expert is not known, whose unit is NaN."""
        known = self.known()
        units = torch.full_like(self.rows, math.nan).masked_fill(known, unit)
        if not known.all():
            plain_c, plain_r = self.folds_without_metric()
            fold_c = torch.where(known[:, None, None], fold_c, plain_c)
            fold_r = torch.where(known[:, None, None], fold_r, plain_r)
        return fold_c, fold_r, units

    def _sides(self) -> tuple[Tensor, Tensor]:
        weight = None if self.adapter.C is not None else self.module.base_matrix().detach()
        return self.adapter.C_and_R(weight)
