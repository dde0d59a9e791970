"""Batches run through a model, while layers' inputs and the gradients of their outputs are seen.

Nothing is trained, and nothing is left behind.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...checks import fail
from ...functional.experts import Routing
from ...nn.adapter import Adapter
from ..adapted import evaluating

Layers = dict[str, tuple[nn.Module, Adapter]]  # by name: the layer, and its adapter
Batch = dict[str, object]  # what a model's forward takes, by name; "" for its one argument
Loss = Callable[[Batch, Tensor | None], Tensor]  # of a batch and the mask of its tokens that count


class Collector(Protocol):
    """What is summed for one layer."""

    sums: list[Tensor]  # which several processes add up

    def keep(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What of the inputs (..., K) waits for the gradient: (..., anything), a row a token, and a
        tensor of the layer."""

    def add(self, kept: Tensor, whole: Tensor | None, g: Tensor) -> None:
        """kept: (tokens, anything). g: (tokens, N), the gradient of the outputs."""


class _Probe(torch.autograd.Function):
    """A layer's output, unchanged. What is measured is measured in the backward pass, which
    activation checkpointing runs once for each token, and the forward pass twice."""

    @staticmethod
    def forward(ctx, y, kept, whole, anchor, measure):
        ctx.save_for_backward(kept, whole)
        ctx.measure = measure
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g):
        ctx.measure(*ctx.saved_tensors, g)
        return g, None, None, None, None


def measure(
    model: nn.Module,
    layers: Layers,
    collectors: dict[str, Collector],
    batches: Iterable,
    loss: Loss,
    name: str,
    progress: bool,
    labels: bool = False,
    backward: bool = True,
) -> None:
    """Runs all batches; adds what the collectors sum up over all ranks.

    Args:
        collectors: by the names of ``layers``. name: of the argument that the batches are. labels:
            whether they are among what the model is given. backward: whether the collectors need
            the gradients; without, ``add`` is given what ``keep`` kept in their place.

    Raises:
        ValueError: no batch, or none whose tokens reach a layer; a batch that is none.
    """
    device = next(iter(layers.values()))[1].cols.device
    anchor = torch.zeros((), device=device, requires_grad=True)  # every output needs a gradient
    mask: list[Tensor | None] = [None]
    reached = torch.zeros((), device=device)

    def probe(layer_name: str):
        (module, adapter), collector = layers[layer_name], collectors[layer_name]

        def add(kept: Tensor, whole: Tensor | None, g: Tensor, routing=None) -> None:
            kept, g = kept.reshape(-1, kept.shape[-1]), g.reshape(-1, g.shape[-1])
            if routing is not None:
                add_rows(kept, g, routing)
                return
            if mask[0] is not None and mask[0].numel() == len(g):
                kept, g = kept[mask[0].reshape(-1)], g[mask[0].reshape(-1)]
            reached.add_(len(g))
            with torch.autocast(device.type, enabled=False):
                collector.add(kept, whole, g)

        def add_rows(kept: Tensor, g: Tensor, routing: Routing) -> None:
            if mask[0] is not None and mask[0].numel() * routing.k == len(g):
                counts = mask[0].reshape(-1)[routing.tokens]
                kept, g, routing = kept[counts], g[counts], routing.only(counts)
            reached.add_(len(g))
            with torch.autocast(device.type, enabled=False):
                collector.add(kept, g, routing)

        def hook(_, args, kwargs, y):
            x = args[0] if args else next(iter(kwargs.values()))
            if (y.shape[-1], x.shape[-1]) != (adapter.out_features, adapter.in_features):
                raise RuntimeError(
                    f"layer {layer_name!r} is sharded by tensor parallelism, which "
                    "calibrate() does not know: calibrate one whole model"
                )
            routing = args[1:] if adapter.stack else ()  # of the rows, where experts have some each
            with torch.autocast(device.type, enabled=False):
                kept = collector.keep(x.detach(), *routing)
            if not backward:
                add(*kept, kept[0])
                return y
            return _Probe.apply(y, *kept, anchor, partial(add, routing=next(iter(routing), None)))

        return module.register_forward_hook(hook, with_kwargs=True)

    with ExitStack() as stack:
        stack.enter_context(_frozen(model, [adapter for _, adapter in layers.values()]))
        for layer_name in layers:
            stack.callback(probe(layer_name).remove)
        stack.enter_context(torch.set_grad_enabled(backward))
        for i, batch in enumerate(
            tqdm(
                batches,
                desc=f"calibrate: {name}",
                unit="batch",
                disable=not progress,
                file=sys.stderr,
            )
        ):
            inputs = _inputs(batch, device, f"{name}[{i}]", labels)
            found = inputs.get("attention_mask")
            mask[0] = None if found is None or found.ndim != 2 else found.bool()
            value = loss(inputs, mask[0])
            if backward:
                value.backward()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for collector in collectors.values():
            for value in collector.sums:
                torch.distributed.all_reduce(value)
        torch.distributed.all_reduce(reached)
    if not reached:
        raise fail(name, batches, "at least one batch whose tokens reach a layer")


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


def _inputs(batch: object, device: torch.device, argument: str, labels: bool) -> Batch:
    if isinstance(batch, Tensor):
        batch = {"": batch}
    if not isinstance(batch, dict) and not hasattr(batch, "keys"):
        raise fail(argument, type(batch).__name__, "a dict or a tensor")
    return {
        k: batch[k].to(device) if isinstance(batch[k], Tensor) else batch[k]
        for k in batch
        if labels or k != "labels"
    }


def own_loss(model: nn.Module, seed: int, device: torch.device) -> Loss:
    """The summed loss of labels drawn from the model's own predictions."""
    generator = torch.Generator(device).manual_seed(seed)

    def loss(inputs: Batch, mask: Tensor | None) -> Tensor:
        logits = _logits(model, inputs)
        if mask is not None and mask.shape == logits.shape[:-1]:
            logits = logits[mask]
        logits = logits.reshape(-1, logits.shape[-1]).float()
        if not logits.isfinite().all():
            raise ValueError("the model's predictions on general text are not finite")
        return loss_of_drawn_labels(logits, generator)

    return loss


def loss_of_drawn_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Of logits (tokens, classes)."""
    with torch.no_grad():
        labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, labels, reduction="sum")


def _as_given(inputs: Batch) -> Batch | Tensor:
    """What of a batch ``_inputs`` has made: the tensor, where it was one."""
    return inputs.get("", inputs)  # type: ignore[return-value]


def _logits(model: nn.Module, inputs: Batch) -> Tensor:
    given = _as_given(inputs)
    out = model(given) if isinstance(given, Tensor) else model(**given)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise fail("model's output", type(out).__name__, "logits (..., classes), or with .logits")
    return logits


def task_loss(model: nn.Module, given: Callable | None) -> Loss:
    """The task's own loss: what ``given`` says of the model and a batch, or the model's."""

    def loss(inputs: Batch, mask: Tensor | None) -> Tensor:
        if given is None and "labels" not in inputs:
            raise fail("task", sorted(inputs), "batches with labels, or loss=... beside them")
        value = model(**inputs).loss if given is None else given(model, _as_given(inputs))
        if not isinstance(value, Tensor) or value.ndim or not value.isfinite():
            raise fail("task", value, "batches whose loss is one finite number")
        # Of float16's range the mean over many tokens would use the lowest part alone.
        return value * sum(t.numel() for t in inputs.values() if isinstance(t, Tensor))

    return loss
