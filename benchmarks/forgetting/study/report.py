"""Records as a table in the shape of the papers', as curves, and compared at equal learning."""

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from .methods import METHODS
from .protocol import Subject, final_forgetting
from .search import SEQUENTIAL, Row, best_rates, complete, grouped, row_of
from .unseen import KINDS

PEER = "LoRA", SEQUENTIAL  # at its levels of learning the others are compared
RIVALS = [
    (method, SEQUENTIAL)
    for method in ("LoRA", "LoRA, every layer", "CURLoRA", "CURLoRA, every layer", "CABR", "SECURA")
]
UNTRAINED = "head only"
ONE_PANEL = 10  # rows at most that are drawn in one
Measure = Callable[[dict], float]


def write(records: Sequence[dict], subject: Subject, path: Path) -> None:
    """``path`` with .md, the tables, and with .png, the curves of the first measure of retention
    that the subject shows, unless every run diverged."""
    unit = "perplexity" if subject.log_likelihood else "accuracy"
    parts = [
        f"### {subject.title}: each method at the learning rate that learns most ({unit})",
        best_table(records, subject),
    ]
    if PEER in map(row_of, records):
        parts += [
            "### At equal learning",
            equal_table(records, subject),
            "### At the best rates: how much more is kept than by others at equal learning",
            rival_table(records, subject),
        ]
    if any(map(measured_unseen, records)):
        parts += [
            "### Kinds of text that no task and no calibration is of: agreement, KL in nats",
            unseen_table(records, subject),
        ]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    if whole(records):
        draw(records, subject, path.with_suffix(".png"))


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


def mean_and_spread(values: Sequence[float | None], sign: str = "") -> str:
    """``0.812 ± 0.004``: mean and standard deviation; of one value that value. Seeds without a
    value are counted. ``sign="+"`` shows it of positive means too."""
    found = [value for value in values if value is not None]
    if not found:
        return ""
    cell = f"{statistics.mean(found):{sign}.3f}"
    if len(found) > 1:
        cell += f" ± {statistics.stdev(found):.3f}"
    return cell if len(found) == len(values) else f"{cell} ({len(found)} of {len(values)} seeds)"


def shown_as(subject: Subject) -> Callable[[float], float]:
    """What a task's value is shown as: of a mean log-likelihood the perplexity."""
    return (lambda value: math.exp(-value)) if subject.log_likelihood else (lambda value: value)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def best_table(records: Sequence[dict], subject: Subject) -> str:
    """A line a row at its best rate: each task after itself and at the end, forgetting, retention
    at the end, and what was learned above the untrained body, per 100,000 trained parameters."""
    show, tasks, best = shown_as(subject), subject.tasks, at_best(records)
    header = ["", "rate", "seeds", "trained"]
    header += [f"{task} → end" for task in tasks[:-1]] + [tasks[-1]]
    measures = lost(subject) | {
        f"{measure} (before: {subject.before[measure]:.3f})": retained(measure)
        for measure in subject.shown
    }
    header += [*measures, "gain per 100k"]
    untrained = [learned(r) for r in whole(best) if r["method"] == UNTRAINED]
    lines = []
    for row, own in grouped(best, row_of).items():
        runs = whole(own)
        trained = own[0]["trained"]
        lines.append([label(row), f"{own[0]['rate']:g}", str(len(own)), f"{trained:,}"])
        if len(runs) < len(own):
            lines[-1][0] += f" ({len(own) - len(runs)} of {len(own)} diverged)"
        if not runs:
            lines[-1] += [""] * (len(header) - 4)
            continue
        lines[-1] += [
            " → ".join(
                mean_and_spread([show(r["learned"][task][at]) for r in runs])
                for at in dict.fromkeys((task, tasks[-1]))
            )
            for task in tasks
        ]
        lines[-1] += [mean_and_spread(list(map(measure, runs))) for measure in measures.values()]
        gain = ""
        if untrained and trained:
            above = statistics.mean(map(learned, runs)) - statistics.mean(untrained)
            gain = f"{above / trained * 1e5:.3g}"
        lines[-1].append(gain)
    return table(header, lines)


def equal_table(records: Sequence[dict], subject: Subject) -> str:
    """What each row keeps, and forgets, where it learns as much as ``PEER`` does at each of its
    rates with the same seed, by ``curves_by_seed``. Of seeds that were not run at all of the row's
    rates nothing counts."""
    show, records, costs = shown_as(subject), whole(complete(records)), lost(subject)
    peer = grouped([r for r in records if row_of(r) == PEER], lambda r: r["rate"])
    levels = {rate: {r["seed"]: learned(r) for r in own} for rate, own in sorted(peer.items())}
    header = [f"where as much is learned as by {label(PEER)} at"]
    for rate, by_seed in levels.items():
        level = show(statistics.mean(by_seed.values()))
        header += [f"{rate:g} ({level:.3f}): {subject.shown[0]}", *costs]
    measures = [(retained(subject.shown[0]), max), *((cost, min) for cost in costs.values())]
    lines = []
    for row in grouped(records, row_of):
        if row[0] == UNTRAINED:
            continue
        curves = [(curves_by_seed(records, row, measure), better) for measure, better in measures]
        lines.append(
            [label(row)]
            + [
                mean_and_spread(
                    [
                        value_at(curve, by_seed[seed], better)
                        for seed, curve in of_row.items()
                        if seed in by_seed
                    ]
                )
                for by_seed in levels.values()
                for of_row, better in curves
            ]
        )
    return table(header, lines)


def rival_table(records: Sequence[dict], subject: Subject) -> str:
    """How much more than each of ``RIVALS`` a row keeps at its best rate: than the rival's run of
    the same seed where it learns as much, by ``curves_by_seed``. Needs no other rate of the row's,
    and so counts every seed."""
    show, kept = shown_as(subject), retained(subject.shown[0])
    rows, searched = set(map(row_of, records)), whole(complete(records))
    curves = {rival: curves_by_seed(searched, rival, kept) for rival in RIVALS if rival in rows}
    lines = []
    for row, own in grouped(whole(at_best(records)), row_of).items():
        if row[0] == UNTRAINED:
            continue
        lines.append(
            [
                label(row),
                str(len(own)),
                mean_and_spread([show(learned(r)) for r in own]),
                mean_and_spread(list(map(kept, own))),
            ]
        )
        for rival, by_seed in curves.items():
            theirs = [value_at(by_seed.get(r["seed"], ()), learned(r)) for r in own]
            lines[-1].append(
                ""
                if rival == row
                else mean_and_spread(
                    [
                        None if other is None else kept(r) - other
                        for r, other in zip(own, theirs, strict=True)
                    ],
                    "+",
                )
            )
    return table(["", "seeds", "learned", subject.shown[0], *map(label, curves)], lines)


def measured_unseen(record: dict) -> bool:
    """Older records have none of these measures."""
    return not record["diverged"] and f"{KINDS[0]} kl" in record["retention"]["end"]


def unseen_table(records: Sequence[dict], subject: Subject) -> str:
    """A line a row and rate, those that learned least first: what was learned, what is kept of the
    kinds that are always measured, and of each of ``KINDS``."""
    show, kept = shown_as(subject), retained(subject.shown[0])
    runs = grouped(list(filter(measured_unseen, records)), lambda r: (row_of(r), r["rate"]))
    lines = []
    for (row, rate), own in sorted(
        runs.items(), key=lambda item: statistics.mean(map(learned, item[1]))
    ):
        values = [show(learned(r)) for r in own], list(map(kept, own))
        lines.append([label(row), f"{rate:g}", str(len(own)), *map(mean_and_spread, values)])
        for kind in KINDS:
            pair = (list(map(retained(f"{kind} {of}"), own)) for of in ("agreement", "kl"))
            lines[-1].append(", ".join(map(mean_and_spread, pair)))
    return table(["", "rate", "seeds", "learned", subject.shown[0], *KINDS], lines)


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
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = (9, 7) if few else (6 * columns, 6 * lines)
    figure, grid = plt.subplots(
        lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False
    )
    least = least_shown(curves)
    heights = [y for curve in curves.values() for x, y in curve if x >= least]
    low, high = min(heights), max(*heights, subject.before[measure])
    for panel, (family, own) in zip(grid.flat, panels.items(), strict=False):
        for row in own:
            points = curves[row]
            shown = any(x >= least for x, _ in points)
            (line,) = panel.plot(
                *zip(*points, strict=True),
                marker="o",
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
        # Below the axes: within, it would lie over curves.
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
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
