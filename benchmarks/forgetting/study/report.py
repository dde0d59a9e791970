"""The report of a study: its tables and its plot, written anew."""

from collections.abc import Sequence
from pathlib import Path

from .curves import PEER, whole
from .drawing import draw
from .protocol import Subject
from .search import row_of
from .tables import best_table, equal_table, measured_unseen, rival_table, unseen_table


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
            "### Kinds of text that no task is of: agreement, KL in nats",
            unseen_table(records, subject),
        ]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    if whole(records):
        draw(records, subject, path.with_suffix(".png"))
