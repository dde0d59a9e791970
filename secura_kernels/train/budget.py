"""A budget of KL divergence from the base model, for layers whose core is measured in nats."""

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ..checks import fail
from .retention import base_kl, calibrated_adapters, core_size


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
