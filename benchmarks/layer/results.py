"""Figures as a table, as JSON and CSV, and drawn."""

import csv
import json
from pathlib import Path

import model
from rich.console import Console
from rich.table import Table

from secura_kernels.tools.costs import Layer

MODE = "both"


def predicted(row: dict, about: dict) -> float | None:
    """The ratio to the frozen layer by ``model.py``; None for a chip, a rival or a mode that it has
    nothing on."""
    chip = next((c for name, c in model.CEILINGS.items() if name in about.get("gpu", "")), None)
    if chip is None or row["mode"] != MODE or row["dtype"] == "float32":
        return None
    layer = Layer(row["M"], row["N"], row["K"], row["r"], g=1 if row["dtype"] == "bfloat16" else 2)
    if row["rival"] == "LoRA (PEFT)":
        return model.lora(layer, chip) / model.frozen(layer, chip)
    gates = {"CURLoRA, triton": False, "SECURA, triton": True}
    return model.ratio(layer, gates[row["rival"]], chip) if row["rival"] in gates else None


def table(rows: list[dict], about: dict) -> Table:
    """Forward and backward, one line a case and rival."""
    shown = Table(
        title=f"forward + backward; {about.get('gpu', about['processor'])}, torch "
        f"{about['torch']}, {about['date']}"
    )
    for column in (
        "layer",
        "M, N, K",
        "r",
        "dtype",
        "rival",
        "median ms",
        "quartiles",
        "host ms",
        "graph ms",
        "÷ frozen",
        "predicted",
        "TFLOP/s",
        "of ceiling",
        "saved MB",
        "peak MB",
        "error",
    ):
        shown.add_column(column)
    for row in rows:
        if row["mode"] != MODE:
            continue
        rate = row["flops"] / row["median_ms"] * 1e3
        ceiling = about.get("ceilings", {}).get(row["dtype"], {}).get("flops")
        shown.add_row(
            f"{row['model']} {row['layer']}",
            f"{row['M']}, {row['N']}, {row['K']}",
            str(row["r"]),
            row["dtype"],
            row["rival"],
            f"{row['median_ms']:.3f}",
            f"{row['low_ms']:.3f}-{row['high_ms']:.3f}",
            f"{row['host_ms']:.3f}",
            "" if row["graph_ms"] is None else f"{row['graph_ms']:.3f}",
            f"{row['ratio']:.3f}",
            _beside(row),
            f"{rate / 1e12:.2f}",
            f"{rate / ceiling:.0%}" if ceiling else "",
            f"{row['saved_bytes'] / 1e6:.2f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}",
            "" if row["error"] is None else f"{row['error']:.1e}",
        )
    return shown


def _beside(row: dict) -> str:
    """The prediction, with a mark where the measured ratio is far from it."""
    if row["predicted"] is None:
        return ""
    far = model.flag(row["predicted"], row["ratio"])
    return f"{row['predicted']:.3f}{' !' * far}"


def print_table(rows: list[dict], about: dict) -> None:
    Console(width=180).print(table(rows, about))


def write(folder: Path, name: str, rows: list[dict], about: dict) -> None:
    """``name``.json (with the machine) and ``name``.csv (the rows alone)."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(dict(machine=about, rows=rows), indent=1)
    (folder / f"{name}.json").write_text(content + "\n")
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(folder: Path, name: str, rows: list[dict], about: dict) -> list[Path]:
    """The ratio to the frozen layer against tokens and against rank, where there are several."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for axis, label in (("M", "tokens"), ("r", "rank")):
        if len({row[axis] for row in rows}) < 2:
            continue
        # One panel a layer, at most six; the median over the other axis.
        cases = [row for row in rows if row["mode"] == MODE and row["rival"] != "frozen"]
        layers = sorted({(row["model"], row["layer"], row["dtype"]) for row in cases})[:6]
        figure, panels = plt.subplots(
            1, len(layers), figsize=(5 * len(layers), 4), squeeze=False, sharey=True
        )
        for panel, layer in zip(panels[0], layers, strict=True):
            own = [r for r in cases if (r["model"], r["layer"], r["dtype"]) == layer]
            for rival in dict.fromkeys(row["rival"] for row in own):
                points: dict[int, list[float]] = {}
                for row in own:
                    if row["rival"] == rival:
                        points.setdefault(row[axis], []).append(row["ratio"])
                x = sorted(points)
                y = [sorted(points[v])[len(points[v]) // 2] for v in x]
                panel.plot(x, y, marker="o", label=rival)
            panel.axhline(1, color="black", linewidth=0.8)
            ticks = sorted({row[axis] for row in own})
            panel.set_xscale("log")
            panel.set_xticks(ticks, map(str, ticks))
            panel.minorticks_off()
            panel.set(xlabel=label, title=" ".join(layer))
        panels[0][0].set_ylabel("time ÷ frozen linear")
        panels[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.suptitle(f"forward + backward, {about.get('gpu', about['processor'])}")
        written.append(folder / f"{name}-{label}.png")
        figure.savefig(written[-1], dpi=120, bbox_inches="tight")
        plt.close(figure)
    return written
