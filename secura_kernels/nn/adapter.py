"""The change of one frozen weight, alpha C core R: indices, trained core, gate; not the weight.

An adapter holds nothing of W but what it was told to store, so that one weight can serve many
adapters. Methods that need W are given it as ``weight`` (N, K).
"""

from contextlib import nullcontext
from dataclasses import asdict

import torch
from torch import Tensor, nn

from ..backends.operands import CurOperands
from ..backends.reference import delta_weight
from ..backends.reference.weight import effective_weight
from ..bases import BASES, orthonormal_basis, orthonormal_folds
from ..checks import check_choice, check_number, fail
from ..functional.epilogue import cur_epilogue, cur_epilogue_and_moved
from ..functional.linear import cur_linear_and_moved
from ..ops import folded_core
from ..selection import check_indices, check_weight
from ..settings import ImportanceDecay, SMagNorm
from .importance import ImportanceState
from .optional_tensors import OptionalTensors
from .past import Past

# Folding S^-1 into the core magnifies rounding with cond(S); past these values the orthonormal
# bases themselves are stored instead. At 32 in bfloat16 the change is off by less than three times
# what stored bases are (tests/test_linear.py).
LARGEST_CONDITION = {torch.bfloat16: 2**5, torch.float16: 2**8}
LARGEST_CONDITION_WIDE = 2**14
NOT_CALIBRATED = (
    "basis={!r} knows nothing yet of what is to be kept: call "
    "secura_kernels.calibrate(model{}) before training"
)
CALIBRATED = {"whitened": "", "natural": ", task=batches"}  # bases that need it, and how


class Adapter(OptionalTensors, Past, nn.Module):
    """What CURLoRA's and SECURA's changes share.

    Args:
        weight: W (N, K), read only. cols, rows: (r,) int64. Others: see ``CURLoRALinear``.
    """

    def __init__(
        self,
        weight: Tensor,
        cols: Tensor,
        rows: Tensor,
        *,
        alpha: float = 1.0,
        basis: str = "orthonormal",
        norm: SMagNorm | str | dict | None = None,
        importance_decay: ImportanceDecay | None = None,
    ) -> None:
        super().__init__()
        check_weight(weight)
        check_indices("cols", cols, weight.shape[1])
        check_indices("rows", rows, weight.shape[0])
        if cols.shape != rows.shape:
            raise fail("rows.shape", tuple(rows.shape), f"{tuple(cols.shape)}, the shape of cols")
        check_choice("basis", basis, BASES)
        norm = SMagNorm.of(norm)
        if importance_decay is not None and not isinstance(importance_decay, ImportanceDecay):
            raise fail("importance_decay", importance_decay, "an ImportanceDecay or None")
        if importance_decay is not None and norm is None:
            raise fail(
                "importance_decay", importance_decay, "None without a norm, whose gate it counts"
            )
        self.out_features, self.in_features = weight.shape
        self.r = cols.numel()
        self.alpha = check_number("alpha", alpha, "a finite number", -torch.inf)
        self.basis, self.norm = basis, norm
        self.importance_decay = importance_decay

        self.register_buffer("cols", cols.to(weight.device, copy=True))
        self.register_buffer("rows", rows.to(weight.device, copy=True))
        # C and R only where they are not slices of W.
        for name in ("C", "R", "C_past", "R_past", "unit"):
            self.register_buffer(name, None)
        # The orthonormal basis's folds derive from W and are never saved; the whitened one's come
        # from text.
        for name in ("fold_c", "fold_r"):
            self.register_buffer(name, None, persistent=basis == "whitened")
        self.calibrated = basis not in CALIBRATED
        self.register_parameter("adapter_bias", None)
        if basis == "orthonormal":
            self._set_basis(weight)
        self.importance = None
        if importance_decay is not None:
            self.importance = ImportanceState(weight, self.r, importance_decay)
        self.stale = False  # cols, rows or a dtype are new, and ``derive`` has not been called
        self.shared_key: tuple | None = None  # see peft/batched.py

    # What a subclass says of its trained core.

    def core_parameters(self) -> tuple[Tensor, ...]:
        """What the core is made of: (U,), or (A, B)."""
        raise NotImplementedError

    def trained_core(self) -> Tensor:
        """What is trained, as (r, r): U, or A^T B^T; between orthonormal bases with that basis."""
        return folded_core(self.core_parameters(), None, None)

    def core_parameter(self) -> nn.Parameter:
        """The parameter that is zero at the start: U, or B."""
        raise NotImplementedError

    def long_core(self) -> Tensor | None:
        """The core (r, r) accumulated by M2 stages; None before the first."""
        raise NotImplementedError

    def stage_core(self) -> Tensor | None:
        """Without a gate what is trained and the long-term core are one change: their sum (r, r).
        None: it is what is trained alone."""
        earlier = self.long_core()
        return None if self.norm is not None or earlier is None else self.trained_core() + earlier

    @staticmethod
    def trained_cores(adapters: "list[Adapter]") -> Tensor:
        """``trained_core`` of several adapters of one shape, (A, r, r)."""
        raise NotImplementedError

    def set_long_core(self, core: Tensor | None) -> None:
        """Puts (r, r), or none, in the place of ``long_core``."""
        raise NotImplementedError

    def accumulate(self, kind: str) -> None:
        """Adds the trained core to the long-term one, as the stage ``"m1"`` or ``"m2"`` does."""
        raise NotImplementedError

    @torch.no_grad()
    def stage(self, kind: str) -> None:
        """The core joins the long-term one, beside W, and is zero again. See ``Stages``.

        Raises:
            RuntimeError: an ``"m1"`` stage of a gate in the weight domain, whose W_eff is no
                delta_W; a stage of the other kind than those before.
        """
        if kind == "m1" and self.norm is not None and self.norm.domain == "weight":
            raise RuntimeError(
                "stage_m1 is not possible beside an untouched weight for a norm in "
                "the weight domain: W_eff is no delta_W; stage_m2 is possible"
            )
        self.accumulate(kind)
        self.core_parameter().zero_()

    # The forward pass.

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        impl: str,
        trained: Tensor | None = None,
        first: Tensor | None = None,
    ) -> Tensor:
        """(..., K) -> (..., N): x W^T + bias, changed. ``trained``: (r, r) in the place of what
        ``trained_core`` gives. ``first``: the W of C and R, where ``weight`` is a later one."""
        y, moved = cur_linear_and_moved(
            x, self.operands(weight, bias, trained, first), impl, self._edge()
        )
        self._count(moved, weight if self.norm and self.norm.domain == "weight" else y)
        return y

    def epilogue(
        self, y0: Tensor, t: Tensor, C: Tensor, impl: str, trained: Tensor | None = None
    ) -> Tensor:
        """(..., N): a base output y0 changed; t = x R^T (..., r), C (N, r) of y0's dtype."""
        layer = CurOperands.of_epilogue(
            self.core(trained), C, self.adapter_bias, self._decay(), self.alpha, self.norm
        )
        y, moved = cur_epilogue_and_moved(y0, t, layer, impl, self._edge())
        self._count(moved, y)
        return y

    def without_gate(self, y0: Tensor, t: Tensor, C: Tensor, trained: Tensor, impl: str) -> Tensor:
        """y0 + alpha t core^T C^T of a given trained core: an earlier stage's change."""
        return cur_epilogue(y0, t, self.core(trained), C, alpha=self.alpha, impl=impl)

    def _decay(self) -> Tensor | None:
        return None if self.importance is None else self.importance.factor

    def _edge(self) -> float:
        """What the gate's values are counted under in this forward pass; 0: they are not."""
        if self.importance is None or not self.training:
            return 0.0
        self._watch()
        return self.importance_decay.edge

    def _watch(self) -> None:
        if self.importance is not None and self.core_parameter().requires_grad:
            self.importance.watch(self.core_parameter())

    def _count(self, moved: Tensor, gated: Tensor) -> None:
        if self.importance is not None and self.training:
            self.importance.add(moved, gated.numel())

    def core(self, trained: Tensor | None = None) -> Tensor:
        """The core (r, r) between C and R, differentiable: S_c^-1 V S_r^-T for a folded basis."""
        if not self.calibrated and self.training and torch.is_grad_enabled():
            raise RuntimeError(NOT_CALIBRATED.format(self.basis, CALIBRATED[self.basis]))
        with self._without_autocast():
            parameters = self.core_parameters() if trained is None else (trained,)
            return folded_core(parameters, self.fold_c, self.fold_r)

    def cores(self, adapters: "list[Adapter]") -> Tensor:
        """``core`` of several adapters (A, r, r) that share this one's columns, rows and basis,
        long-term cores included."""
        with self._without_autocast():
            cores = self.trained_cores(adapters)
            earlier = [adapter.long_core() for adapter in adapters]
            if any(core is not None for core in earlier):
                none = torch.zeros_like(cores[0])
                cores = cores + torch.stack([none if core is None else core for core in earlier])
            return folded_core((cores,), self.fold_c, self.fold_r)

    def _without_autocast(self):
        device = self.cols.device.type
        if not torch.is_autocast_enabled(device):
            return nullcontext()  # the other takes as long as the products in it
        return torch.autocast(device, enabled=False)

    def _whole_core(self) -> Tensor:
        """What is trained and what M2 stages have left, as one; detached."""
        trained, earlier = self.trained_core().detach(), self.long_core()
        return trained if earlier is None else trained + earlier

    @torch.no_grad()
    def core_size(self) -> Tensor:
        """||V||_F^2 unit^2 / 2 of a calibrated basis's core, (): about the change of the base
        model's predictions by this layer alone, in nats a token."""
        return (self._whole_core() * self.unit).square().sum() / 2

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Multiplies what this adapter has learned, since the last stage, in front of a gate."""
        for parameter in self.learned_parameters():
            parameter.mul_(factor)

    # C and R.

    def operands(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        trained: Tensor | None = None,
        first: Tensor | None = None,
    ) -> CurOperands:
        """Of this change of W. C and R are indices while tied to W, else the stored matrices, or
        the slices of ``first``, a W that the layer has left; in W's dtype, which FSDP's mixed
        precision changes for the forward pass."""
        cols, rows, C, R = self.cols, self.rows, None, None
        if self.C is not None or first is not None:
            (C, R), cols, rows = self.C_and_R(first), None, None
            if C.dtype != weight.dtype:
                C, R = C.to(weight.dtype), R.to(weight.dtype)
        return CurOperands(
            weight,
            bias,
            self.core(trained),
            cols,
            rows,
            C,
            R,
            self.adapter_bias,
            self._decay(),
            self.alpha,
            self.norm,
        )

    def C_and_R(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """C (N, r) and R (r, K)."""
        if self.C is not None:
            return self.C, self.R
        return weight.index_select(1, self.cols), weight.index_select(0, self.rows)

    @torch.no_grad()
    def _set_basis(self, weight: Tensor) -> None:
        """Folds the r x r factors of the orthonormal bases into the core, or stores the bases
        where the factors are ill conditioned for the weight's dtype."""
        Q_c, S_c, Q_r, S_r = orthonormal_basis(*self.C_and_R(weight))
        worst = max(float(torch.linalg.cond(S)) for S in (S_c, S_r))
        if worst > LARGEST_CONDITION.get(weight.dtype, LARGEST_CONDITION_WIDE):
            self._store(Q_c, Q_r.T, weight.dtype)
            return
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.fold_c, self.fold_r = (fold.to(wide) for fold in orthonormal_folds(S_c, S_r))

    def _store(self, C: Tensor, R: Tensor, dtype: torch.dtype) -> None:
        self.C, self.R = C.to(dtype).contiguous(), R.to(dtype).contiguous()
        if self.basis == "orthonormal":  # then C and R are orthonormal themselves
            self.fold_c = self.fold_r = None

    @torch.no_grad()
    def whiten(self, fold_c: Tensor, fold_r: Tensor, unit: float) -> None:
        """Sets the folds of the whitened basis; what earlier stages have learned stays the change
        that it is.

        Args:
            fold_c, fold_r: (r, r), invertible. unit: ||V||_F^2 unit^2 / 2 is about the change of
                the base model's predictions, in nats a token.
        """
        earlier = self.long_core()
        if earlier is not None:
            between = folded_core((earlier,), self.fold_c, self.fold_r).double()
            earlier = torch.linalg.inv(fold_c) @ between @ torch.linalg.inv(fold_r)
            self.set_long_core(earlier.to(self.core_parameter().dtype))
        wide = torch.promote_types(self.core_parameter().dtype, torch.float32)
        self.fold_c, self.fold_r = fold_c.to(wide), fold_r.to(wide)
        self._set_unit(unit)

    def _set_unit(self, unit: float) -> None:
        wide = torch.promote_types(self.core_parameter().dtype, torch.float32)
        self.unit = torch.tensor(unit, dtype=wide, device=self.cols.device)
        self.shared_key, self.calibrated = None, True

    @torch.no_grad()
    def choose(self, cols: Tensor, rows: Tensor, weight: Tensor) -> None:
        """Other columns and rows of W, for a basis that is to be calibrated."""
        stored = self.C is not None
        self.cols, self.rows, self.C, self.R, self.stale = cols, rows, None, None, False
        if stored:
            self.untie(weight)

    def learned_parameters(self) -> list[nn.Parameter]:
        """Those that are zero at the start."""
        return [p for p in (self.core_parameter(), self.adapter_bias) if p is not None]

    @torch.no_grad()
    def begin_anew(self) -> None:
        """The change is zero, as before training."""
        for parameter in self.learned_parameters():
            parameter.zero_()
        self.set_long_core(None)
        self.forget_past()

    def untied_C_and_R(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """C and R as ``untie`` would store them: orthonormal ones for that basis."""
        if self.C is not None:
            return self.C, self.R
        return self._C_and_R_of(weight)

    def _C_and_R_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """C (N, r) and R (r, K) that the columns and rows of W give: orthonormal ones for that
        basis."""
        C, R = weight[:, self.cols.to(weight.device)], weight[self.rows.to(weight.device)]
        if self.basis == "orthonormal":
            C, _, Q_r, _ = orthonormal_basis(C, R)
            R = Q_r.T
        return C.to(weight.dtype), R.to(weight.dtype)

    def untie(self, weight: Tensor) -> None:
        """Stores C and R, so that W may change."""
        if self.C is None:
            self._store(*self.untied_C_and_R(weight), weight.dtype)

    def has_C_and_R_of(self, weight: Tensor) -> bool:
        """Whether the stored C and R are what the columns and rows of W give: to the bit in the
        coarser dtype of the two; orthonormal ones to a rounding of each element, and where W is in
        another dtype to a rounding of the whole, which quantising W exceeds. Those of a natural
        basis are of no columns and rows."""
        if self.basis == "natural" and self.calibrated:
            return False
        for here, stored in zip(self._C_and_R_of(weight), (self.C, self.R), strict=True):
            same = here.dtype == stored.dtype
            coarser = max(here.dtype, stored.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            eps = torch.finfo(coarser).eps if self.basis == "orthonormal" else 0.0
            stored = stored.to(here.device, coarser).double()
            off = here.to(coarser).double() - stored
            near = off.norm() <= eps * stored.norm()  # NaN: not
            if not near or (same and not (off.abs() <= 2 * eps * (stored.abs() + eps)).all()):
                return False
        return True

    @torch.no_grad()
    def derive(self, weight: Tensor) -> None:
        """Recomputes what derives from the weight and the indices."""
        self.shared_key, self.stale = None, False
        if self.C is not None:
            self._store(self.C, self.R, weight.dtype)
        elif self.basis == "orthonormal":
            self._set_basis(weight)
        if self.basis in CALIBRATED:  # a unit of zero is a place that no file has filled
            self.calibrated = self.unit is not None and bool(self.unit)
        if self.importance is not None:
            self.importance.measure(weight)
            self._watch()  # loading may have replaced the parameter

    # The change as a matrix.

    @torch.no_grad()
    def delta(self, weight: Tensor, trained: Tensor | None = None) -> Tensor:
        """delta_W (N, K) of a trained core, float32 (float64 for a float64 weight)."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        core = self.core(trained).to(wide)
        return delta_weight(core, *(side.to(wide) for side in self.C_and_R(weight)), self.alpha)

    @torch.no_grad()
    def effective(self, weight: Tensor, first: Tensor | None = None) -> Tensor:
        """W_eff (N, K): S-MagNorm of W and delta_W, for a gate in the weight domain. ``first``: see
        ``linear``."""
        return effective_weight(self.operands(weight, first=first))[0]

    def is_linear(self) -> bool:
        """Whether the layer is a linear map of x, so that it can be merged: not where something is
        being learned through a gate on outputs."""
        return (
            self.norm is None
            or self.norm.domain == "weight"
            or not any(p.any() for p in self.learned_parameters())
        )

    @torch.no_grad()
    def merged_matrix(self, weight: Tensor, onto: Tensor | None = None) -> Tensor:
        """W (N, K) with all that was learned, stages included; float32, or float64 for a float64
        one. ``is_linear`` must hold.

        Args:
            onto: what the change is added to in the place of W, where it is a sum (no gate).
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        if self.norm is not None and self.norm.domain == "weight":
            return self.effective(self.stage_matrix(weight), weight).to(wide)
        return self.whole_delta(weight).add_(weight if onto is None else onto)

    def whole_delta(self, weight: Tensor) -> Tensor:
        """delta_W (N, K) of what is trained, of earlier stages and earlier bases."""
        return self.delta(weight, self._whole_core()) + self.past_delta()

    def stage_matrix(self, weight: Tensor) -> Tensor:
        """The matrix (N, K) that a gate divides: W and, after stages, what they have left."""
        earlier = self.long_core()
        if earlier is None:
            return weight
        return self.delta(weight, earlier).add_(weight).to(weight.dtype)

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """C (N, q), core (q, q), R (q, K) with delta_W = C core R, M2 stages and the past included;
        q = r without a past. Detached."""
        (C, R), core = self.C_and_R(weight), self.alpha * self.core(self._whole_core())
        if self.C_past is None:
            return C, core, R
        unit = torch.eye(len(self.R_past), dtype=core.dtype, device=core.device)
        return (
            torch.cat([self.C_past, C], 1),
            torch.block_diag(unit, core),
            torch.cat([self.R_past, R]),
        )

    # State.

    def settings(self) -> dict:
        """What an adapter and a saved state must agree on, as JSON values."""
        decay = self.importance_decay
        return dict(
            alpha=self.alpha,
            basis=self.basis,
            norm=None if self.norm is None else self.norm.to_dict(),
            importance_decay=None if decay is None else asdict(decay),
        )

    def __prepare_scriptable__(self) -> None:  # called by torch.jit.script
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__name__}, whose passes are "
            "registered ops: use torch.compile or torch.export"
        )

    def __setstate__(self, values: dict) -> None:
        super().__setstate__(values)
        self._watch()  # in the first compiled forward pass it would be compiled again
