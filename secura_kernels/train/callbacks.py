"""Callbacks of transformers' Trainer: log and limit what a model forgets; take SECURA's stages."""

import logging
import sys
from collections.abc import Callable, Iterable

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..checks import check_choice, check_int, check_number, fail
from .budget import Budget
from .drift import drift, gradient_norms
from .retention import base_loss

logger = logging.getLogger(__name__)

PREFIX = "retention/"


class RetentionCallback(TrainerCallback):
    """Logs while training how far the model has moved from its base, and stops it at a limit.

        trainer = Trainer(model=model, ...)
        callback = RetentionCallback(held_out, every=50, forgetting_limit=0.1).attach(trainer)
        trainer.train()
        callback.stopped  # None, or why it stopped

    ``attach`` is needed, and enough: transformers gives a callback no way to log, so it goes
    through ``Trainer.log``, which writes ``state.log_history`` and to every reporter (TensorBoard
    shows the names under ``train/``). Logged before the first step, every ``every`` optimiser
    steps, and at the last one, under ``retention/``:

    ``drift_mean``, ``drift_max``, ``spectral``, ``singular_values``: over the adapted layers, the
        mean and the largest relative drift, and the means of the spectral and the nuclear norm
        (see ``drift.drift``).
    ``gradient_norm``: of all trained parameters, as the optimiser gets it: averaged over the
        processes, unscaled and clipped. Missing before the first step, and where another
        callback stops training off schedule.
    ``kl``, ``predicted_kl``: with ``budget``: how far the model's predictions on ``batches`` are
        from its base's, in nats a token (``retention.base_kl``), measured and predicted. The
        prediction costs no pass of the model, and is logged whenever the Trainer logs too: the size
        of the cores (``retention.core_size``) times the ratio of both at the last measurement.
        Cores that grew to twice their size since then are measured anew, so it is never far off.
    ``base_loss``, ``forgetting``: with ``batches``: the loss on them (``retention.base_loss``), and
        that less the loss before training. A resumed run finds the latter in the log history of
        its checkpoint, so it stays that of the first start.

    With several processes all of them measure and the main process's numbers decide.

    Args:
        batches: what the model is not to forget: dicts of tensors with ``labels``, as the model
            takes them. Read once, here, and kept.
        every: optimiser steps between measurements.
        drift_limit: training stops once ``drift_max`` is above it, or not a number.
        forgetting_limit: training stops once ``forgetting`` is above it, or not a number.
        budget: nats a token, > 0, that ``kl`` may cost; for layers with ``basis="whitened"`` or
            ``"natural"``. batches are then general text, and need no labels.
        at_budget: ``"stop"``: training stops once ``kl`` is above the budget. ``"hold"``: it goes
            on with the cores shrunk after each step to where ``predicted_kl`` is the budget.

    Raises:
        ValueError: an argument outside these; at the start of training a model without adapted
            layers, or one whose parameters are sharded (FSDP, DeepSpeed): no process has them.
        RuntimeError: at the start of training, when not attached.
    """

    def __init__(
        self,
        batches: Iterable[dict[str, Tensor]] | None = None,
        *,
        every: int = 100,
        drift_limit: float | None = None,
        forgetting_limit: float | None = None,
        budget: float | None = None,
        at_budget: str = "stop",
    ) -> None:
        self.every = check_int("every", every, 1, sys.maxsize)
        self.limits = {}
        for name, limit in (("drift_max", drift_limit), ("forgetting", forgetting_limit)):
            if limit is not None:
                argument = name.removesuffix("_max") + "_limit"
                self.limits[name] = check_number(argument, limit, "None or a number from 0", 0)
        self.batches = None if batches is None else list(batches)
        if self.batches is not None and not self.batches:
            raise fail("batches", self.batches, "None or at least one batch")
        if self.batches is None and forgetting_limit is not None:
            raise fail("forgetting_limit", forgetting_limit, "None without batches")
        check_choice("at_budget", at_budget, ("stop", "hold"))
        self.budget: Budget | None = None
        if budget is not None:
            check_number("budget", budget, "None or a number > 0", 0, open_low=True)
            if self.batches is None:
                raise fail("budget", budget, "None without batches, on which it is measured")
            self.budget = Budget(budget, at_budget == "hold", self.batches)
        self.trainer: Trainer | None = None
        self.stopped: str | None = None
        self._gradient_norm: float | None = None
        self._measured_at: int | None = None

    def attach(self, trainer: Trainer) -> "RetentionCallback":
        """Joins ``trainer``, to whose callbacks it adds itself where it is not among them yet."""
        if not isinstance(trainer, Trainer):
            raise fail("trainer", trainer, "a transformers Trainer")
        self.trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module = None,
        **_,
    ) -> None:
        if self.trainer is None:
            raise RuntimeError("RetentionCallback cannot log: call callback.attach(trainer)")
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            raise fail("trainer", "FSDP or DeepSpeed", "one whose processes hold whole parameters")
        self.stopped = self._gradient_norm = self._measured_at = None
        if self.budget is not None:
            self.budget.begin(model)
        # The history, for transformers restores callbacks' own states only when asked to, and then
        # by building them anew, which would lose the batches.
        key = PREFIX + "base_loss"
        self._first_loss = next((logs[key] for logs in state.log_history if key in logs), None)
        if state.global_step == 0 or (self.batches and self._first_loss is None):
            self._log(self._measure(model, state), control)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module = None,
        **_,
    ) -> None:
        step = state.global_step + 1
        self._gradient_norm = None
        if step % self.every == 0 or step >= state.max_steps:
            self._gradient_norm = gradient_norms(model)["total"]

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module = None,
        **_,
    ) -> None:
        if self.budget is not None:
            self.budget.follow(model)
            if control.should_log and state.global_step % self.every:
                self._log(dict(predicted_kl=self.budget.predicted), control)
        over = self.budget is not None and self.budget.stops()
        if state.global_step % self.every == 0 or control.should_training_stop or over:
            self._check(self._measure(model, state), state, control)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module = None,
        **_,
    ) -> None:
        # Where training was stopped after the step's end, as by an evaluation. The end of training
        # is too late: reporters may have closed their files.
        if control.should_training_stop and self._measured_at != state.global_step:
            self._check(self._measure(model, state), state, control)

    def _measure(self, model: nn.Module, state: TrainerState) -> dict[str, float]:
        layers = list(drift(model).values())
        if not layers:
            raise fail("model", type(model).__name__, "a model with adapted layers")
        relative, spectral, nuclear = torch.tensor(
            [(layer.relative, layer.spectral, layer.nuclear) for layer in layers],
            dtype=torch.float64,
        ).T
        values = dict(
            drift_mean=float(relative.mean()),
            drift_max=float(relative.max()),
            spectral=float(spectral.mean()),
            singular_values=float(nuclear.mean()),
        )
        if self._gradient_norm is not None:
            values["gradient_norm"] = self._gradient_norm
        if self.budget is not None:
            predicted = self.budget.predicted
            values |= dict(kl=self.budget.measure(model), predicted_kl=predicted)
        if self.batches is not None and (self.budget is None or "labels" in self.batches[0]):
            values["base_loss"] = base_loss(model, self.batches)
            if self._first_loss is None:
                self._first_loss = values["base_loss"]
            values["forgetting"] = values["base_loss"] - self._first_loss
        self._measured_at = state.global_step
        # Processes may round differently; they must not decide differently.
        return broadcast_object_list([values])[0]

    def _log(self, values: dict[str, float], control: TrainerControl) -> None:
        # Trainer.log clears should_log, which may be set for the Trainer's own record of this step.
        should_log = control.should_log
        assert self.trainer is not None  # or training would not have begun
        self.trainer.log({PREFIX + name: value for name, value in values.items()})
        control.should_log = should_log

    def _check(
        self, values: dict[str, float], state: TrainerState, control: TrainerControl
    ) -> None:
        self._log(values, control)
        passed = [
            f"{name} {values[name]:.6g} is not within its limit {limit:g}"
            for name, limit in self.limits.items()
            if not values[name] <= limit
        ]
        if self.budget is not None and self.budget.stops():
            passed.append(
                f"kl {values['kl']:.6g} nats is not within the budget {self.budget.limit:g}"
            )
        if passed:
            self.stopped = f"step {state.global_step}: " + ", ".join(passed)
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning("training stops at %s", self.stopped)


class StageCallback(TrainerCallback):
    """Takes SECURA's published stages while training: M1 or M2 of every layer that has them.

    A stage falls between two optimiser steps, or epochs, and belongs to the later one: logs,
    evaluation and checkpoint of the earlier see the model as it was trained, a resumed run takes
    the stage that its checkpoint stood before, and none follows the last step, where nothing would
    be trained any more. The optimiser keeps its moments.

    Args:
        kind: ``"m1"`` or ``"m2"``: that of ``stage_m1`` or ``stage_m2``.
        every: optimiser steps between stages; None: one between epochs.

    Raises:
        ValueError: an argument outside these; at the start of training a model without such layers.
    """

    def __init__(self, kind: str, every: int | None = None) -> None:
        self.kind = check_choice("kind", kind, ("m1", "m2"))
        self.every = None if every is None else check_int("every", every, 1, sys.maxsize)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module = None,
        **_,
    ) -> None:
        if not _stages(model, self.kind):
            raise fail("model", type(model).__name__, "a model with CURLoRA or SECURA layers")

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module = None,
        **_,
    ) -> None:
        # A run resumed inside an epoch begins it a second time, at a fraction.
        if self.every is None and state.global_step and state.epoch == round(state.epoch):
            take_stage(model, self.kind)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module = None,
        **_,
    ) -> None:
        if self.every and state.global_step and state.global_step % self.every == 0:
            take_stage(model, self.kind)


def take_stage(model: nn.Module, kind: str) -> None:
    """The stage ``"m1"`` or ``"m2"`` of every CURLoRA and SECURA layer of ``model``."""
    for stage in _stages(model, kind):
        stage()


def _stages(model: nn.Module, kind: str) -> list[Callable[[], None]]:
    return [
        getattr(module, f"stage_{kind}")
        for module in model.modules()
        if hasattr(module, "change_factors")
    ]
