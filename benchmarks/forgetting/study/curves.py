"""What a record says, and a method's curve over its rates: retention against learning."""

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

from .protocol import Subject, final_forgetting
from .search import SEQUENTIAL, Row, best_rates, grouped, row_of

PEER = "LoRA", SEQUENTIAL  # at its levels of learning the others are compared
UNTRAINED = "head only"
Measure = Callable[[dict], float]


def label(row: Row) -> str:
    method, strategy = row
    return method if strategy == SEQUENTIAL else f"{method}, {strategy}"


def whole(records: Sequence[dict]) -> list[dict]:
    return [record for record in records if not record["diverged"]]


def at_best(records: Sequence[dict]) -> list[dict]:
    best = best_rates(records)
    return [record for record in records if record["rate"] == best[row_of(record)]]


def learned(record: dict) -> float:
    """Mean over tasks of what test data say right after each was trained."""
    return statistics.mean(values[task] for task, values in record["learned"].items())


def retained(measure: str) -> Measure:
    return lambda record: record["retention"]["end"][measure]


def lost(subject: Subject) -> dict[str, Measure]:
    """What later tasks cost the earlier ones, by its name in the tables; of one task alone there
    is no such measure."""
    if len(subject.tasks) == 1:
        return {}
    return {"forgetting": lambda record: final_forgetting(record, subject.tasks)}


def curves_by_seed(
    records: Sequence[dict], row: Row, measure: Measure
) -> dict[int, list[tuple[float, float]]]:
    """The row's curve of each seed. It begins with the untrained body that has the seed's heads,
    since the rate 0 is one of every row's."""
    seeds = grouped([r for r in records if row_of(r) == row], lambda r: r["seed"])
    return {
        seed: curve_of(
            [r for r in records if r["method"] == UNTRAINED and r["seed"] == seed] + runs, measure
        )
        for seed, runs in seeds.items()
    }


def curve_of(records: Sequence[dict], measure: Measure) -> list[tuple[float, float]]:
    """(learned, measure) of the runs of one row, in the order of their rates; means over seeds."""
    return [
        (statistics.mean(map(learned, own)), statistics.mean(map(measure, own)))
        for _, own in sorted(grouped(records, lambda r: r["rate"]).items())
    ]


def value_at(
    curve: Sequence[tuple[float, float]], level: float, better: Callable = max
) -> float | None:
    """A curve's value where as much is learned as ``level``, between the neighbouring rates; None
    outside them. Where a curve passes the level more than once, the better value counts.

    Args:
        curve: (learned, value) in the order of the rates. better: max or min.
    """
    found = []
    for (x0, y0), (x1, y1) in pairwise(curve):
        if min(x0, x1) <= level <= max(x0, x1):
            part = 0.5 if x0 == x1 else (level - x0) / (x1 - x0)
            found.append(y0 + part * (y1 - y0))
    return better(found, default=None)
