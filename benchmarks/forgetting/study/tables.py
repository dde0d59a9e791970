"""Records as tables: in the shape of the papers', and compared at equal learning."""

import math
import statistics
from collections.abc import Callable, Sequence

from .curves import (
    PEER,
    UNTRAINED,
    at_best,
    curves_by_seed,
    label,
    learned,
    lost,
    retained,
    value_at,
    whole,
)
from .protocol import Subject
from .search import SEQUENTIAL, complete, grouped, row_of
from .unseen import KINDS

RIVALS = [
    (method, SEQUENTIAL)
    for method in ("LoRA", "LoRA, every layer", "CURLoRA", "CURLoRA, every layer", "CABR", "SECURA")
]


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
    rates with the same seed, by ``curves_by_seed``. A seed that was run at fewer rates than others
    has a coarser line, which says too little of what is kept."""
    show, records, costs = shown_as(subject), whole(records), lost(subject)
    peer = grouped([r for r in complete(records) if row_of(r) == PEER], lambda r: r["rate"])
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
