"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796)."""

from collections.abc import Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from secura_kernels.checks import check_int, check_number, fail
from secura_kernels.train.adapted import evaluating

from .base import (
    Batch,
    Forward,
    Strategy,
    check_keys,
    copied,
    matched,
    snapshot,
    trained,
    transformers_forward,
)
from .memory import split, stack


class EWC(Strategy):
    """Adds ``0.5 · lam · sum_i F_i (theta_i - theta*_i)²`` over the trained parameters (Eq. 3).

    F is the diagonal of the empirical Fisher matrix, the mean over rows of the squared gradient of
    a row's own loss at the end of a task, in evaluation mode. It is taken row by row: the squared
    gradient of a batch of n rows has their mixed products in it, and where they cancel is about n
    times too small. The first ``samples`` rows of ``after_task``'s batches are used, one forward
    and backward pass each. A row's loss is the mean over its labels, as in training: of n labels,
    whose gradients are independent, F is n times smaller than of one, and wants n times the
    ``lam``.

    Over tasks F is summed and theta* is where the last task ended: the one penalty that the
    recursion of Laplace approximations gives (Huszár 2018, arXiv 1712.03847), at a memory of two
    copies of the trained parameters, in at least float32, for any number of tasks.
    """

    def __init__(self, lam: float, *, samples: int = 256, forward: Forward = transformers_forward):
        self.lam = check_number("lam", lam, "a finite number of at least 0", 0)
        self.samples = check_int("samples", samples, 1, 2**31 - 1)
        self.forward = forward
        self.fisher: dict[str, Tensor] = {}  # as the trained parameters; empty before a task ended
        self.optimum: dict[str, Tensor] = {}

    def loss(self, model: nn.Module, batch: Batch, loss: Tensor) -> Tensor:
        if not self.fisher:
            return loss
        pairs = zip(matched(model, self.fisher), matched(model, self.optimum), strict=True)
        penalty = sum(
            (f * (p - optimum).square()).sum().to(loss.device)
            for (_, p, f), (_, _, optimum) in pairs
        )
        return loss + 0.5 * self.lam * penalty

    def after_task(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        if self.fisher:
            matched(model, self.fisher)
        for name, f in fisher(model, batches, self.samples, self.forward).items():
            self.fisher[name] = self.fisher[name] + f if name in self.fisher else f
        self.optimum = snapshot(model)

    def state_dict(self) -> dict:
        return {"fisher": copied(self.fisher), "optimum": copied(self.optimum)}

    def load_state_dict(self, model: nn.Module, state: Mapping) -> None:
        check_keys(state, "fisher", "optimum")
        loaded = copied(state["fisher"]), copied(state["optimum"])
        for kept in loaded:
            if kept:
                matched(model, kept)
        self.fisher, self.optimum = loaded


def fisher(
    model: nn.Module, batches: Iterable[Batch], samples: int, forward: Forward
) -> dict[str, Tensor]:
    """The empirical Fisher diagonal of the first ``samples`` rows, as the trained parameters, in
    at least float32. Gradients and modes of ``model`` stay as they are.

    Raises ValueError where there are no rows, or a row's loss is not finite.
    """
    parameters = trained(model)
    sums = {name: torch.zeros_like(value) for name, value in snapshot(model).items()}
    rows = islice((row for batch in batches for row in split(batch)), samples)
    count = 0
    with evaluating(model), torch.enable_grad():
        for count, row in enumerate(rows, 1):
            batch = stack([row], next(iter(parameters.values())).device)
            loss, _ = forward(model, batch)
            if not torch.isfinite(loss):
                raise fail(
                    "batches",
                    f"row {count} of loss {loss.item()}",
                    "rows of finite loss, with at least one label each",
                )
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.to(total.dtype).square()
    if not count:
        raise fail("batches", "an empty iterable", "the batches of the task that ended")
    return {name: total / count for name, total in sums.items()}
