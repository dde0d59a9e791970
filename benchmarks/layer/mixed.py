"""A batch of many adapters against a batch of one: PEFT layers, inference and training.

    python benchmarks/layer/mixed.py

Each of 64 samples names its adapter; by token, a row of the batch holds four of them. SECURA and
CURLoRA adapters of one seed share their columns and rows, so that such a batch gathers cores;
PEFT's LoRA runs one sub-batch an adapter, and refuses to train one. Training computes the gradients
of the input and of all adapters in the batch. Outputs and gradients are compared with single runs
before anything is timed. On a CPU one thread runs and its own time is taken, so that what else the
machine does counts little.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import machine
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import WARM_UP, Clock, summary
from torch import Tensor, nn

from secura_kernels.peft import AdaptersByToken, SecuraConfig

SAMPLES = 64
CHECKED = 7  # of the samples every seventh is compared with its single run
PACKED = 4  # samples in a row of the batch, by token
FORWARD, TRAINING, BY_TOKEN = "forward", "forward + backward", "forward + backward, by token"
COUNTS = (1, 8, 64)
# Of a value of size 1, between a mixed batch and single runs: sums in another order.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
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
    model.set_requires_grad([f"a{i}" for i in range(SAMPLES)])
    return model.eval()


def dtype(options: argparse.Namespace) -> torch.dtype:
    return getattr(torch, options.dtype)


def names(count: int) -> list[str]:
    return [f"a{i % count}" for i in range(SAMPLES)]


class OwnClock(Clock):
    """As ``Clock``; on a CPU the milliseconds that this process has run."""

    def mark(self):
        return super().mark() if self.gpu else time.process_time()


def inputs(x: Tensor, count: int, what: str) -> tuple[Tensor, list[str] | AdaptersByToken]:
    """x (SAMPLES, tokens, K) as it is given to a model, and the adapters of its samples."""
    if what != BY_TOKEN:
        return x, names(count)
    packed = x.view(SAMPLES // PACKED, -1, x.shape[-1])
    samples = torch.arange(SAMPLES, device=x.device).repeat_interleave(x.shape[1])
    return packed, AdaptersByToken(names(count), samples.view(packed.shape[:-1]))


def step(model: PeftModel, x: Tensor, adapters: list[str] | AdaptersByToken, what: str) -> Tensor:
    """y; in training also the gradients, with 1 for the gradient of y."""
    if what == FORWARD:
        with torch.no_grad():
            return model(x, adapter_names=adapters)
    y = model(x.requires_grad_(), adapter_names=adapters)
    y.backward(torch.ones_like(y))
    return y


def trains(config: PeftConfig) -> bool:
    return isinstance(config, SecuraConfig)


def check(model: PeftModel, x: Tensor, what: str) -> None:
    """A mixed batch equals its single runs, to rounding.

    Raises:
        AssertionError: it does not.
    """

    def run(x: Tensor, adapters: list[str] | AdaptersByToken) -> tuple[Tensor, dict[str, Tensor]]:
        x = x.detach().clone()
        y = step(model, x, adapters, what).detach()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        if x.grad is not None:
            found["x"] = x.grad.view(-1, *x.shape[-2:])
        model.zero_grad()
        return y, found

    allowed = dict.fromkeys(("rtol", "atol"), ROUNDING[x.dtype])
    y, found = run(*inputs(x, SAMPLES, what))
    dx = found.pop("x", None)
    for i in range(0, SAMPLES, CHECKED):
        alone, gradients = run(x[i : i + 1], [f"a{i}"])
        torch.testing.assert_close(y.view(SAMPLES, *alone.shape[1:])[i], alone[0], **allowed)
        if dx is not None:
            torch.testing.assert_close(dx.reshape(x.shape)[i], gradients.pop("x")[0], **allowed)
        for name, gradient in gradients.items():
            size = gradient.abs().max()
            torch.testing.assert_close(found.pop(name) / size, gradient / size, **allowed)


def one(name: str, what: str) -> tuple[str, str, int]:
    """The case that others are compared with: all samples of one adapter, each in a row of the
    batch, for which the layer runs as with one active adapter."""
    return name, FORWARD if what == FORWARD else TRAINING, 1


def measure(options: argparse.Namespace, device: torch.device) -> list[dict]:
    """Rows, one a method, kind and number of adapters; within a round all of them take turns."""
    x = torch.randn(SAMPLES, options.tokens, options.K, device=device).to(dtype(options))
    models, cases = {}, []
    for name, config in methods(options.rank).items():
        models[name] = build(config, options, device)
        for what in (FORWARD, TRAINING, BY_TOKEN) if trains(config) else (FORWARD,):
            check(models[name].train(what != FORWARD), x, what)
            cases += [(name, what, count) for count in COUNTS]
    order, times = list(cases), {case: [] for case in cases}
    clock = OwnClock(device)
    for i in track(range(WARM_UP + options.rounds), console=Console(stderr=True)):
        for name, what, count in order:
            model = models[name].train(what != FORWARD)
            given = inputs(x.detach(), count, what)
            start = clock.mark()
            step(model, *given, what)
            ms = clock.between(start, clock.mark())
            model.zero_grad()
            if i >= WARM_UP:
                times[name, what, count].append(ms)
        order.append(order.pop(0))
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
        | dict(method=name, what=what, adapters=count)
        | summary(times[name, what, count])
        | dict(
            ratio=statistics.median(
                a / b for a, b in zip(times[name, what, count], times[one(name, what)], strict=True)
            )
        )
        for name, what, count in cases
    ]


def table(rows: list[dict], about: dict) -> Table:
    first = rows[0]
    shown = Table(
        title=f"{SAMPLES} x {first['tokens']} tokens, N, K = {first['N']}, "
        f"{first['K']}, r = {first['r']}, {first['dtype']}; "
        f"{about.get('gpu', about['processor'])}, {about['date']}"
    )
    for column in (
        "method",
        "",
        "adapters in the batch",
        "median ms",
        "quartiles",
        "÷ one adapter",
    ):
        shown.add_column(column)
    for row in rows:
        shown.add_row(
            row["method"],
            row["what"],
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

    kinds = list(dict.fromkeys(row["what"] for row in rows))
    figure, panels = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 4), sharey=True)
    for panel, what in zip(panels, kinds, strict=True):
        for name in dict.fromkeys(row["method"] for row in rows if row["what"] == what):
            own = [row for row in rows if (row["method"], row["what"]) == (name, what)]
            panel.plot(
                [row["adapters"] for row in own],
                [row["ratio"] for row in own],
                marker="o",
                label=name,
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(COUNTS, map(str, COUNTS))
        panel.set(xlabel=f"adapters among {SAMPLES} samples", title=what)
        panel.set_ylim(bottom=0)
        panel.legend()
    panels[0].set_ylabel("time ÷ one adapter's batch")
    figure.suptitle(about.get("gpu", about["processor"]))
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
