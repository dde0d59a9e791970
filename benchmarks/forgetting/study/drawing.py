"""Retention against learning, drawn."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from .curves import (
    PEER,
    UNTRAINED,
    Measure,
    at_best,
    curve_of,
    label,
    learned,
    retained,
    whole,
)
from .methods import METHODS
from .protocol import Subject
from .search import SEQUENTIAL, Row, complete, grouped, row_of

ONE_PANEL = 10  # rows at most that are drawn in one
COLOURS = 10  # of matplotlib's lines; the rows after them have another marker


def draw(records: Sequence[dict], subject: Subject, path: Path) -> None:
    """Retention against learning, a line a row over its rates: upper right is better. A panel a
    family of methods, or one for all where they are few. A line is of the seeds that were run at
    all of its rates; a cross spans the standard deviations of a best rate's seeds. What learned far
    less than the untrained body lies outside; the legend names rows of which nothing is seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measure = subject.shown[0]
    unit = "mean log-likelihood" if subject.log_likelihood else "accuracy"
    rows = grouped(whole(complete(records)), row_of)
    curves = {row: curve_of(own, retained(measure)) for row, own in rows.items()}
    seeds = {
        row: spans(own, retained(measure))
        for row, own in grouped(whole(at_best(records)), row_of).items()
        if len(own) > 1
    }
    panels: dict[str, list[Row]] = {}
    few = len(rows) <= ONE_PANEL
    for row in rows:
        family = METHODS[row[0]].family if row[1] == SEQUENTIAL else "strategies"
        panels.setdefault("all methods" if few else family, []).append(row)
    lines = math.ceil(len(panels) / 3)
    columns = math.ceil(len(panels) / lines)
    size = (9, 7) if few else (6.5 * columns, 7.5 * lines)
    figure, grid = plt.subplots(
        lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False
    )
    least = least_shown(curves)
    heights = [y for curve in curves.values() for x, y in curve if x >= least]
    low, high = min(heights), max(*heights, subject.before[measure])
    for panel, (family, own) in zip(grid.flat, panels.items(), strict=False):
        for number, row in enumerate(own):
            points = curves[row]
            shown = any(x >= least for x, _ in points)
            (line,) = panel.plot(
                *zip(*points, strict=True),
                marker="os"[number >= COLOURS],
                label=label(row) if shown else f"{label(row)}: left of the plot",
            )
            if row in seeds:
                panel.errorbar(*seeds[row], color=line.get_color(), capsize=3)
        if PEER in curves and PEER not in own:
            panel.plot(
                *zip(*curves[PEER], strict=True),
                marker=".",
                color="gray",
                linestyle="--",
                label=label(PEER),
            )
        panel.axhline(
            subject.before[measure], color="black", linewidth=0.8, linestyle=":", label="before"
        )
        panel.set(
            xlabel=f"learned: {unit}, mean over tasks right after each",
            title=family,
            ylabel=f"{measure} at the end",
        )
        panel.tick_params(labelbottom=True, labelleft=True)
        # Below the axes, since within it would lie over curves; in one column, since a legend wider
        # than its axes narrows them.
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    for panel in grid.flat[len(panels) :]:
        panel.remove()
    room = 0.05 * (high - low)
    grid[0][0].set(xlim=(least, None), ylim=(low - room, high + room))
    figure.suptitle(subject.title)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def spans(records: Sequence[dict], measure: Measure) -> tuple[float, float, float, float]:
    """Means of what was learned and of the measure, then the standard deviations: of the measure,
    and of what was learned."""
    xs, ys = list(map(learned, records)), list(map(measure, records))
    return statistics.mean(xs), statistics.mean(ys), statistics.stdev(ys), statistics.stdev(xs)


def least_shown(curves: dict[Row, list[tuple[float, float]]]) -> float:
    """Left end of the plot: the least that was learned, but no further under the untrained body
    than a third of what was learned most above it; and a margin."""
    values = [x for curve in curves.values() for x, _ in curve]
    most = max(values)
    untrained = [curve[0][0] for (method, _), curve in curves.items() if method == UNTRAINED]
    start = max([min(values), *(x - (most - x) / 3 for x in untrained)])
    return start - 0.02 * (most - start)
