"""Rows and columns of W that answer general text least."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import fail
from ...nn.adapter import Adapter


class Energies:
    """E[(W x)_i^2] = W_i Sigma W_i^T of every row and E[(g W)_j^2] = W_j^T Gamma W_j of every
    column, as sums over tokens in float64: N + K numbers."""

    def __init__(self, module: nn.Module, adapter: Adapter) -> None:
        self.module = module
        self.rows, self.cols = (
            torch.zeros(size, dtype=torch.float64, device=adapter.cols.device)
            for size in (adapter.out_features, adapter.in_features)
        )

    @property
    def sums(self) -> list[Tensor]:
        return [self.rows, self.cols]

    def keep(self, x: Tensor) -> tuple[Tensor, Tensor]:
        W = self.module.base_matrix().detach()
        return F.linear(x, W.to(x.dtype)), W

    def add(self, y: Tensor, W: Tensor, g: Tensor) -> None:
        self.rows += y.double().square().sum(0)
        self.cols += (g @ W.to(g.dtype)).double().square().sum(0)

    def quietest(self, r: int, name: str) -> tuple[Tensor, Tensor]:
        """cols (r,) and rows (r,), int64. ValueError where fewer answer at all."""
        out = []
        for what, energies in (("columns", self.cols), ("rows", self.rows)):
            if not energies.isfinite().all():
                raise ValueError(
                    f"layer {name!r}: its inputs or gradients on general text are not finite"
                )
            answering = int((energies > 0).sum())
            if answering < r:
                raise fail(
                    "selection",
                    "quiet",
                    f"None for layer {name!r}: {answering} {what} "
                    f"answer general text at all, and r is {r}",
                )
            energies = torch.where(energies > 0, energies, torch.inf)
            out.append(energies.argsort(stable=True)[:r])
        return tuple(out)
