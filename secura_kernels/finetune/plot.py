"""One picture: how each method learned, and what it kept of what the model knew before."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from .report import Results, trained
from .settings import BASE, METHODS

INK, GREY = "#222222", "#8A8A8A"
# Okabe and Ito's colours, distinct for colour-blind readers; the marker says the same again, and
# DoRA's is hollow because it often lies on LoRA's.
STYLES = {
    "gated": {"color": "#009E73", "marker": "X", "linestyle": "--"},
    "natural": {"color": "#009E73", "marker": "*", "linestyle": "-"},
    "curlora": {"color": "#E69F00", "marker": "s", "linestyle": "-"},
    "secura": {"color": "#D55E00", "marker": "o", "linestyle": "-"},
    "lora": {"color": "#0072B2", "marker": "^", "linestyle": "--"},
    "dora": {"color": "#CC79A7", "marker": "D", "linestyle": ":", "fillstyle": "none"},
    "full": {"color": INK, "marker": "P", "linestyle": "--"},
}
OUTSIDE = 1.5  # times the perplexity of before: what unlearned the task is named, not drawn
SMOOTHED_FROM = 50  # steps; shorter curves are drawn as they are


def draw(path: Path, results: Results, title: str) -> None:
    """Write the PNG: loss curves on the left, learning against forgetting on the right."""
    rc = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with plt.rc_context(rc):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        draw_losses(left, results)
        draw_retention(right, results)
        figure.suptitle(title, fontsize=11, color=INK)
        half = path.with_name(path.name + ".tmp")
        figure.savefig(half, dpi=150, format="png")
        plt.close(figure)
    half.replace(path)


def draw_losses(axes: Axes, results: Results) -> None:
    """Training loss by step; long runs as a running mean over the raw values."""
    for name, result in trained(results).items():
        style = STYLES[name]
        losses = result["losses"]
        steps = range(1, len(losses) + 1)
        shown = losses
        if len(losses) >= SMOOTHED_FROM:
            axes.plot(steps, losses, color=style["color"], alpha=0.15, linewidth=0.8)
            shown = running_mean(losses, 0.9)
        axes.plot(
            steps,
            shown,
            **style,
            linewidth=1.8,
            markersize=6,
            markevery=max(1, len(losses) // 8),
            label=METHODS[name].label,
        )
    axes.set(xlabel="training step", ylabel="training loss (nats per token)")
    axes.set_title("Training: the same batches for all", loc="left", fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.legend(frameon=False)


def running_mean(values: list[float], keep: float) -> list[float]:
    """Exponential running mean, started at the first value."""
    means = [values[0]]
    for value in values[1:]:
        means.append(keep * means[-1] + (1 - keep) * value)
    return means


def draw_retention(axes: Axes, results: Results) -> None:
    """What was learned of the task against what is still predicted as before on general text."""
    before = results[BASE]["task_perplexity"], 1.0
    for name, result in trained(results).items():
        style = STYLES[name] | {"linestyle": "none", "label": METHODS[name].label}
        after = result["task_perplexity"], result["agreement"]
        if after[0] > OUTSIDE * before[0]:
            style["label"] += f" (outside: {after[0]:.0f}, {after[1]:.2f})"
            axes.plot([], [], **style, markersize=9)
            continue
        axes.annotate(
            "",
            after,
            before,
            arrowprops={
                "arrowstyle": "-",
                "linewidth": 1.2,
                "color": style["color"],
                "alpha": 0.35,
            },
        )
        axes.plot(*after, **style, markersize=9)
    axes.plot(*before, "X", color=INK, markersize=10, label="before training")
    axes.axhline(before[1], color=GREY, linewidth=0.8, linestyle=(0, (4, 4)), zorder=0)
    axes.margins(0.15)
    axes.set(
        xlabel="perplexity on held-out task text  (← learned more)",
        ylabel="general text: next token as before  (kept more →)",
    )
    axes.set_title("Learning against forgetting: high and left is good", loc="left", fontsize=10)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.legend(frameon=False)
