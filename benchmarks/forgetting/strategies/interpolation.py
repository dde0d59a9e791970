"""WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903): part of the way from before a task to after."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secura_kernels.checks import check_number

from .base import Batch, Strategy, check_keys, copied, matched, snapshot


class Interpolated(Strategy):
    """Another strategy, after each of whose tasks the trained parameters go back:

        theta ← theta_before + part · (theta - theta_before)

    theta_before: where the task began. A CURLoRA core with a basis of its own for each task begins
    at 0, so its change is multiplied by ``part``, exactly; a LoRA's two factors are moved each.

    Args:
        part: from 0 to 1, of the way that is kept.
    """

    def __init__(self, strategy: Strategy, part: float):
        self.strategy = strategy
        self.part = check_number("part", part, "a number from 0 to 1", 0, 1)
        self.start: dict[str, Tensor] = {}  # as the trained parameters, in at least float32

    def before_task(self, model: nn.Module) -> None:
        self.strategy.before_task(model)
        self.start = snapshot(model)

    def batch(self, batch: Batch) -> Batch:
        return self.strategy.batch(batch)

    def loss(self, model: nn.Module, batch: Batch, loss: Tensor) -> Tensor:
        return self.strategy.loss(model, batch, loss)

    def after_step(self, model: nn.Module) -> None:
        self.strategy.after_step(model)

    @torch.no_grad()
    def after_task(self, model: nn.Module, batches) -> None:
        for _, p, start in matched(model, self.start):
            p.copy_(start.lerp(p.to(start.dtype), self.part))
        self.strategy.after_task(model, batches)

    def evaluation(self, model: nn.Module):
        return self.strategy.evaluation(model)

    def state_dict(self) -> dict:
        return {"start": copied(self.start), "strategy": self.strategy.state_dict()}

    def load_state_dict(self, model: nn.Module, state: Mapping) -> None:
        check_keys(state, "start", "strategy")
        start = copied(state["start"])
        if start:
            matched(model, start)
        self.strategy.load_state_dict(model, state["strategy"])
        self.start = start
