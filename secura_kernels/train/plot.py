"""A picture of where a model has moved: drift and size of the change, layer by layer."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..checks import fail
from .drift import drift
from .retention import core_sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, distinct for colour-blind readers; the marker says the same again.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#222222")
MARKERS = "os^Dv*P"


def plot_layers(model: nn.Module, path: str | os.PathLike) -> None:
    """Draws each adapted layer's drift ||delta_W|| / ||W|| (``drift.drift``) into a PNG, and
    where there are calibrated bases the size of its core in nats a token
    (``retention.core_sizes``), of which ``predicted_kl`` is a multiple of the sum.

    Layers of one name (``q_proj``) are a line over the numbers of their blocks. The file is
    replaced as a whole or not at all. Needs matplotlib.

    Raises:
        ImportError: no matplotlib. ValueError: a model without adapted layers.
        Others: those of ``drift.drift``.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: no window, no global state
    except ImportError:
        raise ImportError("plot_layers needs matplotlib: pip install matplotlib") from None
    moved = {name: layer.relative for name, layer in drift(model).items()}
    if not moved:
        raise fail("model", type(model).__name__, "a model with adapted layers")
    panels = {"drift: ‖ΔW‖ / ‖W‖": moved}
    sizes = core_sizes(model)
    if sizes:
        panels["size of the core, nats a token"] = sizes
    kinds = list(dict.fromkeys(kind_and_block(name)[0] for name in moved))
    figure = Figure(figsize=(5.5 * len(panels) + 1, 4), layout="constrained")
    everywhere = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, values) in zip(everywhere, panels.items(), strict=True):
        _draw(axes, values, kinds)
        axes.set(xlabel="block", ylabel=label)
    figure.legend(
        *everywhere[0].get_legend_handles_labels(), loc="outside right upper", frameon=False
    )
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(unfinished, format="png", dpi=150)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _draw(axes: "Axes", values: dict[str, float], kinds: list[str]) -> None:
    """A line a kind of layer, which looks the same in every panel."""
    from matplotlib.ticker import MaxNLocator

    lines: dict[str, list[tuple[int, float]]] = {}
    for place, (name, value) in enumerate(values.items()):
        kind, block = kind_and_block(name)
        lines.setdefault(kind, []).append((place if block is None else block, value))
    for kind, points in lines.items():
        i = kinds.index(kind)
        blocks, heights = zip(*sorted(points), strict=True)
        axes.plot(
            blocks,
            heights,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            linewidth=1,
            label=kind or "the layer",  # a layer alone has no name
        )
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def kind_and_block(name: str) -> tuple[str, int | None]:
    """``q_proj``, 3 of ``model.layers.3.self_attn.q_proj``; the whole name, None where it has no
    number between others, as the one of ``nn.Sequential``'s layers is all that tells them apart."""
    found = re.search(r"\.(\d+)\.(?:.*\.)?([^.\d]+\w*)$", name)
    return (name, None) if found is None else (found[2], int(found[1]))
