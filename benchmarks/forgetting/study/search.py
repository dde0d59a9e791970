"""Which runs a study makes, and the learning rate of each method, chosen on validation data."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from .methods import METHODS
from .protocol import Run

Row = tuple[str, str]  # a method and a strategy
SEQUENTIAL = "sequential"


def row_of(record: Mapping) -> Row:
    return record["method"], record["strategy"]


def grouped(records: Sequence[dict], key: Callable[[dict], object]) -> dict[object, list[dict]]:
    found: dict[object, list[dict]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return found


def grid(rows: Sequence[Row], seeds: int, steps: int, rates: slice = slice(None)) -> list[Run]:
    """Every row at each of its learning rates, the whole of it for a seed before the next one."""
    return [
        Run(method, strategy, rate, seed, steps)
        for seed in range(seeds)
        for method, strategy in rows
        for rate in METHODS[method].rates[rates]
    ]


def repeats(searched: Sequence[dict], seeds: Sequence[int]) -> list[Run]:
    """Further seeds of each row in ``searched``, at the rate that is its best there."""
    steps = {row_of(record): record["steps"] for record in searched}
    return [
        Run(*row, rate, seed, steps[row])
        for seed in seeds
        for row, rate in best_rates(searched).items()
    ]


def score(record: dict) -> float:
    """Mean over tasks of what validation data say right after each was trained: learning alone, so
    that a rate is not chosen because it learns too little to forget. A run that diverged is
    worst."""
    if record["diverged"]:
        return float("-inf")
    return statistics.mean(record["validation"].values())


def best_rates(records: Sequence[dict]) -> dict[Row, float]:
    """For each row the rate of the highest score, the mean over the seeds that were run at all of
    its rates."""
    found = {}
    for row, own in grouped(complete(records), row_of).items():
        rates = grouped(own, lambda r: r["rate"])
        found[row] = max(rates, key=lambda rate: statistics.mean(map(score, rates[rate])))
    return found


def complete(records: Sequence[dict]) -> list[dict]:
    """Of each row those of the seeds that were run at most rates: others give no curve over the
    rates, nor a choice among them."""
    found = []
    for own in grouped(records, row_of).values():
        seeds = grouped(own, lambda r: r["seed"]).values()
        most = max(map(len, seeds))
        found += [record for runs in seeds if len(runs) == most for record in runs]
    return found
