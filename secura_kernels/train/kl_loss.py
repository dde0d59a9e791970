"""The divergence from the base as a loss, beside the task's."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..checks import check_int, check_number, fail
from .adapted import evaluating, without_adapters
from .own_text import own_text
from .retention import log_probabilities


class BaseKL:
    """weight · KL(base || model), in nats a token, on some rows of general text.

        keep = BaseKL(model, tokenizer=tokenizer)  # the model writes the text itself
        for batch in batches:
            loss = model(**batch).loss + keep()
            loss.backward()
            ...

    Each call takes other rows and runs the model on them twice: without its adapters and without a
    gradient, then as it is. So a step costs about twice as much where these are as many tokens as
    the task's. With gradient accumulation it is a part of each micro-batch's loss. For PEFT's other
    adapters too. With several processes give each a seed of its own.

    Args:
        model: with adapters, unmerged; not its DDP wrapper. general: batches of text, dicts of what
            the model takes; ``labels`` are left out. They are kept. None: the model without its
            adapters writes its own text (``own_text``).
        weight: >= 0. rows: of one batch, that a call takes at most. tokens: how many the model
            writes. tokenizer: of a chat model that writes. seed: of the rows, and of the text.
        progress: whether a bar shows the writing.

    Raises:
        ValueError: an argument outside these; a model without adapters or, at a call, without
            logits. RuntimeError: a merged layer.
    """

    def __init__(
        self,
        model: nn.Module,
        general: Iterable[dict[str, Tensor]] | None = None,
        *,
        weight: float = 4.0,
        rows: int = 4,
        tokens: int = 4096,
        tokenizer=None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.weight = check_number("weight", weight, "a finite number of at least 0", 0)
        self.rows = check_int("rows", rows, 1, 2**31)
        self._generator = torch.Generator().manual_seed(check_int("seed", seed, 0, 2**63 - 1))
        with without_adapters(model) as adapters:
            if not adapters:
                raise fail("model", type(model).__name__, "a model with adapted layers")
            if general is None:
                general = own_text(model, tokens, tokenizer=tokenizer, seed=seed, progress=progress)
            self.batches = [_inputs(i, batch) for i, batch in enumerate(general)]
        if not self.batches:
            raise fail("general", [], "None or at least one batch")

    def __call__(self) -> Tensor:
        """The loss, on rows that are drawn anew: a number in float32 with a gradient."""
        device = next(self.model.parameters()).device
        batch = self.batches[self._draw(len(self.batches))[0]]
        chosen = self._draw(len(next(iter(batch.values()))))[: self.rows]
        inputs = {name: value[chosen.to(value.device)].to(device) for name, value in batch.items()}
        with torch.no_grad(), evaluating(self.model), without_adapters(self.model):
            base = log_probabilities(self.model, inputs)
        moved = log_probabilities(self.model, inputs)
        return self.weight * (base.exp() * (base - moved)).sum() / len(base)

    def _draw(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator)


def _inputs(i: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the model takes; every tensor has a row a text."""
    tensors = isinstance(batch, dict) and all(isinstance(v, Tensor) for v in batch.values())
    inputs = {k: v for k, v in batch.items() if k != "labels"} if tensors else {}
    if len({value.shape[:1] for value in inputs.values()}) != 1:
        found = {k: tuple(v.shape) for k, v in inputs.items()} or type(batch).__name__
        raise fail(f"general[{i}]", found, "a dict of tensors with equally many rows")
    if not len(next(iter(inputs.values()))):
        raise fail(f"general[{i}]", 0, "one row at least")
    return inputs
