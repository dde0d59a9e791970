"""A budget of KL divergence from the base model, for layers whose core is measured in nats."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ..checks import check_number, fail
from .adapted import calibrated_adapters, layers_in_use
from .retention import base_kl, core_size

ENOUGH = 0.95  # of a budget, that shrinking is content with
TRIALS = 30


class Budget:
    """How much of it is used.

    The prediction is ``core_size`` times what ``base_kl`` was times as much at the last
    measurement. It is measured again where the cores have grown to twice the size.

    Args:
        limit: nats a token. hold: shrink the cores to it after each step that passes it.
        batches: general text.
    """

    def __init__(self, limit: float, hold: bool, batches: list[dict[str, Tensor]]) -> None:
        self.limit, self.hold, self.batches = limit, hold, batches
        self.predicted = 0.0  # the KL divergence, as last predicted or measured

    def begin(self, model: nn.Module) -> None:
        """Raises ValueError for a model without calibrated layers."""
        if not calibrated_adapters(model):
            raise fail(
                "budget",
                self.limit,
                "None for a model without layers of basis='whitened' "
                "or 'natural' that calibrate() has measured",
            )
        self.ratio = self.size = self.predicted = 0.0
        self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """After a step: predicts, measures where that is not to be trusted, and holds."""
        size = core_size(model)
        self.predicted = size * self.ratio
        if not size <= (1.1 if self.is_over() else 2) * self.size:
            self.measure(model)
        while self.hold and self.predicted > self.limit:
            for adapter in calibrated_adapters(model):
                adapter.shrink((self.limit / self.predicted) ** 0.5)
            self.predicted, size = self.limit, core_size(model)
            if 1.1 * size < self.size:  # far from where the divergence is known
                self.measure(model)

    def measure(self, model: nn.Module) -> float:
        """The KL divergence now; predictions start from it."""
        # Processes may round differently; they must not decide differently.
        kl, size = broadcast_object_list([base_kl(model, self.batches), core_size(model)])
        self.size, self.ratio, self.predicted = size, kl / size if size else 0.0, kl
        return kl

    def is_over(self) -> bool:
        """Also where it is no number."""
        return not self.predicted <= self.limit

    def stops(self) -> bool:
        """Whether training is to stop: a budget that is held is passed for a step at most."""
        return self.is_over() and not (self.hold and self.predicted > self.limit)


class Shrunk(NamedTuple):
    """What ``shrink_to_budget`` did: ``factor`` of what was learned is left, which moves the
    model's predictions by ``kl`` nats a token."""

    factor: float
    kl: float


@torch.no_grad()
def shrink_to_budget(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], budget: float
) -> Shrunk:
    """After training: goes back on the straight line to where it began, until the model's
    predictions on general text have moved by ``budget`` and no further.

    All cores, and biases of adapters, are multiplied by one number of at most 1. The divergence
    falls with its square or faster, and what was learned more slowly. Of every basis; of a natural
    one, and after stages, it is what was trained since the last of them. Each trial is one
    ``base_kl`` on all batches; there are two to four where the change is small.

    Args:
        batches: as ``base_kl`` takes them. budget: nats a token, > 0.

    Returns:
        the factor, 1 where the budget was kept already, and the divergence that is left: otherwise
        0.95 to 1 of the budget.

    Raises:
        ValueError: no layers of this package; a divergence that is no number; a budget that what
            was learned before the last calibration or stage has used up. The model is then
            unchanged. RuntimeError: a merged layer.
    """
    check_number("budget", budget, "a finite number > 0", 0, open_low=True)
    batches = list(batches)
    adapters = [adapter for _, held in layers_in_use(model) for adapter in held]
    if not adapters:
        raise fail("model", type(model).__name__, "a model with layers of this package")
    learned = [parameter for adapter in adapters for parameter in adapter.learned_parameters()]
    kept = [parameter.detach().clone() for parameter in learned]

    def keep_only(factor: float) -> None:
        for parameter, value in zip(learned, kept, strict=True):
            parameter.copy_(factor * value)

    def divergence(factor: float) -> float:
        keep_only(factor)
        # Processes may round differently; they must not decide differently.
        return broadcast_object_list([base_kl(model, batches)])[0]

    factor, over, under = 1.0, 1.0, 0.0
    power, last = 2.0, None  # of the factor, that the divergence grows with
    try:
        for _ in range(TRIALS):
            kl = divergence(factor)
            if not math.isfinite(kl):
                raise fail("model", f"of divergence {kl}", "one whose predictions are numbers")
            if kl <= budget and (factor == 1 or kl >= ENOUGH * budget):
                return Shrunk(factor, kl)
            over, under = (factor, under) if kl > budget else (over, factor)
            if last is not None and kl > 0 and last[1] > 0:
                power = math.log(kl / last[1]) / math.log(factor / last[0])
            last = factor, kl
            guess = 0.5 * (over + under)
            if kl > 0 and power > 0.1:
                aim = factor * (0.5 * (1 + ENOUGH) * budget / kl) ** (1 / power)
                guess = aim if under < aim < over else guess
            factor = guess
        kl = divergence(under)
        if kl > budget:
            raise fail("budget", budget, f"more than the {kl:g} of what was learned before")
        return Shrunk(under, kl)
    except BaseException:
        keep_only(1.0)
        raise
