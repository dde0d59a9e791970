"""Layers that share an input, fused (``fuse_projections``) against one by one: q, k, v.

    python benchmarks/projections/run.py            # some minutes on a CPU, one on a GPU
    python benchmarks/projections/run.py --quick    # seconds: does it run

Forward and backward of the group, the input's gradient included; both forms take turns in one
process of one thread, and ratios are medians of rounds. Outputs and gradients of both are compared
with float64 before anything is timed.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from secura_kernels import CURLoRALinear, SECURALinear, fuse_projections

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "layer"))
import machine  # noqa: E402

NAMES = ("q_proj", "k_proj", "v_proj")
# K, N of each.
SHAPES = {
    "q, k, v of SmolLM2-135M": (576, (576, 192, 192)),
    "q, k, v, 1536 wide": (1536, (1536, 256, 256)),
}
# On a GPU: layers large enough that the products, not the host, take the time.
SHAPES_OF_GPU = {
    "q, k, v of Llama-3.1-8B": (4096, (4096, 1024, 1024)),
    "q, k, v of Llama-3.2-1B": (2048, (2048, 512, 512)),
}
METHODS = {
    "CURLoRA": (CURLoRALinear, {}),
    "SECURA": (SECURALinear, {}),
    "SECURA, gate": (SECURALinear, dict(norm="calibrated")),
}
WARM_UP = 3
MODES = ("forward", "backward", "both")


class Projections(nn.Module):
    def __init__(self, K: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        for name, N in zip(NAMES, sizes, strict=True):
            setattr(self, name, nn.Linear(K, N, bias=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [getattr(self, name)(x) for name in NAMES]


def adapted(shape: tuple, method: str, r: int, device: torch.device, dtype: torch.dtype):
    """The group one by one, its cores not zero."""
    kind, settings = METHODS[method]
    torch.manual_seed(0)
    model = Projections(*shape).to(device, dtype)
    for name in NAMES:
        setattr(model, name, kind.from_linear(getattr(model, name), r, **settings))
        with torch.no_grad():
            getattr(model, name).core_parameter().normal_(std=0.02)
    return model


def step(model: nn.Module, x: Tensor, dy: list[Tensor]) -> tuple[list[float], list[Tensor]]:
    """Seconds of the forward and of the backward pass; outputs and gradients."""
    x = x.detach().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    start = clock(x.device)
    y = model(x)
    middle = clock(x.device)
    gradients = torch.autograd.grad(y, [x, *trained], dy)
    end = clock(x.device)
    return [middle - start, end - middle, end - start], [t.detach() for t in (*y, *gradients)]


def clock(device: torch.device) -> float:
    """On a CPU the process's own time, which others on the machine disturb less."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def largest_error(found: list[Tensor], truth: list[Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))


def measure(
    name: str, method: str, options: argparse.Namespace, device: torch.device
) -> list[dict]:
    dtype = getattr(torch, options.dtype)
    shape = (SHAPES | SHAPES_OF_GPU)[name]
    separate = adapted(shape, method, options.r, device, dtype)
    fused = copy.deepcopy(separate)
    fuse_projections(fused)
    x = torch.randn(options.tokens, shape[0], device=device).to(dtype)
    dy = [torch.randn(options.tokens, N, device=device).to(dtype) for N in shape[1]]
    truth = step(copy.deepcopy(separate).double(), x.double(), [g.double() for g in dy])[1]
    models = {"separate": separate, "fused": fused}
    off = {form: largest_error(step(model, x, dy)[1], truth) for form, model in models.items()}
    if off["fused"] > 1.5 * off["separate"] + 1e-6:
        raise RuntimeError(f"{method}, {name}: errors against float64 are {off}")
    seconds = {form: [] for form in models}
    for i in range(WARM_UP + options.rounds):
        for form in models if i % 2 else reversed(models):
            taken = step(models[form], x, dy)[0]
            if i >= WARM_UP:
                seconds[form].append(taken)
    rows = []
    for i, mode in enumerate(MODES):
        before, after = ([taken[i] for taken in seconds[form]] for form in ("separate", "fused"))
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            dict(
                group=name,
                method=method,
                mode=mode,
                separate_ms=1e3 * statistics.median(before),
                fused_ms=1e3 * statistics.median(after),
                ratio=middle,
                low=low,
                high=high,
                errors=off,
            )
        )
    return rows


def table(about: dict, rows: list[dict]) -> str:
    lines = [
        f"{about['processor']}, {about['threads']} thread(s), torch {about['torch']}, "
        f"{about['date']}, {about['commit']}; {about['dtype']}, {about['tokens']} tokens, "
        f"r = {about['r']}; medians of {about['rounds']} rounds, of the ratio with its quartiles",
        "",
        "| group | method | pass | separate, ms | fused, ms | fused / separate |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['group']} | {row['method']} | {row['mode']} | {row['separate_ms']:.2f} | "
        f"{row['fused_ms']:.2f} | {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}) |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--tokens", type=int, default=4096 if gpu else 256)
    parser.add_argument("--r", type=int, default=64 if gpu else 16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtype", default=None, help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="folder of projections.json and .md")
    options = parser.parse_args()
    device = torch.device("cuda" if gpu else "cpu")
    options.dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    shapes = list(SHAPES_OF_GPU if gpu else SHAPES)
    if options.quick:
        shapes, options.rounds, options.tokens = shapes[:2], 3, 32
    torch.set_num_threads(1)
    rows = []
    for name in shapes:
        for method in METHODS:
            rows += measure(name, method, options, device)
            print(table(about(options, device), rows[-len(MODES) :]).splitlines()[-1], flush=True)
    folder = options.out or ROOT / "build" / "projections"
    folder.mkdir(parents=True, exist_ok=True)
    found = about(options, device)
    (folder / "projections.json").write_text(json.dumps(found | dict(rows=rows), indent=1) + "\n")
    (folder / "projections.md").write_text(table(found, rows))
    print(table(found, rows))


def about(options: argparse.Namespace, device: torch.device) -> dict:
    settings = {name: getattr(options, name) for name in ("tokens", "r", "rounds", "dtype")}
    return machine.describe(device) | settings


if __name__ == "__main__":
    main()
