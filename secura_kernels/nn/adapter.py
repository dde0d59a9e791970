"""The change of one frozen weight, alpha C core R: indices, trained core, gate; not the weight.

An adapter holds nothing of W but what it was told to store, so that one weight can serve many
adapters. Methods that need W are given it as ``weight`` (N, K).
"""

from contextlib import nullcontext
from dataclasses import asdict

import torch
from torch import Tensor, nn

from ..backends.operands import CurOperands
from ..bases import BASES
from ..checks import check_choice, check_number, fail
from ..functional.epilogue import cur_epilogue, cur_epilogue_and_moved
from ..functional.linear import cur_linear_and_moved
from ..ops import folded_core
from ..selection import check_indices, check_weight
from ..settings import ImportanceDecay, SMagNorm
from .factors import CALIBRATED, Factors
from .importance import ImportanceState
from .matrix import MatrixForm
from .optional_tensors import OptionalTensors
from .past import Past
from .task_gate import TaskGate

NOT_CALIBRATED = (
    "basis={!r} knows nothing yet of what is to be kept: call "
    "secura_kernels.calibrate(model{}) before training"
)


class Adapter(OptionalTensors, Factors, MatrixForm, Past, TaskGate, nn.Module):
    """What CURLoRA's and SECURA's changes share.

    Args:
        weight: W (N, K), read only. cols, rows: (r,) int64, of which the svd basis takes only how
        many they are. Others: see ``CURLoRALinear``.
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
        self.check(weight, cols, rows)
        check_choice("basis", basis, BASES)
        norm = SMagNorm.of(norm)
        if importance_decay is not None and not isinstance(importance_decay, ImportanceDecay):
            raise fail("importance_decay", importance_decay, "an ImportanceDecay or None")
        if importance_decay is not None and norm is None:
            raise fail(
                "importance_decay", importance_decay, "None without a norm, whose gate it counts"
            )
        *stack, self.out_features, self.in_features = weight.shape
        self.stack = tuple(stack)  # (), or (E,) of experts: see ``nn/experts.py``
        self.r = cols.shape[-1]
        self.alpha = check_number("alpha", alpha, "a finite number", -torch.inf)
        self.basis, self.norm = basis, norm
        self.importance_decay = importance_decay

        self.register_buffer("cols", cols.to(weight.device, copy=True))
        self.register_buffer("rows", rows.to(weight.device, copy=True))
        # C and R only where they are not slices of W.
        for name in ("C", "R", "C_past", "R_past", "unit", "gate", "gate_past"):
            self.register_buffer(name, None)
        # The orthonormal basis's folds derive from W and are never saved; the whitened one's come
        # from text.
        for name in ("fold_c", "fold_r"):
            self.register_buffer(name, None, persistent=basis == "whitened")
        self.calibrated = basis not in CALIBRATED
        self.register_parameter("adapter_bias", None)
        if basis == "orthonormal":
            self._set_basis(weight)
        elif basis == "svd":
            self.untie(weight)
        self.importance = None
        if importance_decay is not None:
            self.importance = ImportanceState(weight, self.r, importance_decay)
        self.stale = False  # cols, rows or a dtype are new, and ``derive`` has not been called
        self.shared_key: tuple | None = None  # see peft/batched.py

    def check(self, weight: Tensor, cols: Tensor, rows: Tensor) -> None:
        """Raises what is wrong with a weight and the indices into it."""
        check_weight(weight)
        check_indices("cols", cols, weight.shape[1])
        check_indices("rows", rows, weight.shape[0])
        if cols.shape != rows.shape:
            raise fail("rows.shape", tuple(rows.shape), f"{tuple(cols.shape)}, the shape of cols")

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
        ticket: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(..., K) -> (..., N): x W^T + bias, changed. ``trained``: (r, r) in the place of what
        ``trained_core`` gives. ``first``: the W of C and R, where ``weight`` is a later one.
        ``ticket``: see ``projections.py``."""
        y, moved = cur_linear_and_moved(
            x, self.operands(weight, bias, trained, first), impl, self._edge(), ticket
        )
        self._count(moved, weight if self.norm and self.norm.domain == "weight" else y)
        return y

    def epilogue(
        self, y0: Tensor, t: Tensor, C: Tensor, impl: str, trained: Tensor | None = None
    ) -> Tensor:
        """(..., N): a base output y0 changed; t = x R^T (..., r), C (N, r) of y0's dtype."""
        layer = CurOperands.of_epilogue(
            self.core(trained),
            C,
            self.adapter_bias,
            self._decay(),
            self.alpha,
            self.norm,
            self.gate,
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
        self._check_calibrated()
        parameters = self.core_parameters() if trained is None else (trained,)
        fold_c, fold_r = self.fold_c, self.fold_r
        if fold_c is None and len(parameters) == 1:
            return parameters[0]
        with self._without_autocast():
            return folded_core(parameters, fold_c, fold_r)

    def cores(self, adapters: "list[Adapter]") -> Tensor:
        """``core`` of several adapters (A, r, r) that share this one's columns, rows and basis,
        long-term cores included; differentiable."""
        for adapter in adapters:
            adapter._check_calibrated()
        with self._without_autocast():
            cores = self.trained_cores(adapters)
            earlier = [adapter.long_core() for adapter in adapters]
            if any(core is not None for core in earlier):
                none = torch.zeros_like(cores[0])
                cores = cores + torch.stack([none if core is None else core for core in earlier])
            return folded_core((cores,), self.fold_c, self.fold_r)

    def _check_calibrated(self) -> None:
        if not self.calibrated and self.training and torch.is_grad_enabled():
            raise RuntimeError(NOT_CALIBRATED.format(self.basis, CALIBRATED[self.basis]))

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
        return (self._whole_core() * self.unit[..., None, None]).square().nansum() / 2

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
            self.gate,
        )

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
