"""Measures what is to be kept: ``calibrate(model)`` gives the whitened basis its metric.

One run of some thousand general tokens through the model, forwards and backwards. Each adapted
layer adds up two r x r sums: of t = x R^T, which it forms from its inputs, and of v = g C, from the
gradient g of its outputs. The loss is that of labels drawn from the model's own predictions, so
that E[g g^T] is the Fisher metric's (K-FAC, arXiv 1503.05671), and no labels are needed. Nothing of
K x K or N x N is formed.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .adapter import Adapter
from .bases import inverse_root, orthonormal_basis, orthonormal_folds
from .checks import check_choice, check_int, check_number, fail
from .own_text import own_text
from .retention import evaluating


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        tokens: how many tokens each layer saw, by its name.
        unit: of the cores, the same in every layer: ||V||_F^2 unit^2 / 2 is about the change of the
            base model's predictions, in nats a token, for a layer's trained core V.
        left_out: layers that saw too few tokens and have an orthonormal basis's folds.
    """

    tokens: dict[str, int]
    unit: float
    left_out: tuple[str, ...]


class _Moments:
    """Sums of one layer: t^T t and v^T v (r, r), float64, and how many tokens."""

    def __init__(self, adapter: Adapter) -> None:
        shape = dict(dtype=torch.float64, device=adapter.cols.device)
        self.t, self.v = (torch.zeros(adapter.r, adapter.r, **shape) for _ in range(2))
        self.tokens = torch.zeros((), **shape)

    def add(self, t: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """t, v: (..., r). mask: of the tokens that count, where it is of their shape."""
        t, v = (part.reshape(-1, part.shape[-1]).double() for part in (t, v))
        if mask is not None and mask.numel() == len(t):
            t, v = (part[mask.reshape(-1)] for part in (t, v))
        self.t += t.mT @ t
        self.v += v.mT @ v
        self.tokens += len(t)


class _Probe(torch.autograd.Function):
    """A layer's output, unchanged. What is measured is measured in the backward pass, which
    activation checkpointing runs once for each token, and the forward pass twice."""

    @staticmethod
    def forward(ctx, y, t, C, anchor, measure):
        ctx.save_for_backward(t, C)
        ctx.measure = measure
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g):
        t, C = ctx.saved_tensors
        ctx.measure(t, g @ C.to(g.dtype))
        return g, None, None, None, None


def calibrate(
    model: nn.Module,
    general: Iterable | None = None,
    *,
    tokens: int = 4096,
    tokenizer=None,
    damping: float = 0.01,
    too_few: str = "error",
    restart: bool = False,
    adapter_name: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Gives every layer with ``basis="whitened"`` the metric of what the model is to keep.

    For plain layers and for PEFT models, on any device, under autocast, with activation
    checkpointing; under DDP and FSDP2 each rank brings its own share of the text and the sums are
    added. A later call (between tasks, after ``stage_m1`` or ``stage_m2``) measures anew and leaves
    the outputs what they are.

    Args:
        general: batches of general text: dicts of what the model's forward takes (``input_ids``,
            ``attention_mask``; ``labels`` are left out), or tensors, its one argument. None: the
            model writes its own, from its own start of a chat or of a text; see ``own_text``.
        tokens: how many the model writes; ``general`` is taken whole.
        tokenizer: for a chat model that writes its own text: gives it its chat template.
        damping: what is added to a moment's diagonal, as a part of the mean diagonal, > 0: the
            less, the further a core may move what general text seems not to use.
        too_few: where a layer saw fewer tokens than its rank (an expert that general text never
            reaches): ``"error"``, or ``"orthonormal"`` for that basis's coordinates there, with
            the same size of a change; ``left_out`` of what is returned names such layers.
        restart: calibrate although training has begun; the cores are zero again.
        adapter_name: of a PEFT model; None: the active one.
        seed: of the text and of the drawn labels.

    Returns:
        what was measured.

    Raises:
        ValueError: an argument outside these; a model without such layers; no batches; statistics
            that are not finite, or of too few tokens. RuntimeError: merged layers; training has
            begun. The model is then unchanged.
    """
    check_int("tokens", tokens, 1, 2**31)
    check_number("damping", damping, "a finite number > 0", 0, open_low=True)
    check_choice("too_few", too_few, ("error", "orthonormal"))
    check_choice("restart", restart, (True, False))
    layers = dict(_whitened(model, adapter_name))
    if not layers:
        raise fail("model", type(model).__name__, "one with layers of basis='whitened'")
    _check_start(layers, restart)
    if general is None:
        general = own_text(model, tokens, tokenizer=tokenizer, seed=seed, progress=progress)
    moments = _measure(model, layers, general, seed, progress)
    few = _too_few(layers, moments, too_few)
    folds = {name: _folds(module, adapter, moments[name], damping)
             for name, (module, adapter) in layers.items() if name not in few}
    # One unit for all layers, so that a step of the same length costs the same in each; so large
    # that a core changes W by about as much as one between orthonormal bases does, which leaves
    # learning rates what they are.
    unit = math.exp(sum(math.log(size) for *_, size in folds.values()) / len(folds))
    whole = {name: (unit**0.5 * fold_c, unit**0.5 * fold_r, unit)
             for name, (fold_c, fold_r, _) in folds.items()}
    for name in few:
        _, S_c, _, S_r = orthonormal_basis(*_sides(*layers[name]))
        whole[name] = (*orthonormal_folds(S_c, S_r), math.nan)
    for name, (_, adapter) in layers.items():
        if restart:
            with torch.no_grad():
                adapter.core_parameter().zero_()
        adapter.whiten(*whole[name])
    return Calibration({n: int(m.tokens) for n, m in moments.items()}, unit, tuple(few))


def _whitened(model: nn.Module,
              adapter_name: str | None) -> Iterator[tuple[str, tuple[nn.Module, Adapter]]]:
    """Each layer with a whitened basis, by name, and its adapter, which a plain layer is itself."""
    for name, module in model.named_modules():
        if not hasattr(module, "change_factors"):
            continue
        if isinstance(module, Adapter):
            found = module
        else:
            names = module.active_adapters if adapter_name is None else [adapter_name]
            held = [n for n in names if n in module.secura_adapter]
            if len(held) > 1:
                raise fail("adapter_name", adapter_name, f"one of {held}, all of which are active")
            found = module.secura_adapter[held[0]] if held else None
        if found is not None and found.basis == "whitened":
            yield name, (module, found)


def _check_start(layers: dict, restart: bool) -> None:
    for name, (module, adapter) in layers.items():
        if module.merged:
            raise RuntimeError(f"layer {name!r} is merged: unmerge before calibrate()")
        if not restart and adapter.core_parameter().any():
            raise RuntimeError(
                f"layer {name!r} has been trained: calibrate before training, or after a stage "
                "(stage_m1, stage_m2), or pass restart=True, which sets the cores to zero")


def _measure(model: nn.Module, layers: dict, general: Iterable, seed: int,
             progress: bool) -> dict[str, _Moments]:
    """The sums of every layer over all batches, of all ranks."""
    moments = {name: _Moments(adapter) for name, (_, adapter) in layers.items()}
    device = next(iter(layers.values()))[1].cols.device
    generator = torch.Generator(device).manual_seed(seed)
    anchor = torch.zeros((), device=device, requires_grad=True)  # every output needs a gradient
    mask: list[Tensor | None] = [None]

    def probe(name: str):
        module, adapter = layers[name]

        def hook(_, args, kwargs, y):
            x = args[0] if args else next(iter(kwargs.values()))
            C, R = _sides(module, adapter)
            if y.shape[-1] != len(C) or x.shape[-1] != R.shape[1]:
                raise RuntimeError(f"layer {name!r} is sharded by tensor parallelism, which "
                                   "calibrate() does not know: calibrate one whole model")
            t = F.linear(x.detach(), R.to(x.dtype))
            return _Probe.apply(y, t, C, anchor,
                                lambda t, v: moments[name].add(t, v, mask[0]))

        return module.register_forward_hook(hook, with_kwargs=True)

    count = 0
    with ExitStack() as stack:
        stack.enter_context(_frozen(model, [adapter for _, adapter in layers.values()]))
        for name in layers:
            stack.callback(probe(name).remove)
        stack.enter_context(torch.enable_grad())
        for batch in tqdm(general, desc="calibrate", unit="batch", disable=not progress,
                          file=sys.stderr):
            count += 1
            inputs = _inputs(batch, device, count)
            found = inputs.get("attention_mask")
            mask[0] = None if found is None or found.ndim != 2 else found.bool()
            _own_loss(_logits(model, inputs), mask[0], generator).backward()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for each in moments.values():
            for value in (each.t, each.v, each.tokens):
                torch.distributed.all_reduce(value)
    if not any(bool(each.tokens) for each in moments.values()):
        raise fail("general", general, "at least one batch whose tokens reach a layer")
    return moments


@contextmanager
def _frozen(model: nn.Module, adapters: list[Adapter]) -> Iterator[None]:
    """Nothing is trained; evaluation mode, but outside adapters where activation checkpointing
    needs the other."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with ExitStack() as stack:
        checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        for module in adapters if checkpointed else [model]:
            stack.enter_context(evaluating(module))
        stack.callback(lambda: [p.requires_grad_(True) for p in trained])
        for parameter in trained:
            parameter.requires_grad_(False)
        yield


def _inputs(batch: object, device: torch.device, number: int) -> dict:
    """What the model's forward takes, by name ("" for its one argument), on the device."""
    if isinstance(batch, Tensor):
        batch = {"": batch}
    if not isinstance(batch, dict) and not hasattr(batch, "keys"):
        raise fail(f"general[{number - 1}]", type(batch).__name__, "a dict or a tensor")
    return {k: batch[k].to(device) if isinstance(batch[k], Tensor) else batch[k]
            for k in batch if k != "labels"}


def _logits(model: nn.Module, inputs: dict) -> Tensor:
    only = inputs.get("")
    out = model(**inputs) if only is None else model(only)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise fail("model's output", type(out).__name__, "logits (..., classes), or with .logits")
    return logits


def _own_loss(logits: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """The summed loss of labels drawn from the predictions themselves."""
    if mask is not None and mask.shape == logits.shape[:-1]:
        logits = logits[mask]
    logits = logits.reshape(-1, logits.shape[-1]).float()
    if not logits.isfinite().all():
        raise ValueError("the model's predictions on general text are not finite")
    with torch.no_grad():
        labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, labels, reduction="sum")


def _too_few(layers: dict, moments: dict[str, _Moments], too_few: str) -> list[str]:
    """The layers that general text says too little of."""
    found = []
    for name, (_, adapter) in layers.items():
        sums = moments[name]
        if not (sums.t.isfinite().all() and sums.v.isfinite().all()):
            raise ValueError(f"layer {name!r}: its inputs or gradients on general text are not "
                             "finite; the model gives NaN there, or float16 overflows")
        if sums.tokens >= adapter.r and sums.t.any() and sums.v.any():
            continue
        if too_few == "error":
            raise ValueError(
                f"layer {name!r} saw {int(sums.tokens)} tokens of general text, fewer than its "
                f"rank {adapter.r}, or they do not reach the predictions: bring more text, or pass "
                "too_few='orthonormal'")
        found.append(name)
    if len(found) == len(layers):
        raise ValueError("no layer saw enough general text: bring more")
    return found


def _folds(module: nn.Module, adapter: Adapter, sums: _Moments,
           damping: float) -> tuple[Tensor, Tensor, float]:
    """A layer's folds, and what to multiply them with (half each) so that a core changes W by as
    much as between orthonormal bases: ||C A V B R||_F^2 is on average ||C A||_F^2 ||B R||_F^2 for a
    V of independent unit elements, where orthonormal bases give r^2."""
    C, R = _sides(module, adapter)
    fold_c, fold_r = (inverse_root(m / sums.tokens, damping) for m in (sums.v, sums.t))
    return fold_c, fold_r, adapter.r / float((C.double() @ fold_c).norm()
                                             * (fold_r @ R.double()).norm())


def _sides(module: nn.Module, adapter: Adapter) -> tuple[Tensor, Tensor]:
    return tuple(side.detach() for side in adapter.sides(
        None if adapter.C is not None else module.base_matrix()))
