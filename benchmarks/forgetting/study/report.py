"""Records as a table in the shape of the papers', as curves, and compared at equal learning."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from .methods import METHODS
from .protocol import final_forgetting
from .search import Row, best_rates

PEER = "LoRA"  # at its levels of learning the others are compared, and it is in every panel
UNTRAINED = "head only"
Measure = Callable[[dict], float]


def write(records: Sequence[dict], tasks: Sequence[str], shown: Sequence[str], title: str,
          path: Path) -> None:
    """``path`` with .md, the tables, and with .png, the curves of the first of the retention
    measures ``shown``."""
    best = best_rates(records)
    at_best = [r for r in records if r["rate"] == best[row_of(r)]]
    parts = [f"### {title}: each method at the learning rate that learns most",
             best_table(at_best, tasks, shown)]
    if (PEER, "sequential") in best:
        parts += ["### At equal learning", equal_table(records, tasks, shown[0])]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    draw(records, shown[0], title, path.with_suffix(".png"))


def row_of(record: Mapping) -> Row:
    return record["method"], record["strategy"]


def label(row: Row) -> str:
    method, strategy = row
    return method if strategy == "sequential" else f"{method}, {strategy}"


def whole(records: Sequence[dict]) -> list[dict]:
    return [record for record in records if not record["diverged"]]


def grouped(records: Sequence[dict], key: Callable[[dict], object]) -> dict[object, list[dict]]:
    found: dict[object, list[dict]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return found


def learned(record: dict) -> float:
    """Mean over tasks of what test data say right after each was trained."""
    return statistics.mean(values[task] for task, values in record["learned"].items())


def retained(measure: str) -> Measure:
    return lambda record: record["retention"]["end"][measure]


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """``0.812 ± 0.004``: mean and standard deviation; of one value that value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def best_table(records: Sequence[dict], tasks: Sequence[str], shown: Sequence[str]) -> str:
    """A line a row: each task after itself and at the end, forgetting, retention at the end, and
    what was learned above the untrained body, per 100,000 trained parameters."""
    before = records[0]["retention"]["before"]
    header = ["", "rate", "trained"]
    header += [f"{task} → end" for task in tasks[:-1]] + [tasks[-1], "forgetting"]
    header += [f"{measure} (before: {before[measure]:.3f})" for measure in shown]
    header += ["gain per 100k"]
    untrained = [learned(r) for r in whole(records) if r["method"] == UNTRAINED]
    measures = [lambda r, t=task, at=at: r["learned"][t][at]
                for task in tasks[:-1] for at in (task, tasks[-1])]
    lines = []
    for row, own in grouped(records, row_of).items():
        runs = whole(own)
        trained = own[0]["trained"]
        cells = [label(row), f"{own[0]['rate']:g}", f"{trained:,}"]
        if not runs:
            lines.append([*cells, "diverged", *[""] * (len(header) - 4)])
            continue
        texts = [mean_and_spread(list(map(measure, runs))) for measure in measures]
        cells += [f"{a} → {b}" for a, b in zip(texts[::2], texts[1::2], strict=True)]
        others = [lambda r: r["learned"][tasks[-1]][tasks[-1]],
                  lambda r: final_forgetting(r, tasks), *map(retained, shown)]
        cells += [mean_and_spread(list(map(measure, runs))) for measure in others]
        gain = ""
        if untrained and trained:
            above = statistics.mean(map(learned, runs)) - statistics.mean(untrained)
            gain = f"{above / trained * 1e5:.3g}"
        lines.append([*cells, gain])
        if len(runs) < len(own):
            lines[-1][0] += f" ({len(own) - len(runs)} of {len(own)} diverged)"
    return table(header, lines)


def equal_table(records: Sequence[dict], tasks: Sequence[str], measure: str) -> str:
    """What each row keeps, and forgets, where it learns as much as ``PEER`` does at each of its
    rates: on the straight line between its neighbouring rates, seed by seed."""
    peer = grouped([r for r in whole(records) if row_of(r) == (PEER, "sequential")],
                   lambda r: r["rate"])
    levels = {rate: statistics.mean(map(learned, own)) for rate, own in sorted(peer.items())}
    header = [f"where as much is learned as by {PEER} at"]
    for rate, level in levels.items():
        header += [f"{rate:g} ({level:.3f}): {measure}", "forgetting"]
    measures = ((retained(measure), max), (lambda r: final_forgetting(r, tasks), min))
    lines = []
    for row, own in grouped(whole(records), row_of).items():
        cells = [label(row)]
        for level in levels.values():
            for value, better in measures:
                found = [value_at(curve_of(runs, value), level, better)
                         for runs in grouped(own, lambda r: r["seed"]).values()]
                cells.append("" if None in found else mean_and_spread(found))
        lines.append(cells)
    return table(header, lines)


def curve_of(records: Sequence[dict], measure: Measure) -> list[tuple[float, float]]:
    """(learned, measure) of the runs of one row, in the order of their rates; means over seeds."""
    return [(statistics.mean(map(learned, own)), statistics.mean(map(measure, own)))
            for _, own in sorted(grouped(records, lambda r: r["rate"]).items())]


def value_at(curve: Sequence[tuple[float, float]], level: float, better: Callable = max
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


def draw(records: Sequence[dict], measure: str, title: str, path: Path) -> None:
    """Retention against learning, a line a row over its rates, a panel a family of methods: upper
    right is better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = grouped(whole(records), row_of)
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(METHODS[row[0]].family if row[1] == "sequential" else "strategies",
                          []).append(row)
    figure, grid = plt.subplots(1, len(panels), figsize=(6 * len(panels), 6), sharex=True,
                                sharey=True, squeeze=False)
    for panel, (family, own) in zip(grid[0], panels.items(), strict=True):
        for row in own:
            points = zip(*curve_of(rows[row], retained(measure)), strict=True)
            panel.plot(*points, marker="o", label=label(row))
        peer = PEER, "sequential"
        if peer in rows and peer not in own:
            points = zip(*curve_of(rows[peer], retained(measure)), strict=True)
            panel.plot(*points, marker=".", color="gray", linestyle="--", label=PEER)
        panel.axhline(records[0]["retention"]["before"][measure], color="black", linewidth=0.8,
                      linestyle=":", label="before")
        panel.set(xlabel="learned: mean over tasks, each right after it", title=family)
        panel.legend(fontsize=8)
    grid[0][0].set_ylabel(f"{measure} at the end")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
