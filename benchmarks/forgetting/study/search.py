"""Which runs a study makes, and the learning rate of each method, chosen on validation data."""

import statistics
from collections.abc import Sequence

from .methods import METHODS
from .protocol import Run

Row = tuple[str, str]  # a method and a strategy


def grid(rows: Sequence[Row], seeds: int, steps: int, rates: slice = slice(None)) -> list[Run]:
    """Every row at each of its learning rates, the whole of it for a seed before the next one."""
    return [Run(method, strategy, rate, seed, steps)
            for seed in range(seeds) for method, strategy in rows
            for rate in METHODS[method].rates[rates]]


def score(record: dict) -> float:
    """Mean over tasks of what validation data say right after each was trained: learning alone, so
    that a rate is not chosen because it learns too little to forget. A run that diverged is
    worst."""
    if record["diverged"]:
        return float("-inf")
    return statistics.mean(record["validation"].values())


def best_rates(records: Sequence[dict]) -> dict[Row, float]:
    """For each row the rate of the highest score, the mean over its seeds; of rates that not all
    seeds have been run at, none, where others are complete."""
    scores: dict[Row, dict[float, list[float]]] = {}
    for record in records:
        rates = scores.setdefault((record["method"], record["strategy"]), {})
        rates.setdefault(record["rate"], []).append(score(record))
    found = {}
    for row, rates in scores.items():
        most = max(map(len, rates.values()))
        found[row] = max((rate for rate in rates if len(rates[rate]) == most),
                         key=lambda rate: statistics.mean(rates[rate]))
    return found
