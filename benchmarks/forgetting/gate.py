"""What S-MagNorm makes of a change, element by element: a table and a plot, in seconds.

    python benchmarks/forgetting/gate.py

An element of the base is 1, its change d. Without a gate the result is 1 + d.
"""

import argparse
from pathlib import Path

import torch
from study.small_studies import RESULTS, drawn
from study.tables import table

from secura_kernels import SMagNorm
from secura_kernels.backends.reference.eager import smagnorm

GATES = {
    "calibrated": SMagNorm(),
    "published": SMagNorm.preset("published"),
    "figure": SMagNorm.preset("figure"),
    "calibrated, scale 1": SMagNorm(scale=1.0),
    "calibrated, shift 4": SMagNorm(shift=4.0),
}
SHOWN = (-2.0, -1.0, -0.1, 0.1, 1.0, 2.0)
LARGEST = 4.0  # what `figure` measures changes against: the largest of the matrix


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gate.md and gate.png")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    lines = results()
    (out / "gate.md").write_text(lines + "\n")
    draw(out / "gate.png")
    print(lines)


def result(changes: torch.Tensor, norm: SMagNorm) -> torch.Tensor:
    """Of each change (n,) of a base of 1, beside one change of ``LARGEST``."""
    changes = torch.cat([changes, torch.tensor([LARGEST], dtype=changes.dtype)])
    return smagnorm(torch.ones_like(changes), changes, norm)[:-1]


def results() -> str:
    """The table: a line a gate, a column a change."""
    changes = torch.tensor(SHOWN, dtype=torch.float64)
    lines = [["no gate", *(f"{1 + d:.2f}" for d in SHOWN)]]
    lines += [
        [name, *(f"{value:.2f}" for value in result(changes, norm).tolist())]
        for name, norm in GATES.items()
    ]
    return table(["out, where the base is 1 and d is", *(f"{d:g}" for d in SHOWN)], lines)


def draw(path: Path) -> None:
    changes = torch.linspace(-LARGEST, LARGEST, 800, dtype=torch.float64)  # without 0
    with drawn(path, (6, 5)) as axes:
        axes.plot(changes, 1 + changes, color="black", linestyle=":", label="no gate: 1 + d")
        for name, norm in GATES.items():
            axes.plot(changes, result(changes, norm), label=name)
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set(
            xlabel="d: the change of an element whose base is 1",
            ylabel="out = (beta + d) / g",
            title="S-MagNorm, element by element",
        )


if __name__ == "__main__":
    main()
