"""Learning rates chosen on validation data, the same number tried for each method; then seeds."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from .methods import METHODS
from .protocol import Run, Subject, Tick, run_once


def score(record: dict) -> float:
    """Mean of what each task had right after it was trained: learning alone, so that a rate is not
    chosen because it learns too little to forget. A run that diverged is worst."""
    if record["diverged"]:
        return float("-inf")
    return statistics.mean(values[task] for task, values in record["learned"].items())


def search_runs(method: str, strategy: str, steps: int, rates: Sequence[float] | None = None
                ) -> list[Run]:
    return [Run(method, strategy, rate, 0, steps, "validation")
            for rate in rates or METHODS[method].rates]


def best_rate(runs: list[Run], subject: Subject, folder: Path, tick: Tick) -> float:
    """The rate whose run learned most."""
    records = [run_once(run, subject, folder, tick) for run in runs]
    return max(records, key=score)["rate"]


def test_runs(method: str, strategy: str, rates: Sequence[float], seeds: Sequence[int],
              steps: int) -> list[Run]:
    """On test data, for every seed."""
    return [Run(method, strategy, rate, seed, steps, "test") for rate in rates for seed in seeds]
