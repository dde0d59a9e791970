"""Records as a table in the shape of the papers', as curves, and compared at equal learning."""

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from .protocol import final_forgetting
from .search import score


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """``0.812 ± 0.004``: mean and standard deviation; of one value that value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def groups(records: list[dict]) -> dict[tuple[str, str, float], list[dict]]:
    """Records by method, strategy and rate: what differs within a group is the seed."""
    found: dict[tuple[str, str, float], list[dict]] = {}
    for record in records:
        found.setdefault((record["method"], record["strategy"], record["rate"]), []).append(record)
    return found


def markdown(records: list[dict], tasks: Sequence[str], measure: str) -> str:
    """A line a method: each task after itself and at the end, forgetting, retention before and at
    the end."""
    header = ["method", "strategy", "rate", "trained"]
    header += [f"{task} → end" for task in tasks[:-1]] + [tasks[-1], "forgetting", measure]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for (method, strategy, rate), own in groups(records).items():
        whole = [record for record in own if not record["diverged"]]
        cells = [method, strategy, f"{rate:g}", f"{own[0]['trained']:,}"]
        if not whole:
            cells += ["diverged"] + [""] * (len(tasks) + 1)
            lines.append("| " + " | ".join(cells) + " |")
            continue
        end = tasks[-1]
        for task in tasks[:-1]:
            cells.append(" → ".join(mean_and_spread([r["learned"][task][at] for r in whole])
                                    for at in (task, end)))
        cells.append(mean_and_spread([r["learned"][end][end] for r in whole]))
        cells.append(mean_and_spread([final_forgetting(r, tasks) for r in whole]))
        cells.append(" → ".join(mean_and_spread([r["retention"][at][measure] for r in whole])
                                for at in ("before", end)))
        if len(whole) < len(own):
            cells[-1] += f" ({len(own) - len(whole)} of {len(own)} diverged)"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def points(records: list[dict], tasks: Sequence[str], measure: str
           ) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(learned, retained at the end) of each method and strategy, means over seeds, by rate."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (method, strategy, _), own in sorted(groups(records).items()):
        whole = [record for record in own if not record["diverged"]]
        if whole:
            found.setdefault((method, strategy), []).append((
                statistics.mean(map(score, whole)),
                statistics.mean(r["retention"][tasks[-1]][measure] for r in whole)))
    return found


def retained_at(curve: Sequence[tuple[float, float]], learned: float) -> float | None:
    """What a method keeps at a level of learning, between the neighbouring rates; None outside
    them. Where a curve passes the level more than once, the most that is kept counts.

    Args:
        curve: (learned, retained) in the order of the rates.
    """
    found = []
    for (x0, y0), (x1, y1) in pairwise(curve):
        if min(x0, x1) <= learned <= max(x0, x1):
            part = 0.5 if x0 == x1 else (learned - x0) / (x1 - x0)
            found.append(y0 + part * (y1 - y0))
    return max(found, default=None)


def draw(records: list[dict], tasks: Sequence[str], measure: str, title: str, path: Path) -> None:
    """Retention against learning, a line a method over its rates: upper right is better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(8, 5))
    for (method, strategy), curve in points(records, tasks, measure).items():
        name = method if strategy == "sequential" else f"{method}, {strategy}"
        panel.plot(*zip(*curve, strict=True), marker="o", label=name)
    before = [r["retention"]["before"][measure] for r in records]
    panel.axhline(statistics.mean(before), color="black", linewidth=0.8, linestyle=":",
                  label="before")
    panel.set(xlabel="learned: mean over tasks, each right after it was trained",
              ylabel=f"{measure} at the end", title=title)
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
