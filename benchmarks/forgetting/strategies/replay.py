"""Experience replay: rows of earlier tasks train together with those of the present one."""

from collections.abc import Mapping
from math import floor

from torch import nn

from secura_kernels.checks import check_int, check_number

from .base import Batch, Strategy, check_keys
from .memory import Memory, size, split, stack


class Replay(Strategy):
    """Appends ``ratio`` replayed rows for each row of a batch, in the long run exactly: a fraction
    of a row waits for the next batch. All rows weigh alike in the loss. A batch gets no row twice,
    so a memory with fewer rows than that gives all it has.

    ``budget``, ``per_task``, ``seed``: what is kept (``Memory``). The defaults are those of the
    replay in I-LoRA's published code (arXiv 2402.18865), which however also replays the present
    task; here a task is kept when it ended.
    """

    def __init__(
        self, budget: int = 500, ratio: float = 1.0, *, per_task: bool = False, seed: int = 0
    ):
        self.ratio = check_number(
            "ratio", ratio, "a number from 0 to 1000, not 0", 0, 1000, open_low=True
        )
        self.memory = Memory(budget, per_task, seed)
        self.rows = 0  # of the tasks' own, since there was something to replay

    def batch(self, batch: Batch) -> Batch:
        if not len(self.memory):
            return batch
        before, self.rows = self.rows, self.rows + size(batch)
        due = floor(self.ratio * self.rows) - floor(self.ratio * before)
        if not due:
            return batch
        device = next(iter(batch.values())).device
        return stack(split(batch) + self.memory.draw(due), device)

    def after_task(self, model: nn.Module, batches) -> None:
        self.memory.add_task(batches)

    def state_dict(self) -> dict:
        return {"memory": self.memory.state_dict(), "rows": self.rows}

    def load_state_dict(self, model: nn.Module, state: Mapping) -> None:
        check_keys(state, "memory", "rows")
        rows = check_int("state['rows']", state["rows"], 0, 2**63 - 1)
        self.memory.load_state_dict(state["memory"])
        self.rows = rows
