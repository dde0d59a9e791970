"""``nn.Module`` replacements of ``nn.Linear``: CURLoRALinear and SECURALinear."""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, fail
from ..ops import IMPLS, resolve
from ..selection import select, select_none
from . import state
from .adapter import Adapter
from .cores import CURLoRAAdapter, SECURAAdapter
from .merge import Mergeable
from .projections import Part, Projection
from .stages import Stages

RUNS_NOWHERE = (
    "the output projection of nn.MultiheadAttention never runs (the attention takes "
    "its weight alone), so that nothing put in its place would be used"
)


def runs_nowhere(base: nn.Module) -> bool:
    """Whether a layer is one whose forward pass nobody calls; torch has a class for it alone."""
    return isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear)


def matrix_of(base: nn.Module) -> Tensor:
    """W (N, K) of an ``nn.Linear`` or of transformers' ``Conv1D``, which keeps it as (K, N).

    Raises:
        TypeError: another kind of layer. ValueError: a weight on the meta device.
    """
    transformers = sys.modules.get("transformers.pytorch_utils")
    if runs_nowhere(base):
        raise TypeError(f"linear cannot be replaced: {RUNS_NOWHERE}")
    if isinstance(base, nn.Linear):
        weight = base.weight
    elif transformers is not None and isinstance(base, transformers.Conv1D):
        weight = base.weight.T
    else:
        raise TypeError(
            f"linear is a {type(base).__name__}: it must be an nn.Linear or a transformers Conv1D"
        )
    if weight.is_meta:
        raise fail("linear.weight.device", "meta", "a device with values to choose from")
    return weight


class CURLinear(Projection, Mergeable, Stages, Adapter):
    """A frozen linear layer whose change is alpha C core R, C and R its own columns and rows.

    Use ``CURLoRALinear.from_linear`` or ``SECURALinear.from_linear``. ``weight`` and ``bias`` are
    the very parameters of ``base``, frozen; ``weight`` keeps the layout of ``base``: (N, K) of
    ``nn.Linear``, (K, N) of transformers' ``Conv1D``.

    Attributes:
        disable_adapters: while True the layer is its base.
    """

    disable_adapters = False

    def __init__(
        self, base: nn.Module, cols: Tensor, rows: Tensor, *, impl: str = "auto", **settings
    ) -> None:
        matrix = matrix_of(base)
        super().__init__(matrix, cols, rows, **settings)
        resolve(check_choice("impl", impl, IMPLS), matrix.device, matrix.dtype, self.r)
        self.impl = impl
        self.transposed = not isinstance(base, nn.Linear)
        # With a gate, the matrix that it divides after a stage; derived.
        self.register_buffer("stage_weight", None, persistent=False)
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if self.merged or self.disable_adapters:
            return F.linear(x, self.base_matrix(), self.bias)
        matrix = (
            self.base_matrix() if self.stage_weight is None else self._as_matrix(self.stage_weight)
        )
        y = self.linear(x, matrix, self.bias, self.impl, self.stage_core(), ticket=self.ticket(x))
        return self.add_past(y, x)

    def part(self) -> Part | None:
        in_weight_domain = self.norm is not None and self.norm.domain == "weight"
        alone = self.merged or self.disable_adapters or self.transposed or in_weight_domain
        return None if alone or self.stage_weight is not None else Part(self.weight, self)

    def base_matrix(self) -> Tensor:
        """W (N, K), whatever the layout of the base."""
        return self._as_matrix(self.weight)

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight

    def active_adapter_modules(self) -> list[Adapter]:
        return [self]

    @torch.no_grad()
    def stage(self, kind: str) -> None:
        super().stage(kind)
        self.refresh()

    def change_factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """C (N, r), core (r, r), R (r, K) with delta_W = C core R, M2 stages included; detached."""
        return self.factors(self.base_matrix())

    @torch.no_grad()
    def refresh(self) -> None:
        """Recomputes what derives from the weight, the indices and the long-term core. Loading a
        state dict and the stages do; call it after changing one of them by hand."""
        self.stage_weight = None
        matrix = self.base_matrix()
        self.derive(matrix)
        if self.norm is not None and self.long_core() is not None:
            self.untie(matrix)  # C and R are not columns and rows of what the gate divides
            self.stage_weight = self._as_matrix(self.stage_matrix(matrix)).contiguous()

    # State.

    def settings(self) -> dict:
        return dict(kind=type(self).__name__, **super().settings())

    def get_extra_state(self) -> Tensor:
        return state.pack_settings(self)

    def set_extra_state(self, _: Tensor) -> None:
        """The settings are checked in ``_load_from_state_dict``, before anything is copied."""

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unmerged is not None:
            for name, value in zip(("weight", "bias"), self._unmerged, strict=True):
                destination.pop(prefix + name, None)
                if value is not None:
                    destination[prefix + name] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        found = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        if found or strict:
            try:
                state.check_state(self, found, strict)
            except ValueError as error:
                raise ValueError(
                    f"{prefix.removesuffix('.') or type(self).__name__}: {error}"
                ) from error
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.stale = False
        self.refresh()

    def extra_repr(self) -> str:
        norm = None if self.norm is None else self.norm.domain
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, r={self.r}, alpha={self.alpha:g}, "
            f"basis={self.basis!r}, norm={norm!r}, impl={self.impl!r}"
            + (", merged=True" if self.merged else "")
        )


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
            ``"svd"``: between W's leading singular directions, as LoRA-XS; cols and rows then say
            only how many. ``"raw"``: C and R as they are, as published.
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
        selection: str | None = None,
        replace: bool | None = None,
        generator: torch.Generator | None = None,
        **settings,
    ) -> "CURLoRALinear":
        """Chooses r columns and rows of ``linear`` and builds the layer.

        Args:
            selection: ``"inverted"`` (as published, the default), ``"lowest"`` or ``"highest"``
                norms; None with the svd basis, which takes no columns and rows.
            replace: sample with replacement; None: True for the raw basis, as published, but False
                for the others, which have no use for duplicates, and for the other rules.
            generator: for ``"inverted"``: makes the choice repeatable.
            settings: alpha, basis, norm, importance_decay, impl of the class.
        """
        weight, basis = matrix_of(linear), settings.get("basis")
        if basis == "svd":
            return cls(linear, *select_none(weight, r, selection, replace), **settings)
        selection = "inverted" if selection is None else selection
        if replace is None:
            replace = selection == "inverted" and basis == "raw"
        cols, rows = select(weight, r, selection, replace=replace, generator=generator)
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
        selection: str | None = None,
        replace: bool = False,
        generator: torch.Generator | None = None,
        **settings,
    ) -> "SECURALinear":
        """Chooses r columns and rows of ``linear`` and builds the layer.

        Args:
            selection: ``"lowest"`` norms (as published, the default), ``"highest"`` or
                ``"inverted"``; None with the svd basis, which takes no columns and rows.
            replace, generator: for ``"inverted"``, see ``selection.select``.
            settings: m, alpha, basis, norm, a_init, adapter_bias, importance_decay, impl of the
                class.
        """
        weight = matrix_of(linear)
        if settings.get("basis") == "svd":
            return cls(linear, *select_none(weight, r, selection, replace), **settings)
        selection = "lowest" if selection is None else selection
        cols, rows = select(weight, r, selection, replace=replace, generator=generator)
        return cls(linear, cols, rows, **settings)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, m={self.m}, adapter_bias={self.adapter_bias is not None}"
