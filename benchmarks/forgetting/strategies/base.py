"""The protocol of a strategy, and sequential fine-tuning, which does nothing against forgetting."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from secura_kernels.checks import fail

Batch = Mapping[str, Tensor]  # each (n, ...): one row a sample
# From a model and a batch: the mean loss (), and features that two models can be compared by.
Forward = Callable[[Callable, Batch], tuple[Tensor, Tensor | Sequence[Tensor]]]


class Strategy:
    """Sequential fine-tuning; the others override what they need.

    A batch maps names to tensors of shape (n, ...), one row a sample. Call ``before_task`` and
    ``after_task`` once a task; a run resumed within a task calls ``load_state_dict`` instead of, or
    after, ``before_task``.
    """

    def before_task(self, model: nn.Module) -> None:
        """Prepares for a task, before its first step."""

    def batch(self, batch: Batch) -> Batch:
        """The batch to train on: the task's own, perhaps with replayed rows after it."""
        return batch

    def loss(self, model: nn.Module, batch: Batch, loss: Tensor) -> Tensor:
        """What to minimise, (), from the mean ``loss`` of ``batch``, as ``batch()`` returned it."""
        return loss

    def after_step(self, model: nn.Module) -> None:
        """Follows each step of the optimiser."""

    def after_task(self, model: nn.Module, batches) -> None:
        """Memorises a task that ended, from an iterable of its ``batches``."""

    def evaluation(self, model: nn.Module) -> AbstractContextManager:
        """Within it ``model`` has the weights to evaluate or save."""
        return nullcontext()

    def state_dict(self) -> dict:
        """A snapshot in tensors, numbers, lists and dictionaries, all that ``torch.load`` reads
        with ``weights_only=True``; settings are not in it."""
        return {}

    def load_state_dict(self, model: nn.Module, state: Mapping) -> None:
        """Takes up ``state_dict()``'s snapshot for ``model``.

        Raises ValueError, before anything is changed, where the snapshot is another strategy's or
        another model's.
        """
        check_keys(state)


def transformers_forward(model: Callable, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
    """The loss of a transformers model and its hidden states, embeddings included, at the tokens
    that are no padding: each (tokens, hidden).

    Raises ValueError where the model gives no loss or no hidden states.
    """
    outputs = model(**batch, output_hidden_states=True)
    for name in ("loss", "hidden_states"):
        if getattr(outputs, name, None) is None:
            raise fail(
                "forward",
                "transformers_forward",
                f"another function for a model and a batch that give no {name}",
            )
    mask = batch.get("attention_mask")
    if mask is None:
        return outputs.loss, outputs.hidden_states
    return outputs.loss, tuple(state[mask.bool()] for state in outputs.hidden_states)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name; ValueError where there are none."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise fail("model", type(model).__name__, "a model with parameters that require gradients")
    return found


def wide(tensor: Tensor) -> Tensor:
    """In at least float32, where small changes do not round away; itself where it is that wide."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Detached wide copies of the trained parameters."""
    return {name: wide(p.detach().clone()) for name, p in trained(model).items()}


def matched(model: nn.Module, kept: dict[str, Tensor]) -> list[tuple[str, nn.Parameter, Tensor]]:
    """Each trained parameter with what was ``kept`` of it, which is moved to its device.

    Raises ValueError where names or shapes are not those of ``kept``.
    """
    parameters = trained(model)
    shapes = {name: p.shape for name, p in parameters.items()}
    known = {name: tensor.shape for name, tensor in kept.items()}
    if shapes != known:
        raise fail(
            "model",
            sorted({name for name, _ in shapes.items() ^ known.items()})[:3],
            "the one the strategy was used with: these parameters are trained in only one "
            "of the two, or differ in shape",
        )
    for name, p in parameters.items():
        kept[name] = kept[name].to(p.device)
    return [(name, p, kept[name]) for name, p in parameters.items()]


def copied(kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in kept.items()}


def check_keys(state: Mapping, *keys: str) -> None:
    if set(state) != set(keys):
        raise fail("state", sorted(state), f"the state_dict of this strategy, with {sorted(keys)}")
