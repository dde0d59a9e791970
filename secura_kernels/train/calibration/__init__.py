"""Measures what is to be kept: ``calibrate(model)`` gives a basis its metric.

One run of some thousand general tokens through the model, forwards and backwards. The loss is that
of labels drawn from the model's own predictions, so that Gamma = E[g g^T] of the outputs' gradients
is the Fisher metric's (K-FAC, arXiv 1503.05671), and no labels are needed. ``"whitened"`` adds up
two r x r sums a layer; ``"natural"`` a diagonal and a low-rank part of Sigma = E[x x^T] and Gamma,
and takes passes over some batches of the task. Nothing of K x K or N x N is formed for wide layers.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_int, check_number, fail
from ..adapted import without_adapters
from ..own_text import own_text
from . import experts, natural, quiet, task_gate, whitened
from .coverage import check_finite, complete_experts, unreached, without_enough
from .layers import calibrated_layers, check_start, from_the_start, has_learned, one_basis, refresh
from .measuring import Layers, measure, own_loss, task_loss

DAMPING = {"whitened": 0.01, "natural": 0.1}


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        tokens: how many tokens of general text each layer saw, by its name.
        unit: of the cores, the same in every layer: ||V||_F^2 unit^2 / 2 is about the change of the
            base model's predictions, in nats a token, for a layer's trained core V.
        left_out: layers that saw too few tokens, or that the task does not reach, and experts that
            did, as ``"name[3]"``; their bases are orthonormal.
        moments: what ``keep`` of a later call joins to what it measures: sums, no text.
    """

    tokens: dict[str, int]
    unit: float
    left_out: tuple[str, ...]
    moments: dict[str, Any] = field(repr=False)


def calibrate(
    model: nn.Module,
    general: Iterable | None = None,
    task: Iterable | None = None,
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    keep: Calibration | None = None,
    weight: float = 1.0,
    tokens: int = 4096,
    tokenizer: Any = None,
    damping: float | None = None,
    rank: int = 256,
    gated: bool = False,
    selection: str | None = None,
    too_few: str = "error",
    restart: bool = False,
    adapter_name: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Gives every layer with ``basis="whitened"`` or ``"natural"`` the metric of what the model is
    to keep, and with ``"natural"`` the directions of what it is to learn.

    For plain layers and for PEFT models, on any device, under autocast, with activation
    checkpointing; under DDP and FSDP2 each rank brings its own share of the text and the sums are
    added. A later call leaves the outputs what they are. With ``"natural"`` it moves on to another
    task: what the layers have learned joins what they start from. With ``"whitened"`` it may follow
    ``stage_m1`` or ``stage_m2``. To keep a task that is done:

        first = calibrate(model, general, task_a)
        ...                                                    # train on task A
        calibrate(model, batches_of_a, task_b, keep=first)

    Args:
        general: batches of general text: dicts of what the model's forward takes (``input_ids``,
            ``attention_mask``; ``labels`` are left out), or tensors, its one argument. None, and
            no ``keep``: the model without its adapters writes its own, from its own starts of
            chats and documents; see ``own_text``.
        task: with ``"natural"``: some 8 batches of the task, as the model takes them, with
            ``labels``; gone through twice, so that their gradient gives the basis. Better others
            than those that training begins with: on these a step goes too far.
        loss: of the model and a batch of ``task``, on the model's device: its mean loss. None: the
            ``loss`` of what the model returns.
        keep: of an earlier call on this model: its statistics join those of ``general``, or are
            all there is where that is None.
        weight: how much the statistics of ``general`` count beside those of ``keep``, >= 0.
        tokens: how many the model writes; ``general`` is taken whole.
        tokenizer: for a chat model that writes its own text: gives it its chat template.
        damping: what is added to a moment's diagonal, as a part of the mean diagonal, > 0: the
            less, the further a core may move what general text seems not to use. None: 0.01, and
            0.1 with ``"natural"``.
        rank: with ``"natural"``: of what is kept of Sigma and Gamma beside their diagonals, from 0;
            (N + K) (rank + 2) numbers a layer while it runs.
        gated: with ``"natural"``: each layer changes a token by as much as that looks like the
            task rather than like what is to be kept (``nn/task_gate.py``). Much more is kept, and
            the layers are no linear maps: they cannot be merged or saved as a LoRA. The task's
            batches go forwards once more.
        selection: with ``"whitened"``: ``"quiet"`` takes the rows and columns of W that answer
            general text least, in one more pass of it. None: those that the layers have.
        too_few: where a layer saw fewer tokens than its rank (an expert that general text never
            reaches), or the task never reaches it: ``"error"``, or ``"orthonormal"`` for that
            basis's coordinates there, with the same size of a change; ``left_out`` of what is
            returned names such layers. One of stacked experts always takes it, with a warning.
        restart: calibrate although training has begun; the cores are zero again, and nothing is
            left of what was learned.
        adapter_name: of a PEFT model; None: the active one.
        seed: of the text, of the drawn labels and of the random products.

    Returns:
        what was measured.

    Raises:
        ValueError: an argument outside these; a model without such layers; no batches; statistics
            that are not finite, or of too few tokens. RuntimeError: merged layers; training has
            begun. The model is then unchanged.
    """
    check_number("weight", weight, "a finite number >= 0", 0)
    check_int("tokens", tokens, 1, 2**31)
    if damping is not None:
        check_number("damping", damping, "None or a finite number > 0", 0, open_low=True)
    check_int("rank", rank, 0, 2**31)
    check_choice("gated", gated, (True, False))
    check_choice("selection", selection, (None, "quiet"))
    check_choice("too_few", too_few, ("error", "orthonormal"))
    check_choice("restart", restart, (True, False))
    layers = dict(calibrated_layers(model, adapter_name))
    basis = one_basis(model, layers)
    check_start(layers, restart)
    if basis == "whitened":
        for argument, value in (("task", task), ("loss", loss)):
            if value is not None:
                raise fail(argument, type(value).__name__, "None: no layer has basis='natural'")
        if gated:
            raise fail("gated", gated, "False: no layer has basis='natural'")
    elif selection is not None:
        raise fail(
            "selection",
            selection,
            "None with basis='natural', which takes no columns and rows of W",
        )
    else:
        task = _listed(task)
        _check_without_norm(layers, gated)
    if selection == "quiet" and any(adapter.stack for _, adapter in layers.values()):
        raise fail("selection", selection, "None with stacked experts (target_parameters)")
    if selection == "quiet" and keep is not None:
        raise fail(
            "keep",
            type(keep).__name__,
            "None with selection='quiet', which changes what is measured",
        )
    damping = DAMPING[basis] if damping is None else damping
    device = next(iter(layers.values()))[1].cols.device

    def over_general(collectors: dict) -> None:
        assert general is not None
        measure(
            model, layers, collectors, general, own_loss(model, seed, device), "general", progress
        )

    def over_task(collectors: dict, backward: bool = True) -> None:
        assert task is not None
        measure(
            model,
            {name: layers[name] for name in collectors},
            collectors,
            task,
            task_loss(model, loss),
            "task",
            progress,
            labels=True,
            backward=backward,
        )

    with from_the_start(layers) if restart else nullcontext():
        if general is None and keep is None:
            with without_adapters(model):  # what the base would say, and sooner
                general = list(
                    own_text(model, tokens, tokenizer=tokenizer, seed=seed, progress=progress)
                )
        chosen = {}
        if selection == "quiet":
            assert general is not None  # keep is None here
            general = list(general)
            energies = {name: quiet.Energies(*layer) for name, layer in layers.items()}
            over_general(energies)
            chosen = {
                name: energies[name].quietest(adapter.r, name)
                for name, (_, adapter) in layers.items()
            }
        moments: dict[str, Any] = {}
        tests: dict[tuple[int, int], Tensor] = {}
        if general is not None:
            moments = {
                name: natural.Moments(layer[1], rank, seed, tests)
                if basis == "natural"
                else experts.Moments(*layer)
                if layer[1].stack
                else whitened.Moments(*layer, chosen.get(name))
                for name, layer in layers.items()
            }
            over_general(moments)
            check_finite(moments)
        seen = {name: int(each.tokens) for name, each in moments.items()}
        if keep is not None:
            moments = _joined(keep, moments, weight, layers)
        few = without_enough(layers, moments, seen, too_few)
        known = {name: layer for name, layer in layers.items() if name not in few}
        if basis == "whitened":
            found = {name: moments[name].folds(damping) for name in known}
        else:
            found = natural.natural_sides(known, moments, damping, over_task, seed)
            few += unreached(found, too_few)
            found = {name: sides for name, sides in found.items() if sides is not None}
        whole, unit = _in_one_unit(found)
        gates: dict[str, Tensor] = {}
        if gated:
            of_task = {name: task_gate.Projected(R) for name, (_, R, _) in whole.items()}
            over_task(of_task, backward=False)
            gates = {
                name: task_gate.discriminant(moments[name].x, each)
                for name, each in of_task.items()
            }
        for name in few:
            orthonormal = (
                moments[name].folds_without_metric()
                if basis == "whitened"
                else natural.sides_without_metric(*layers[name])
            )
            whole[name] = (*orthonormal, math.nan)
        few += complete_experts(whole, moments)
        learned = any(has_learned(adapter) for _, adapter in layers.values())
    for name, (module, adapter) in layers.items():
        if basis == "natural":
            adapter.move_on(*whole[name], module.base_matrix(), learned, gates.get(name))
        else:
            if chosen:
                adapter.choose(*chosen[name], module.base_matrix())
            adapter.whiten(*whole[name])
        refresh(module)
    return Calibration(seen if keep is None else seen or keep.tokens, unit, tuple(few), moments)


def _check_without_norm(layers: Layers, gated: bool) -> None:
    for name, (_, adapter) in layers.items():
        if gated and adapter.norm is not None:
            raise fail("gated", gated, f"False, as layer {name!r} has a norm, a gate of its own")


def _listed(task: Iterable | None) -> list:
    if task is None:
        raise fail(
            "task",
            None,
            "some batches of the task with basis='natural', whose gradient "
            "gives the directions to learn in",
        )
    task = list(task)
    if not task:
        raise fail("task", task, "at least one batch")
    return task


def _joined(
    keep: Calibration, moments: dict[str, Any], weight: float, layers: Layers
) -> dict[str, Any]:
    """The statistics of an earlier call with those measured now."""
    if not isinstance(keep, Calibration):
        raise fail("keep", type(keep).__name__, "None or what an earlier calibrate() returned")
    for name in layers:
        kept, new = keep.moments.get(name), moments.get(name)
        sums = [part.shape for part in kept.sums] if kept is not None else None
        if sums is None or (new is not None and sums != [part.shape for part in new.sums]):
            raise fail(
                "keep",
                f"statistics of {len(keep.moments)} layers",
                "of an earlier "
                f"calibrate() of this model, with the same basis and ranks: {name!r} "
                "has none in it, or others",
            )
    return {
        name: keep.moments[name].joined(moments[name], weight) if moments else keep.moments[name]
        for name in layers
    }


def _in_one_unit(found: dict[str, tuple]) -> tuple[dict[str, tuple], float]:
    """Both sides of each layer, in a unit that is the same for all, so that a step of the same
    length costs the same in each; and so large that a core changes W by about as much as one
    between orthonormal bases does, which leaves learning rates what they are."""
    unit = math.exp(sum(math.log(size) for *_, size in found.values()) / len(found))
    return {
        name: (unit**0.5 * left, unit**0.5 * right, unit)
        for name, (left, right, _) in found.items()
    }, unit
