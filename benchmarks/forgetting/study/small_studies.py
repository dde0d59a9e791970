"""What the studies beside ``run.py`` share: the words of a command, and a plot of one panel."""

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).parents[2] / "results" / "forgetting"


def arguments(doc: str | None, ways: Iterable[str], files: str) -> argparse.Namespace:
    """``model``, ``way`` (all by default) and ``out``, the folder of ``files``."""
    ways = list(ways)
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="FOLDER", help="another than SmolLM2")
    parser.add_argument(
        "--way", nargs="+", choices=ways, default=ways, metavar="WAY", help="; ".join(ways)
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of {files}")
    return parser.parse_args()


@contextmanager
def drawn(path: Path, size: tuple[float, float]) -> Iterator["Axes"]:
    """What is drawn within, with a legend, into a PNG of ``size`` inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=size)
    try:
        yield axes
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(path, dpi=90)
    finally:
        plt.close(figure)
