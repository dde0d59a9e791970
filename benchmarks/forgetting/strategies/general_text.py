"""Strategies that have general text, and nothing of earlier tasks: what the base model says of it,
and its replay."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_kernels.checks import check_int, check_number

from .base import Batch, Strategy, check_keys
from .replay import Replay


class BaseKL(Strategy):
    """Adds ``weight`` · KL(base || model) in nats a token, on ``rows`` of general text a step.

    Args:
        ids: (n, length), the text. logs: (n, length, vocabulary), the logarithms of the base
            model's probabilities of the next token.
    """

    def __init__(
        self, ids: Tensor, logs: Tensor, *, weight: float = 1.0, rows: int = 4, seed: int = 0
    ):
        self.ids, self.logs = ids, logs
        self.weight = check_number("weight", weight, "a finite number of at least 0", 0)
        self.rows = check_int("rows", rows, 1, len(ids))
        self.generator = torch.Generator().manual_seed(check_int("seed", seed, 0, 2**63 - 1))

    def loss(self, model: nn.Module, batch: Batch, loss: Tensor) -> Tensor:
        at = torch.randperm(len(self.ids), generator=self.generator)[: self.rows]
        ids, logs = self.ids[at].to(loss.device), self.logs[at].to(loss.device)
        moved = model(input_ids=ids).logits.float().log_softmax(-1)
        kl = F.kl_div(
            moved.flatten(0, 1), logs.float().flatten(0, 1), reduction="batchmean", log_target=True
        )
        return loss + self.weight * kl

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, model: nn.Module, state: Mapping) -> None:
        check_keys(state, "generator")
        self.generator.set_state(state["generator"])


class GeneralReplay(Replay):
    """Replays rows of general text, an equal part of each batch by default; tasks are not kept."""

    def __init__(self, ids: Tensor, *, ratio: float = 1.0, seed: int = 0):
        super().__init__(len(ids), ratio, seed=seed)
        self.memory.add_task([dict(input_ids=ids, labels=ids)])

    def after_task(self, model: nn.Module, batches) -> None:
        """Nothing: what is kept is not the tasks' own."""
