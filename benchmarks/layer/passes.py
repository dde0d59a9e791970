"""Each pass of the Triton and of the CUDA kernels beside its own roofline (bytes and operations of
``costs.py`` over the copy bandwidth and the library's rate, both measured in the same run), and the
products beside cuBLAS. On a GPU only; each pass is replayed from a CUDA graph. dT is added to G' by
Triton's core gradient, but by CUDA's gate backward."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ceilings
import machine
import results
import torch
from cuda_cases import LIBRARY, CudaPasses
from rich.console import Console
from rich.table import Table

from secura_kernels.backends.triton import chips
from secura_kernels.backends.triton.tiles import rows_of
from secura_kernels.ops import why_unavailable
from secura_kernels.tools.cases import ADAPTERS, RUNS, Inputs
from secura_kernels.tools.costs import Batch
from secura_kernels.tools.replay import FAILURES, first_line, replayed_ms

SHAPES = (
    (8192, 4096, 4096, 16),
    (8192, 4096, 4096, 64),
    (8192, 4096, 4096, 150),
    (16384, 8192, 8192, 64),
)
# Method of Batch, of Inputs and, where CUDA has the pass, of CudaPasses; the products of Inputs
# take a tile. Those from ``own_core`` on are of a batch of several adapters.
PASSES = (
    "gather",
    "down",
    "down_of_gradient",
    "project",
    "epilogue",
    "gate_backward",
    "core_gradient",
    "effective_weight",
    "product",
    "product_of_input_gradient",
    "product_gate",
    "own_core",
    "own_core_of_gradient",
    "batched_epilogue",
    "core_parts",
    "bias_parts",
    "sum_of_core_parts",
    "sum_of_bias_parts",
)
IMPLS = {"triton": "Triton", "cuda": "CUDA", "cublas": "cuBLAS"}
ROUNDS = 2  # the implementations take turns, the best round of each counts


def contenders(name: str, inputs: Inputs, cuda: bool) -> dict[str, list[Callable[[], object]]]:
    """The forms in which each implementation can run a pass; its fastest counts."""
    function = getattr(Inputs, name)
    tiles = [()]
    if name.startswith("product"):
        table = next(key for key, runs in RUNS.items() if function in runs)
        rank = chips.rank_block(inputs.r)
        tiles = [
            (tile,) for tile in rows_of(table, chips.chip_of(inputs.x.device), inputs.dtype, rank)
        ]
    found = {"triton": [partial(function, inputs, *tile) for tile in tiles]}
    if cuda and hasattr(CudaPasses, name):
        found["cuda"] = [getattr(CudaPasses(inputs), name)]
    if name in LIBRARY:
        found["cublas"] = [partial(LIBRARY[name], inputs)]
    return found


def measure(
    shape: tuple[int, int, int, int], device: torch.device, top: dict, cuda: bool
) -> tuple[list[dict], list[str]]:
    """Rows, one a pass and implementation, and what went wrong."""
    M, N, K, r = shape
    inputs = Inputs(M, N, K, r, torch.bfloat16, device)
    layer = Batch(M, N, K, r, A=ADAPTERS, I=ADAPTERS)
    rows, wrong = [], []
    for name in PASSES:
        found = contenders(name, inputs, cuda)
        best: dict[str, float] = {}
        for impl in [*found] * ROUNDS:
            try:
                ms = min(replayed_ms(form, rep=50) for form in found[impl])
            except FAILURES as error:  # one that fails must not cost the others' figures
                wrong.append(f"{IMPLS[impl]} {name} at {shape}: {first_line(error)}")
                continue
            best[impl] = min(ms / 1e3, best.get(impl, float("inf")))
        for impl, seconds in best.items():
            cost = layer.library(M, N, K) if impl == "cublas" else getattr(layer, name)()
            floor = max(cost.bytes / top["bandwidth"], cost.flops / top["flops"])
            rows.append(
                dict(
                    M=M,
                    N=N,
                    K=K,
                    r=r,
                    run=name,
                    impl=impl,
                    median_ms=1e3 * seconds,
                    floor_ms=1e3 * floor,
                    of_roofline=floor / seconds,
                    bandwidth=cost.bytes / seconds,
                    flops=cost.flops / seconds,
                    of_bandwidth=cost.bytes / seconds / top["bandwidth"],
                    of_cublas=best["cublas"] / seconds if "cublas" in best else None,
                )
            )
    return rows, wrong


def table(rows: list[dict], about: dict) -> Table:
    """One line a shape and pass; "of cuBLAS": its time over ours."""
    top = about["ceilings"]
    shown = Table(
        "M, N, K, r",
        "pass",
        "roofline ms",
        *[f"{name} ms (of roofline)" for name in IMPLS.values()],
        "Triton of cuBLAS",
        "CUDA of cuBLAS",
        caption="\n".join(about["missing"]),
        title=f"{about['gpu']}: copy {top['bandwidth'] / 1e9:.0f} GB/s, product "
        f"{top['flops'] / 1e12:.0f} TFLOP/s",
    )
    lines: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = row["M"], row["N"], row["K"], row["r"], row["run"]
        lines.setdefault(key, {})[row["impl"]] = row
    for (*shape, run), by_impl in lines.items():
        found = [by_impl.get(impl) for impl in IMPLS]
        times = [
            f"{row['median_ms']:.4f} ({row['of_roofline']:.0%})" if row else "" for row in found
        ]
        ratios = [
            f"{row['of_cublas']:.2f}" if row and row["of_cublas"] else "" for row in found[:2]
        ]
        floor = next(iter(by_impl.values()))["floor_ms"]
        shown.add_row(", ".join(map(str, shape)), run, f"{floor:.4f}", *times, *ratios)
    return shown


def draw(file: Path, rows: list[dict], about: dict) -> None:
    """Each pass at its operations per byte, under the two ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    top = about["ceilings"]
    figure, axes = plt.subplots(figsize=(8, 5))
    intensity = [0.1 * 1.2**i for i in range(60)]
    axes.plot(intensity, [min(x * top["bandwidth"], top["flops"]) for x in intensity], "k-")
    shapes = dict(zip(IMPLS, "o^s", strict=True))
    for i, name in enumerate(dict.fromkeys(row["run"] for row in rows if row["flops"])):
        for impl, marker in shapes.items():
            own = [row for row in rows if (row["run"], row["impl"]) == (name, impl)]
            axes.scatter(
                [row["flops"] / row["bandwidth"] for row in own],
                [row["flops"] for row in own],
                color=f"C{i}",
                marker=marker,
            )
        axes.scatter([], [], color=f"C{i}", marker="o", label=name)
    for impl, marker in shapes.items():
        axes.scatter([], [], color="black", marker=marker, label=IMPLS[impl])
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte",
        ylabel="FLOP/s",
        title=f"passes under the measured ceilings, {about['gpu']}",
    )
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not torch.cuda.is_available():
        print("passes: no NVIDIA GPU is here", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    about = machine.describe(device)
    top = about["ceilings"] = ceilings.measure(device, torch.bfloat16)
    reason = why_unavailable("cuda", device, torch.bfloat16, max(shape[3] for shape in SHAPES))
    rows, wrong = [], []
    for shape in SHAPES:
        found, failed = measure(shape, device, top, cuda=reason is None)
        rows += found
        wrong += failed
    about["missing"] = [f"no CUDA times: {reason}"] * (reason is not None) + sorted(set(wrong))
    Console(width=180).print(table(rows, about))
    folder = machine.ROOT / "benchmarks/results" / machine.chip(device)
    results.write(folder, "passes", rows, about)
    draw(folder / "passes-roofline.png", rows, about)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
