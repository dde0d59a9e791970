"""A batch of many adapters against a batch of one: PEFT layers, forward, inference.

    python benchmarks/layer/mixed.py

Each of 64 samples names its adapter. SECURA and CURLoRA adapters of one seed share their columns
and rows, so that such a batch gathers cores; PEFT's LoRA runs one sub-batch an adapter. Outputs are
compared with single runs before anything is timed.
"""

import argparse
import json
import statistics
from pathlib import Path

import machine
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import WARM_UP, Clock, summary
from torch import Tensor, nn

from secura_kernels.peft import SecuraConfig

SAMPLES = 64
COUNTS = (1, 8, 64)
# Of a value of size 1, between a mixed batch and single runs: sums in another order.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    rows = measure(options, device)
    about = machine.describe(device)
    Console(width=120).print(table(rows, about))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "mixed.json").write_text(
        json.dumps(dict(machine=about, rows=rows), indent=1) + "\n"
    )
    plot(rows, about, options.out / "mixed.png")
    print(f"written: {options.out / 'mixed.json'} and mixed.png")


def methods(r: int) -> dict[str, PeftConfig]:
    common = dict(r=r, target_modules=["0"])
    return {
        "CURLoRA": SecuraConfig(variant="curlora", basis="raw", **common),
        "SECURA": SecuraConfig(variant="secura", basis="raw", norm="calibrated", **common),
        "LoRA (PEFT)": LoraConfig(lora_alpha=r, **common),
    }


def build(config: PeftConfig, options: argparse.Namespace, device: torch.device) -> PeftModel:
    """One linear layer with 64 adapters whose trained values are random."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(options.K, options.N, bias=False)).to(device, dtype(options))
    model = get_peft_model(base, config, adapter_name="a0")
    for i in range(1, SAMPLES):
        model.add_adapter(f"a{i}", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" not in name:
                parameter.normal_(std=0.02)
    return model.eval()


def dtype(options: argparse.Namespace) -> torch.dtype:
    return getattr(torch, options.dtype)


def names(count: int) -> list[str]:
    return [f"a{i % count}" for i in range(SAMPLES)]


@torch.no_grad()
def check(model: PeftModel, x: Tensor) -> None:
    """A mixed batch equals its single runs, to rounding.

    Raises:
        AssertionError: it does not.
    """
    whole = model(x, adapter_names=names(SAMPLES))
    for i in range(SAMPLES):
        model.set_adapter(f"a{i}")
        allowed = ROUNDING[x.dtype]
        torch.testing.assert_close(whole[i], model(x[i : i + 1])[0], rtol=allowed, atol=allowed)


@torch.no_grad()
def measure(options: argparse.Namespace, device: torch.device) -> list[dict]:
    """Rows, one a method and number of adapters; within a round all of them take turns."""
    x = torch.randn(SAMPLES, options.tokens, options.K, device=device).to(dtype(options))
    models = {}
    for name, config in methods(options.rank).items():
        models[name] = build(config, options, device)
        check(models[name], x)
    cases = [(name, count) for name in models for count in COUNTS]
    times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    clock = Clock(device)
    for i in track(range(WARM_UP + options.rounds), console=Console(stderr=True)):
        for name, count in cases:
            start = clock.mark()
            models[name](x, adapter_names=names(count))
            ms = clock.between(start, clock.mark())
            if i >= WARM_UP:
                times[name, count].append(ms)
        cases.append(cases.pop(0))
    shape = dict(
        N=options.N,
        K=options.K,
        r=options.rank,
        samples=SAMPLES,
        tokens=options.tokens,
        dtype=options.dtype,
    )
    return [
        shape
        | dict(method=name, adapters=count)
        | summary(times[name, count])
        | dict(
            ratio=statistics.median(
                a / b for a, b in zip(times[name, count], times[name, 1], strict=True)
            )
        )
        for name in models
        for count in COUNTS
    ]


def table(rows: list[dict], about: dict) -> Table:
    first = rows[0]
    shown = Table(
        title=f"{SAMPLES} x {first['tokens']} tokens, N, K = {first['N']}, "
        f"{first['K']}, r = {first['r']}, {first['dtype']}; "
        f"{about.get('gpu', about['processor'])}, {about['date']}"
    )
    for column in ("method", "adapters in the batch", "median ms", "quartiles", "÷ one adapter"):
        shown.add_column(column)
    for row in rows:
        shown.add_row(
            row["method"],
            str(row["adapters"]),
            f"{row['median_ms']:.2f}",
            f"{row['low_ms']:.2f}-{row['high_ms']:.2f}",
            f"{row['ratio']:.2f}",
        )
    return shown


def plot(rows: list[dict], about: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(5, 4))
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        panel.plot(
            [row["adapters"] for row in own], [row["ratio"] for row in own], marker="o", label=name
        )
    panel.set_xscale("log", base=2)
    panel.set_xticks(COUNTS, map(str, COUNTS))
    panel.set(
        xlabel=f"adapters among {SAMPLES} samples",
        ylabel="time ÷ one adapter's batch",
        title=about.get("gpu", about["processor"]),
    )
    panel.set_ylim(bottom=0)
    panel.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)
    parser.add_argument(
        "--dtype",
        choices=[str(d).removeprefix("torch.") for d in ROUNDING],
        default="bfloat16" if device == "cuda" else "float32",
    )
    parser.add_argument("--N", type=int, default=1536)
    parser.add_argument("--K", type=int, default=1536)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16, help="of each sample")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--out",
        type=Path,
        default=machine.ROOT / "benchmarks" / "results" / machine.chip(torch.device(device)),
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
