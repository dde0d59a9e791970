"""Rows of earlier tasks, kept within a budget and drawn at random, repeatably."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from secura_kernels.checks import check_int, fail

from .base import Batch, check_keys, copied

Row = dict[str, Tensor]


class Memory:
    """A uniform sample of rows, without replacement, by Vitter's Algorithm R (1985).

    Of all tasks together at most ``budget`` rows, so that tasks share it by their sizes, as in the
    published code of I-LoRA (arXiv 2402.18865); ``per_task``: at most ``budget`` rows of each task.
    Rows lie on the CPU. Randomness is the memory's own, from ``seed``.
    """

    def __init__(self, budget: int, per_task: bool, seed: int):
        self.budget = check_int("budget", budget, 1, 2**31 - 1)
        if not isinstance(per_task, bool):
            raise fail("per_task", per_task, "True or False")
        self.per_task = per_task
        self.generator = torch.Generator().manual_seed(check_int("seed", seed, 0, 2**63 - 1))
        self.kept: list[list[Row]] = []  # one list of all tasks, or one a task
        self.seen: list[int] = []  # the rows each list was sampled from

    def __len__(self) -> int:
        return sum(map(len, self.kept))

    def add_task(self, batches: Iterable[Batch]) -> None:
        """Samples the rows of a task; ValueError where it has none."""
        if self.per_task or not self.kept:
            rows, seen = [], 0
        else:
            rows, seen = list(self.kept[0]), self.seen[0]
        before = seen
        for batch in batches:
            for row in split(batch):
                place = self._random(seen + 1) if seen >= self.budget else seen
                seen += 1
                if place < self.budget:
                    # A copy: a view would keep, and save, the whole batch.
                    rows[place : place + 1] = [
                        {k: v.detach().cpu().clone() for k, v in row.items()}
                    ]
        if seen == before:
            raise fail("batches", "an empty iterable", "the batches of the task that ended")
        self.kept[0 if not self.per_task else len(self.kept) :] = [rows]
        self.seen[0 if not self.per_task else len(self.seen) :] = [seen]

    def draw(self, count: int) -> list[Row]:
        """``count`` rows without replacement, or all where there are fewer."""
        rows = [row for task in self.kept for row in task]
        order = torch.randperm(len(rows), generator=self.generator)[:count]
        return [rows[i] for i in order.tolist()]

    def _random(self, high: int) -> int:
        return int(torch.randint(high, (), generator=self.generator))

    def state_dict(self) -> dict:
        return {
            "kept": [[copied(row) for row in task] for task in self.kept],
            "seen": list(self.seen),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping) -> None:
        check_keys(state, "kept", "seen", "generator")
        self.kept = [[copied(row) for row in task] for task in state["kept"]]
        self.seen = list(state["seen"])
        self.generator.set_state(state["generator"].cpu())


def size(batch: Batch) -> int:
    """The number of rows; ValueError unless all are tensors of as many rows."""
    if not isinstance(batch, Mapping) or not all(
        isinstance(value, Tensor) and value.ndim for value in batch.values()
    ):
        raise fail("batch", type(batch).__name__, "a mapping from names to tensors (n, ...)")
    sizes = {name: len(value) for name, value in batch.items()}
    if len(set(sizes.values())) != 1:
        raise fail("batch", sizes, "tensors with one row a sample, as many in each")
    return next(iter(sizes.values()))


def split(batch: Batch) -> list[Row]:
    """The rows of a batch, each without the leading dimension."""
    return [{name: value[i] for name, value in batch.items()} for i in range(size(batch))]


def stack(rows: Sequence[Row], device: torch.device) -> dict[str, Tensor]:
    """A batch of rows, padded on the right along their first dimension where they differ: labels
    by -100, which a loss leaves out, the others by 0, which masks tokens where there is a mask.

    Raises ValueError where rows have different names.
    """
    names = rows[0].keys()
    if odd := [sorted(row) for row in rows if row.keys() != names]:
        raise fail("batch", sorted(names), f"one with the names of the replayed rows, {odd[0]}")
    return {
        name: _padded([row[name].to(device) for row in rows], -100 if name == "labels" else 0)
        for name in names
    }


def _padded(values: list[Tensor], padding: int) -> Tensor:
    if values[0].ndim == 0:
        return torch.stack(values)
    return pad_sequence(values, batch_first=True, padding_value=padding)
