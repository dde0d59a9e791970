"""The changes of a stack of frozen weights W (E, N, K), a core for each expert of a mixture.

An adapter of ``cores.py`` whose tensors have one more dimension: cols and rows (E, r), U (E, r, r),
folds (E, r, r), a bias (E, N). What multiplies matrices does so for all experts at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.reference.eager import smagnorm
from ..checks import fail
from ..functional.experts import Routing, cur_experts, frozen_product, grouped_product, rows_of
from ..selection import check_weight, select
from ..settings import SMagNorm
from .adapter import Adapter
from .cores import CURLoRAAdapter, SECURAAdapter


class ExpertsAdapter(Adapter):
    """The part of the two adapters below that is not in those of one weight.

    Args:
        weight: W (E, N, K), read only. cols, rows: (E, r) int64. settings: those of
            ``CURLoRAAdapter`` or ``SECURAAdapter``.

    Raises:
        ValueError: ``basis="natural"``, whose moments for every expert take (N + K)(rank + 2)
            numbers, or ``"svd"``, which stores C and R; a gate on the weight, which would form
            W_eff (E, N, K) in each forward pass, or with ``ref="max"``; importance decay, whose
            gate is counted over one matrix.
    """

    def __init__(self, weight: Tensor, cols: Tensor, rows: Tensor, **settings) -> None:
        self.check_settings(**settings)
        super().__init__(weight, cols, rows, **settings)

    @staticmethod
    def check_settings(basis="orthonormal", norm=None, importance_decay=None, **_) -> None:
        if basis in ("natural", "svd"):
            raise fail("basis", basis, "'orthonormal', 'whitened' or 'raw' for stacked experts")
        norm = SMagNorm.of(norm)
        if norm is not None and (norm.domain == "weight" or norm.ref == "max"):
            allowed = "None, or of domain 'output' with a number as ref, for stacked experts"
            raise fail("norm", norm, allowed)
        if importance_decay is not None:
            raise fail("importance_decay", importance_decay, "None for stacked experts")

    def check(self, weight: Tensor, cols: Tensor, rows: Tensor) -> None:
        check_stack(weight)
        for name, index, size in (
            ("cols", cols, weight.shape[2]),
            ("rows", rows, weight.shape[1]),
        ):
            if index.dtype != torch.int64 or index.ndim != 2 or index.shape[0] != len(weight):
                what = f"{index.dtype} {tuple(index.shape)}"
                raise fail(name, what, f"an int64 tensor of shape ({len(weight)}, r)")
            if int(index.min()) < 0 or int(index.max()) >= size:
                raise fail(
                    name, [int(index.min()), int(index.max())], f"indices from 0 to {size - 1}"
                )
        if cols.shape != rows.shape:
            raise fail("rows.shape", tuple(rows.shape), f"{tuple(cols.shape)}, the shape of cols")

    def slices(self, weight: Tensor, cols: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Each expert's columns, (E, N, r), and rows, (E, r, K)."""
        return rows_of(weight.mT, cols).mT, rows_of(weight, rows)

    def fits_into_product(self) -> bool:
        """Whether ``cur_experts`` can run it. A bias, added after, would be one rounding more."""
        return self.norm is None and self.C is None and self.adapter_bias is None

    def scaled_core(self, trained: Tensor | None) -> Tensor:
        """alpha core (E, r, r). ``trained``: as in ``Adapter.core``."""
        core = self.core(trained)
        return core if self.alpha == 1 else self.alpha * core

    def change(
        self, x: Tensor, weight: Tensor, routing: Routing, trained: Tensor | None = None
    ) -> Tensor:
        """alpha (x R^T) core^T C^T (S, N)."""
        core, ends = self.scaled_core(trained).to(x.dtype), routing.ends
        if self.C is None:
            t = frozen_product(x, weight, ends, self.rows, transposed=True)
            return frozen_product(grouped_product(t, core.mT, ends), weight.mT, ends, self.cols)
        t = frozen_product(x, self.R.to(x.dtype), ends, transposed=True)
        h = grouped_product(t, core.mT, ends)
        return frozen_product(h, self.C.to(x.dtype), ends, transposed=True)

    def gated(self, y0: Tensor, x: Tensor, weight: Tensor, routing: Routing) -> Tensor:
        """S-MagNorm of a base output y0 (S, N) and the change, element by element."""
        earlier = self.long_core()
        if earlier is not None:
            y0 = y0 + self.change(x, weight, routing, earlier)
        wide = torch.promote_types(x.dtype, torch.float32)
        change = self.change(x, weight, routing).to(wide)
        if self.adapter_bias is not None:
            change = change + self.adapter_bias[routing.experts]
        return smagnorm(y0.to(wide), change, self.norm).to(y0.dtype)


class CURLoRAExperts(ExpertsAdapter, CURLoRAAdapter):
    """U (E, r, r) is trained, zero at the start."""


class SECURAExperts(ExpertsAdapter, SECURAAdapter):
    """A (E, m, r) and B (E, r, m) are trained, and a bias (E, N)."""


def experts_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[ExpertsAdapter],
    routing: Routing,
) -> Tensor:
    """(S, K) -> (S, N): x W_e^T + bias_e of each row's expert e, changed.

    Args:
        weight: (E, N, K), frozen, of x's dtype. bias: (E, N). adapters: one, or several without a
            gate, whose changes add up.
    """
    adapters = list(adapters)
    if adapters and adapters[0].fits_into_product():
        first = adapters.pop(0)
        core = first.scaled_core(first.stage_core())
        y = cur_experts(x, weight, core, first.cols, first.rows, routing)
    else:
        y = frozen_product(x, weight, routing.ends, transposed=True)
    if bias is not None:
        y = y + bias[routing.experts]
    for adapter in adapters:
        if adapter.norm is not None:
            return adapter.gated(y, x, weight, routing)
        change = adapter.change(x, weight, routing, adapter.stage_core())
        if adapter.adapter_bias is not None:
            change = change + adapter.adapter_bias[routing.experts].to(y.dtype)
        y = y + change
    return y


def check_stack(weight: Tensor) -> None:
    """W must be a finite floating-point stack of matrices, none of them zero."""
    if weight.ndim != 3:
        raise fail("weight.shape", tuple(weight.shape), "three-dimensional, (E, N, K)")
    for matrix in weight:
        check_weight(matrix)


def select_experts(
    weight: Tensor, r: int, rule: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """r columns and r rows of each matrix of W (E, N, K), without replacement; see ``select``.

    Returns:
        cols, rows: (E, r), int64, on W's device.
    """
    check_stack(weight)
    found = [select(matrix, r, rule, generator=generator) for matrix in weight]
    return tuple(torch.stack(part) for part in zip(*found, strict=True))
