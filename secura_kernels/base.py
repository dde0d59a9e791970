"""What CURLoRALinear and SECURALinear share: the frozen base, C and R, the forward pass, state."""

import sys
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import state
from .checks import check_choice, check_number, fail
from .functional import cur_linear_and_moved
from .importance import ImportanceState
from .merging import Mergeable
from .ops import IMPLS, resolve
from .selection import BASES, check_indices, check_weight, orthonormal_basis
from .smagnorm import ImportanceDecay, SMagNorm

# Folding S^-1 into the core magnifies rounding with cond(S); past these values the orthonormal
# bases themselves are stored instead. At 32 in bfloat16 the change is off by less than three times
# what stored bases are (tests/test_modules.py).
LARGEST_CONDITION = {torch.bfloat16: 2**5, torch.float16: 2**8}
LARGEST_CONDITION_WIDE = 2**14


class CURLinear(Mergeable, nn.Module):
    """A frozen linear layer whose change is alpha C core R, C and R its own columns and rows.

    Use ``CURLoRALinear.from_linear`` or ``SECURALinear.from_linear``. ``weight`` and ``bias`` are
    the very parameters of ``base``, frozen; ``weight`` keeps the layout of ``base``: (N, K) of
    ``nn.Linear``, (K, N) of transformers' ``Conv1D``.
    """

    def __init__(
        self,
        base: nn.Module,
        cols: Tensor,
        rows: Tensor,
        *,
        alpha: float = 1.0,
        basis: str = "raw",
        norm: SMagNorm | str | dict | None = None,
        importance_decay: ImportanceDecay | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        matrix = base_matrix(base)
        check_weight(matrix)
        check_indices("cols", cols, matrix.shape[1])
        check_indices("rows", rows, matrix.shape[0])
        if cols.shape != rows.shape:
            raise fail("rows.shape", tuple(rows.shape), f"{tuple(cols.shape)}, the shape of cols")
        check_choice("basis", basis, BASES)
        resolve(check_choice("impl", impl, IMPLS), matrix.device, matrix.dtype, cols.numel())
        norm = SMagNorm.of(norm)
        if importance_decay is not None and not isinstance(importance_decay, ImportanceDecay):
            raise fail("importance_decay", importance_decay, "an ImportanceDecay or None")
        if importance_decay is not None and norm is None:
            raise fail("importance_decay", importance_decay, "None without a norm, whose gate it "
                                                             "counts")
        self.out_features, self.in_features = matrix.shape
        self.r = cols.numel()
        self.alpha = check_number("alpha", alpha, "a finite number", -torch.inf)
        self.basis, self.norm, self.impl = basis, norm, impl
        self.importance_decay = importance_decay
        self.transposed = not isinstance(base, nn.Linear)
        self.base_changed = False  # by an M1 stage: W is no longer the one C and R came from

        self.register_buffer("cols", cols.to(matrix.device, copy=True))
        self.register_buffer("rows", rows.to(matrix.device, copy=True))
        for name in ("C", "R"):  # only where they are not slices of W
            self.register_buffer(name, None)
        for name in ("fold_c", "fold_r", "stage_weight"):  # derived, never saved
            self.register_buffer(name, None, persistent=False)
        self.weight, self.bias = base.weight, base.bias
        if basis == "orthonormal":
            self._set_basis()
        self.importance = None
        if importance_decay is not None:
            self.importance = ImportanceState(matrix, self.r, importance_decay)
        self.train(base.training)

    def _freeze_base(self) -> None:
        """Freezes the base's own parameters: the last step, after every check has passed."""
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    # What a subclass says of its trained core.

    def trained_core(self) -> Tensor:
        """What is trained, as (r, r): U, or A^T B^T; between orthonormal bases with that basis."""
        raise NotImplementedError

    def core_parameter(self) -> nn.Parameter:
        """The parameter that is zero at the start: U, or B."""
        raise NotImplementedError

    def long_core(self) -> Tensor | None:
        """The core (r, r) accumulated by M2 stages; None before the first."""
        raise NotImplementedError

    def _accumulate(self) -> None:
        """Adds the trained core to the long-term one (M2)."""
        raise NotImplementedError

    # The forward pass.

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if self.merged:
            return F.linear(x, self._matrix(self.weight), self.bias)
        importance = self.importance
        counting = importance is not None and self.training
        y, moved = cur_linear_and_moved(
            x, core=self.core(), **self._operands(), bias=self.bias, alpha=self.alpha,
            norm=self.norm, adapter_bias=getattr(self, "adapter_bias", None),
            decay=None if importance is None else importance.factor, impl=self.impl,
            edge=self.importance_decay.edge if counting else 0.0)
        if counting:
            importance.add(moved, (self.weight if self.norm.domain == "weight" else y).numel())
        return y

    def core(self, trained: Tensor | None = None) -> Tensor:
        """The core (r, r) between C and R, differentiable: S_c^-1 V S_r^-T for a folded basis."""
        with torch.autocast(self.weight.device.type, enabled=False):
            core = self.trained_core() if trained is None else trained
            if self.fold_c is None:
                return core
            return self.fold_c.to(core.dtype) @ core @ self.fold_r.to(core.dtype)

    def _operands(self) -> dict[str, Tensor | None]:
        """W (N, K) and what C and R are: indices while tied to W, else the stored matrices."""
        base = self.weight if self.stage_weight is None else self.stage_weight
        tied = self.C is None
        return dict(weight=self._matrix(base),
                    cols=self.cols if tied else None, rows=self.rows if tied else None,
                    C=self.C, R=self.R)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight

    # C and R.

    def _sides(self) -> tuple[Tensor, Tensor]:
        """C (N, r) and R (r, K)."""
        if self.C is not None:
            return self.C, self.R
        matrix = self._matrix(self.weight)
        return matrix.index_select(1, self.cols), matrix.index_select(0, self.rows)

    @torch.no_grad()
    def _set_basis(self) -> None:
        """Folds the r x r factors of the orthonormal bases into the core, or stores the bases
        where the factors are ill conditioned for the weight's dtype."""
        Q_c, S_c, Q_r, S_r = orthonormal_basis(*self._sides())
        worst = max(float(torch.linalg.cond(S)) for S in (S_c, S_r))
        if worst > LARGEST_CONDITION.get(self.weight.dtype, LARGEST_CONDITION_WIDE):
            self._store(Q_c, Q_r.T)
            return
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        unit = torch.eye(self.r, dtype=S_c.dtype, device=S_c.device)
        self.fold_c = torch.linalg.solve_triangular(S_c, unit, upper=True).to(wide)
        self.fold_r = torch.linalg.solve_triangular(S_r, unit, upper=True).T.contiguous().to(wide)

    def _store(self, C: Tensor, R: Tensor) -> None:
        dtype = self.weight.dtype
        self.C, self.R = C.to(dtype).contiguous(), R.to(dtype).contiguous()
        self.fold_c = self.fold_r = None

    def _untie(self) -> None:
        """Stores C and R (orthonormal ones for that basis), so that W may change."""
        if self.C is not None:
            return
        C, R = self._sides()
        if self.basis == "orthonormal":
            C, _, Q_r, _ = orthonormal_basis(C, R)
            R = Q_r.T
        self._store(C, R)

    @torch.no_grad()
    def refresh(self) -> None:
        """Recomputes what derives from the weight, the indices and the long-term core. Loading a
        state dict and the stages do; call it after changing one of them by hand."""
        self.fold_c = self.fold_r = self.stage_weight = None
        if self.C is None and self.basis == "orthonormal":
            self._set_basis()
        if self.importance is not None:
            self.importance.measure(self._matrix(self.weight))
        if self.long_core() is not None:
            matrix = self._changed(self._matrix(self.weight), self.long_core())
            self.stage_weight = (matrix.T if self.transposed else matrix).contiguous()

    # State.

    def settings(self) -> dict:
        """What a layer and a saved state must agree on, as JSON values."""
        decay = self.importance_decay
        return dict(kind=type(self).__name__, alpha=self.alpha, basis=self.basis,
                    norm=None if self.norm is None else self.norm.to_dict(),
                    importance_decay=None if decay is None else asdict(decay))

    def get_extra_state(self) -> Tensor:
        return state.pack_settings(self)

    def set_extra_state(self, _: Tensor) -> None:
        """The settings are checked in ``_load_from_state_dict``, before anything is copied."""

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            for name, value in zip(("weight", "bias"), self._unmerged, strict=True):
                destination.pop(prefix + name, None)
                if value is not None:
                    destination[prefix + name] = value if keep_vars else value.detach()

    def late_shapes(self) -> dict[str, tuple[int, int]]:
        """Saved tensors that exist only once bases are stored or a stage has been taken."""
        return {"C": (self.out_features, self.r), "R": (self.r, self.in_features)}

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys,
                              unexpected_keys, error_msgs) -> None:
        found = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        if found or strict:
            try:
                content = state.check_state(self, found, strict)
            except ValueError as error:
                raise ValueError(f"{prefix.removesuffix('.') or type(self).__name__}: {error}") \
                    from error
            state.prepare(self, found, content)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys,
                                      unexpected_keys, error_msgs)
        self.refresh()

    def __setstate__(self, values: dict) -> None:
        super().__setstate__(values)  # of a copy, whose parameters have lost their hooks
        if self.importance is not None:
            self.importance.watch(self.core_parameter())

    def extra_repr(self) -> str:
        norm = None if self.norm is None else self.norm.domain
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}, r={self.r}, alpha={self.alpha:g}, "
                f"basis={self.basis!r}, norm={norm!r}, impl={self.impl!r}"
                + (", merged=True" if self.merged else ""))


def base_matrix(base: nn.Module) -> Tensor:
    """W (N, K) of an ``nn.Linear`` or of transformers' ``Conv1D``, which keeps it as (K, N).

    Raises:
        TypeError: another kind of layer. ValueError: a weight on the meta device.
    """
    transformers = sys.modules.get("transformers.pytorch_utils")
    if isinstance(base, nn.Linear):
        weight = base.weight
    elif transformers is not None and isinstance(base, transformers.Conv1D):
        weight = base.weight.T
    else:
        raise TypeError(f"linear is a {type(base).__name__}: it must be an nn.Linear or a "
                        "transformers Conv1D")
    if weight.is_meta:
        raise fail("linear.weight.device", "meta", "a device with values to choose from")
    return weight
