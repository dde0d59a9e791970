"""``nn.Module`` replacements of ``nn.Linear``: CURLoRALinear and SECURALinear."""

import torch
from torch import Tensor, nn

from .base import CURLinear, base_matrix
from .checks import check_choice, check_int
from .reference import cabr_core
from .selection import select
from .smagnorm import SMagNorm

A_INITS = ("published", "truncated_svd")


class CURLoRALinear(CURLinear):
    """CURLoRA (arXiv 2408.14572): y = x W^T + bias + alpha x (C U R)^T, only U (r, r) is trained.

    U is zero at the start, so the layer starts as the base layer exactly.

    Args:
        base: ``nn.Linear`` or transformers' ``Conv1D``; its parameters are shared and frozen.
        cols, rows: (r,) int64, the columns and rows of W that C and R are.
        alpha: scale of the change.
        basis: ``"raw"``: C and R as they are, as published. ``"orthonormal"``: U lives between
            orthonormal bases of the same columns and rows, which conditions it well.
        norm: S-MagNorm's settings, a preset's name, or None for no gate, as published.
        importance_decay: see ``ImportanceDecay``; needs a norm.
        impl: the backend, see ``functional.cur_linear``.

    Raises:
        TypeError, ValueError: an argument outside these; the base is then unchanged.
    """

    def __init__(self, base: nn.Module, cols: Tensor, rows: Tensor, **settings) -> None:
        super().__init__(base, cols, rows, **settings)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.U = nn.Parameter(torch.zeros(self.r, self.r, dtype=dtype, device=self.weight.device))
        self.register_buffer("U_long", None)
        if self.importance is not None:
            self.importance.watch(self.U)
        self._freeze_base()

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
            replace: sample with replacement; None: as published, True, but False for the
                orthonormal basis, which has no use for duplicates, and for the other rules.
            generator: for ``"inverted"``: makes the choice repeatable.
            settings: alpha, basis, norm, importance_decay, impl of the class.
        """
        if replace is None:
            replace = selection == "inverted" and settings.get("basis", "raw") == "raw"
        cols, rows = select(base_matrix(linear), r, selection, replace=replace,
                            generator=generator)
        return cls(linear, cols, rows, **settings)

    def trained_core(self) -> Tensor:
        return self.U

    def core_parameter(self) -> nn.Parameter:
        return self.U

    def long_core(self) -> Tensor | None:
        return self.U_long

    def late_shapes(self) -> dict[str, tuple[int, int]]:
        return super().late_shapes() | {"U_long": (self.r, self.r)}

    def _accumulate(self) -> None:
        self.U_long = self.U.detach() + (0 if self.U_long is None else self.U_long)


class SECURALinear(CURLinear):
    """SECURA (arXiv 2502.18168): core = A^T B^T with A (m, r), B (r, m), m > r, under S-MagNorm.

    B and the adapter bias (N,) are zero at the start, so the layer starts as the base layer.

    Args:
        m: the inner size, r < m <= K; None: a third more than r (published: r = 150, m = 200).
        norm: default ``"calibrated"``; ``"published"`` multiplies outputs by about 4/3 at the
            first step. None: no gate.
        a_init: A's start. ``"published"``: W[:r, :m]^T (the published SVD is exactly that slice).
            ``"truncated_svd"``: the same expression with a rank-r SVD of W.
        adapter_bias: train a bias that is part of the gated change, as published.
        The others are those of ``CURLoRALinear``.

    Raises:
        TypeError, ValueError: an argument outside these; the base is then unchanged.
    """

    def __init__(
        self,
        base: nn.Module,
        cols: Tensor,
        rows: Tensor,
        *,
        m: int | None = None,
        norm: SMagNorm | str | dict | None = "calibrated",
        a_init: str = "published",
        adapter_bias: bool = True,
        **settings,
    ) -> None:
        super().__init__(base, cols, rows, norm=norm, **settings)
        if m is None:
            m = min(max(self.r + 1, self.r * 4 // 3), self.in_features)
        self.m = check_int("m", m, self.r + 1, self.in_features,
                           f", above r={self.r} and at most K={self.in_features}")
        check_choice("a_init", a_init, A_INITS)
        check_choice("adapter_bias", adapter_bias, (True, False))
        A = self._start(a_init)
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(A.new_zeros(self.r, self.m))
        self.adapter_bias = nn.Parameter(A.new_zeros(self.out_features)) if adapter_bias else None
        for name in ("A_long", "B_long"):
            self.register_buffer(name, None)
        if self.importance is not None:
            self.importance.watch(self.B)
        self._freeze_base()

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
        cols, rows = select(base_matrix(linear), r, selection, replace=replace,
                            generator=generator)
        return cls(linear, cols, rows, **settings)

    @torch.no_grad()
    def _start(self, a_init: str) -> Tensor:
        matrix = self._matrix(self.weight)
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        if a_init == "published":
            return matrix[:self.r, :self.m].T.to(dtype).contiguous()
        devices = [matrix.device] if matrix.is_cuda else []
        with torch.random.fork_rng(devices):  # the randomised SVD draws from the global generator
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(matrix.to(dtype), q=self.r)
        return ((U[:self.r] * S) @ V[:self.m].T).T.contiguous()

    def settings(self) -> dict:
        return super().settings() | dict(adapter_bias=self.adapter_bias is not None)

    def trained_core(self) -> Tensor:
        return cabr_core(self.A, self.B)

    def core_parameter(self) -> nn.Parameter:
        return self.B

    def long_core(self) -> Tensor | None:
        return None if self.B_long is None else cabr_core(self.A_long, self.B_long)

    def late_shapes(self) -> dict[str, tuple[int, int]]:
        return super().late_shapes() | {"A_long": (self.m, self.r), "B_long": (self.r, self.m)}

    def _accumulate(self) -> None:
        """B_long <- B_long + B, A_long <- A."""
        self.B_long = self.B.detach() + (0 if self.B_long is None else self.B_long)
        self.A_long = self.A.detach().clone()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, m={self.m}, adapter_bias={self.adapter_bias is not None}"
