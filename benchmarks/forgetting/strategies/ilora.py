"""I-LoRA (Ren et al. 2024, arXiv 2402.18865): a fast working memory and a slow long-term one."""

from collections.abc import Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secura_kernels.checks import check_number, fail

from .base import (
    Batch,
    Forward,
    Strategy,
    check_keys,
    copied,
    matched,
    snapshot,
    transformers_forward,
    wide,
)
from .memory import Memory, size, stack


class ILoRA(Strategy):
    """The model's trained parameters are the working memory w; the long-term memory l follows it,
    and is what is evaluated:

        l ← ema · l + (1 - ema) · w                          after each step
        loss = (CE(batch) + CE(replayed)) / 2 + weight · mean (z_w - z_l)²

    with as many replayed rows as ``batch`` has, or all where the memory has fewer, and z_w, z_l
    the two memories' features of them, of which z_l has no gradient. The weights of the terms, the
    features (all hidden states) and the defaults are those of the authors' published code. That
    differs in three ways: it counts only features with z_w < z_l in the mean square, counts
    padding among them, and also replays the present task, where here a task is kept when it ended.

    l starts as w at the first task and is never reset. ``ema`` = 0.25 is the published code's and
    remembers about one step; a long-term memory of n steps needs 1 - 1/n. ``budget``,
    ``per_task``, ``seed``: what is replayed (``Memory``). ``forward`` must reach the model by
    calling it.
    """

    def __init__(
        self,
        ema: float = 0.25,
        weight: float = 1.0,
        *,
        budget: int = 500,
        per_task: bool = False,
        seed: int = 0,
        forward: Forward = transformers_forward,
    ):
        self.ema = check_number("ema", ema, "a number from 0 to 1", 0, 1)
        self.weight = check_number("weight", weight, "a finite number of at least 0", 0)
        self.memory = Memory(budget, per_task, seed)
        self.forward = forward
        self.slow: dict[str, Tensor] = {}  # l, as the trained parameters, in at least float32

    def before_task(self, model: nn.Module) -> None:
        if self.slow:
            matched(model, self.slow)
        else:
            self.slow = snapshot(model)

    def loss(self, model: nn.Module, batch: Batch, loss: Tensor) -> Tensor:
        if not len(self.memory):
            return loss
        device = next(iter(batch.values())).device
        replayed = stack(self.memory.draw(size(batch)), device)
        weights = {name: l.to(p.dtype) for name, p, l in self._pairs(model)}

        # Not by writing the weights into the model: the loss's graph still needs the fast ones.
        def slow_model(*args, **kwargs):
            return functional_call(model, weights, args, kwargs)

        with torch.no_grad():
            _, slow = self.forward(slow_model, replayed)
        replayed_loss, fast = self.forward(model, replayed)
        if isinstance(fast, Tensor):
            fast, slow = [fast], [slow]
        consistency = torch.stack(
            [nn.functional.mse_loss(wide(w), wide(l)) for w, l in zip(fast, slow, strict=True)]
        ).mean()
        return (loss + replayed_loss) / 2 + self.weight * consistency

    def after_step(self, model: nn.Module) -> None:
        for _, p, l in self._pairs(model):
            l.mul_(self.ema).add_(p.detach().to(l.dtype), alpha=1 - self.ema)

    def after_task(self, model: nn.Module, batches) -> None:
        self.memory.add_task(batches)

    @contextmanager
    def evaluation(self, model: nn.Module):
        """Within it ``model`` has the long-term memory's weights; the working memory's come back
        bit for bit, whatever happens. Before the first task it has its own."""
        pairs = self._pairs(model) if self.slow else []
        fast = [p.detach().clone() for _, p, _ in pairs]
        try:
            with torch.no_grad():
                for _, p, l in pairs:
                    p.copy_(l)
            yield
        finally:
            with torch.no_grad():
                for (_, p, _), value in zip(pairs, fast, strict=True):
                    p.copy_(value)

    def _pairs(self, model: nn.Module) -> list[tuple[str, nn.Parameter, Tensor]]:
        if not self.slow:
            raise fail("model", type(model).__name__, "given to before_task before the first step")
        return matched(model, self.slow)

    def state_dict(self) -> dict:
        return {"slow": copied(self.slow), "memory": self.memory.state_dict()}

    def load_state_dict(self, model: nn.Module, state: Mapping) -> None:
        check_keys(state, "slow", "memory")
        slow = copied(state["slow"])
        if slow:
            matched(model, slow)
        self.memory.load_state_dict(state["memory"])
        self.slow = slow
