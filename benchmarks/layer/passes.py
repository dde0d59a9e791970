"""Each pass of the kernels beside its own roofline: bytes and operations of ``costs.py`` over the
copy bandwidth and the library's rate, both measured in the same run. On a GPU only."""

import argparse
import sys
from pathlib import Path

import ceilings
import machine
import results
import torch
import triton
from rich.console import Console
from rich.table import Table

from secura_kernels.kernels import chips
from secura_kernels.kernels.cases import RUNS, Inputs
from secura_kernels.kernels.costs import Layer
from secura_kernels.kernels.tiles import rows_of

SHAPES = ((8192, 4096, 4096, 16), (8192, 4096, 4096, 64), (8192, 4096, 4096, 150),
          (16384, 8192, 8192, 64))
# Method of Layer and of Inputs; the products take a tile.
PASSES = ("gather", "down", "down_of_gradient", "project", "epilogue", "gate_backward",
          "core_gradient", "effective_weight", "product", "product_of_input_gradient",
          "product_gate")


def measure(shape: tuple[int, int, int, int], device: torch.device, top: dict) -> list[dict]:
    M, N, K, r = shape
    inputs, layer = Inputs(M, N, K, r, torch.bfloat16, device), Layer(M, N, K, r)
    rows = []
    for name in PASSES:
        function = getattr(Inputs, name)
        tiles = [None]
        if name.startswith("product"):
            table = next(key for key, runs in RUNS.items() if function in runs)
            tiles = rows_of(table, chips.chip_of(device), torch.bfloat16, chips.rank_block(r))
        times = [triton.testing.do_bench(
            lambda f=function, t=tile: f(inputs, t) if t else f(inputs), return_mode="median")
            for tile in tiles]
        cost = getattr(layer, name)()
        seconds = min(times) / 1e3
        floor = max(cost.bytes / top["bandwidth"], cost.flops / top["flops"])
        rows.append(dict(M=M, N=N, K=K, r=r, run=name, median_ms=1e3 * seconds,
                         floor_ms=1e3 * floor, of_roofline=floor / seconds,
                         bandwidth=cost.bytes / seconds, flops=cost.flops / seconds,
                         of_bandwidth=cost.bytes / seconds / top["bandwidth"]))
    return rows


def draw(file: Path, rows: list[dict], about: dict) -> None:
    """Each pass at its operations per byte, under the two ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    top = about["ceilings"]
    figure, axes = plt.subplots(figsize=(8, 5))
    intensity = [0.1 * 1.2**i for i in range(60)]
    axes.plot(intensity, [min(x * top["bandwidth"], top["flops"]) for x in intensity], "k-")
    for name in dict.fromkeys(row["run"] for row in rows if row["flops"]):
        own = [row for row in rows if row["run"] == name]
        axes.scatter([row["flops"] / row["bandwidth"] for row in own],
                     [row["flops"] for row in own], label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="FLOP/s",
             title=f"passes under the measured ceilings, {about['gpu']}")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not torch.cuda.is_available():
        print("passes: no NVIDIA GPU is here", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    about = machine.describe(device)
    top = about["ceilings"] = ceilings.measure(device, torch.bfloat16)
    rows = [row for shape in SHAPES for row in measure(shape, device, top)]
    table = Table("M, N, K, r", "pass", "median ms", "roofline ms", "of roofline", "GB/s",
                  "TFLOP/s", title=f"{about['gpu']}: copy {top['bandwidth'] / 1e9:.0f} GB/s, "
                                   f"product {top['flops'] / 1e12:.0f} TFLOP/s")
    for row in rows:
        table.add_row(f"{row['M']}, {row['N']}, {row['K']}, {row['r']}", row["run"],
                      f"{row['median_ms']:.4f}", f"{row['floor_ms']:.4f}",
                      f"{row['of_roofline']:.0%}", f"{row['bandwidth'] / 1e9:.0f}",
                      f"{row['flops'] / 1e12:.1f}")
    Console(width=120).print(table)
    folder = machine.ROOT / "benchmarks/results" / machine.chip(device)
    results.write(folder, "passes", rows, about)
    draw(folder / "passes-roofline.png", rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
