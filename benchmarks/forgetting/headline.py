"""The picture at the top of the README: what is kept against what is learned, main methods alone.

    python benchmarks/forgetting/headline.py    # from the committed records, in a second

Of language.json, which ``run.py`` and ``strategies`` fill: a line a method over its learning rates.
Where a rate was run by two seeds or more, a cross spans their standard deviations.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

from study.curves import learned, retained, whole
from study.protocol import final_forgetting
from study.search import SEQUENTIAL, Row, grouped, row_of
from study.small_studies import RESULTS

# The rows that are drawn: in the legend, in Okabe and Ito's colours, and by a marker of their own.
ROWS: dict[Row, tuple[str, str, str]] = {
    ("CURLoRA, every layer, natural, tasks kept, gated, fresh", SEQUENTIAL): (
        "CURLoRA, natural basis, gated",
        "#009E73",
        "X",
    ),
    ("CURLoRA, every layer, natural, tasks kept, fresh", SEQUENTIAL): (
        "CURLoRA, natural basis",
        "#56B4E9",
        "*",
    ),
    ("LoRA, every layer", "base kl, weight 4"): (
        "LoRA, with KL to the base as a loss",
        "#CC79A7",
        "D",
    ),
    ("full, every layer", SEQUENTIAL): ("full fine-tuning", "#222222", "P"),
    ("CURLoRA, every layer", SEQUENTIAL): ("CURLoRA, orthonormal basis", "#E69F00", "s"),
    ("LoRA, every layer", SEQUENTIAL): ("LoRA", "#0072B2", "^"),
}


def draw(records: list[dict], tasks: list[str], path: Path) -> None:
    """Writes the PNG: agreement with the base, and the forgetting of earlier tasks.

    Raises:
        ValueError: a row of ``ROWS`` without a run.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = grouped(whole(records), row_of)
    missing = [row for row in ROWS if row not in runs]
    if missing:
        raise ValueError(f"no run of {missing} in the records")
    measures = {
        "agreement: next token as before (kept more →)": retained("agreement"),
        "forgetting of earlier tasks, nats (← kept more)": lambda r: final_forgetting(r, tasks),
    }
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        for axes, (name, measure) in zip(panels, measures.items(), strict=True):
            for row, (label, colour, marker) in ROWS.items():
                points = [
                    (spread(map(perplexity, own)), spread(map(measure, own)))
                    for _, own in sorted(grouped(runs[row], lambda r: r["rate"]).items())
                ]
                (x, dx), (y, dy) = (zip(*side, strict=True) for side in zip(*points, strict=True))
                axes.errorbar(
                    x, y, dy, dx, color=colour, marker=marker, markersize=8, capsize=2, label=label
                )
            axes.set(xlabel="perplexity on the tasks (← learned more)", ylabel=name)
            axes.grid(color="#DDDDDD")
        panels[1].legend(frameon=False, loc="upper right")
        figure.suptitle(f"SmolLM2-135M learns {len(tasks)} tasks in turn; mean ± s.d. of seeds")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def perplexity(record: dict) -> float:
    """Mean over the tasks, right after each was trained."""
    return math.exp(-learned(record))


def spread(values) -> tuple[float, float]:
    """Mean and standard deviation, 0 of one value."""
    values = list(values)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=Path, default=RESULTS / "float32" / "language.json")
    parser.add_argument("--out", type=Path, default=Path("docs/keeping.png"))
    options = parser.parse_args()
    content = json.loads(options.records.read_text())
    draw(list(content["records"].values()), content["tasks"], options.out)


if __name__ == "__main__":
    main()
