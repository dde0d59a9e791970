"""``nn.Module`` replacements of ``nn.Linear``: CURLoRALinear and SECURALinear."""

import torch
from torch import nn

from .base import CURLinear, matrix_of
from .selection import select
from .variants import CURLoRAAdapter, SECURAAdapter


class CURLoRALinear(CURLinear, CURLoRAAdapter):
    """CURLoRA (arXiv 2408.14572): y = x W^T + bias + alpha x (C U R)^T, only U (r, r) is trained.

    U is zero at the start, so the layer starts as the base layer exactly.

    Args:
        base: ``nn.Linear`` or transformers' ``Conv1D``; its parameters are shared and frozen.
        cols, rows: (r,) int64, the columns and rows of W that C and R are.
        alpha: scale of the change.
        basis: ``"orthonormal"``: U lives between orthonormal bases of the columns and rows, which
            conditions it well. ``"whitened"``: measured by what general text needs of them, after
            ``calibrate``. ``"natural"``: between directions of its own, see ``calibrate``.
            ``"raw"``: C and R as they are, as published.
        norm: S-MagNorm's settings, a preset's name, or None for no gate, as published.
        importance_decay: see ``ImportanceDecay``; needs a norm.
        impl: the backend, see ``functional.cur_linear``.

    Raises:
        TypeError, ValueError: an argument outside these; the base is then unchanged.
    """

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int,
        *,
        selection: str = "inverted",
        replace: bool | None = None,
        generator: torch.Generator | None = None,
        **settings,
    ) -> "CURLoRALinear":
        """Chooses r columns and rows of ``linear`` and builds the layer.

        Args:
            selection: ``"inverted"`` (as published), ``"lowest"`` or ``"highest"`` norms.
            replace: sample with replacement; None: True for the raw basis, as published, but False
                for the orthonormal one, which has no use for duplicates, and for the other rules.
            generator: for ``"inverted"``: makes the choice repeatable.
            settings: alpha, basis, norm, importance_decay, impl of the class.
        """
        if replace is None:
            replace = selection == "inverted" and settings.get("basis") == "raw"
        cols, rows = select(matrix_of(linear), r, selection, replace=replace,
                            generator=generator)
        return cls(linear, cols, rows, **settings)


class SECURALinear(CURLinear, SECURAAdapter):
    """SECURA (arXiv 2502.18168): core = A^T B^T with A (m, r), B (r, m), m > r.

    B and the adapter bias (N,) are zero at the start, so the layer starts as the base layer.

    Args:
        m: the inner size, r < m <= K; None: a third more than r (published: r = 150, m = 200).
        norm: None for no gate, which forgets less than one (docs/choosing-settings.md).
            ``"published"``: S-MagNorm as published, which multiplies outputs by about 4/3 at the
            first step; ``"calibrated"``: without that jump.
        a_init: A's start. ``"published"``: W[:r, :m]^T (the published SVD is exactly that slice).
            ``"truncated_svd"``: the same expression with a rank-r SVD of W.
        adapter_bias: train a bias that is part of the gated change, as published.
        The others are those of ``CURLoRALinear``.

    Raises:
        TypeError, ValueError: an argument outside these; the base is then unchanged.
    """

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int,
        *,
        selection: str = "lowest",
        replace: bool = False,
        generator: torch.Generator | None = None,
        **settings,
    ) -> "SECURALinear":
        """Chooses r columns and rows of ``linear`` and builds the layer.

        Args:
            selection: ``"lowest"`` norms (as published), ``"highest"`` or ``"inverted"``.
            replace, generator: for ``"inverted"``, see ``selection.select``.
            settings: m, alpha, basis, norm, a_init, adapter_bias, importance_decay, impl of the
                class.
        """
        cols, rows = select(matrix_of(linear), r, selection, replace=replace,
                            generator=generator)
        return cls(linear, cols, rows, **settings)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, m={self.m}, adapter_bias={self.adapter_bias is not None}"
