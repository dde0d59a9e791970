r"""What the host does for a layer: microseconds before and between launches, and how many launches.

    python benchmarks/host/run.py     # anywhere, a minute

Triton compiles for a chip that is not here, and its driver launches nothing (``nothing.py``); the
matrices are tiny, so that what is left is Python, autograd, allocation and launching. Below it the
same for the plain PyTorch path. In float32, whose small products cost a CPU least. Rivals take
turns in one process; ratios are medians of rounds.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from nothing import launching_nothing
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from secura_kernels import CURLoRALinear, SECURALinear

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "layer"))
import machine  # noqa: E402
from rivals import put_natural_basis  # noqa: E402

RIVAL = "LoRA (PEFT)"
N, K, R, M_INNER = 64, 80, 64, 72
WARM_UP = 50


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", type=int, default=90, help="compute capability, times ten")
    parser.add_argument("--rows", type=int, default=16, help="tokens")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "host", help="folder of host.json and .md"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    with launching_nothing(options.chip) as driver:
        found = {
            "triton": measure(layers("triton", torch.float32), options, lambda: driver.launches)
        }
    found["reference"] = measure(layers("reference", torch.float32), options, lambda: 0)
    options.out.mkdir(parents=True, exist_ok=True)
    about = dict(
        machine=machine.describe(torch.device("cpu")),
        chip=options.chip,
        shape=[options.rows, N, K, R],
    )
    (options.out / "host.json").write_text(json.dumps(about | found, indent=1) + "\n")
    (options.out / "host.md").write_text(table(found))
    print(table(found))


def layers(impl: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    def base() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(K, N, bias=False).to(dtype).requires_grad_(False)

    natural = CURLoRALinear.from_linear(base(), R, basis="natural", impl=impl)
    put_natural_basis(natural)
    lora = get_peft_model(nn.Sequential(base()), LoraConfig(r=R, target_modules=["0"]))
    return {
        "frozen": base(),
        RIVAL: lora.base_model.model[0],
        "CURLoRA": CURLoRALinear.from_linear(base(), R, impl=impl),
        "CURLoRA, natural": natural,
        "SECURA": SECURALinear.from_linear(base(), R, m=M_INNER, norm="calibrated", impl=impl),
    }


def measure(
    rivals: dict[str, nn.Module], options: argparse.Namespace, launches: Callable[[], int]
) -> list[dict]:
    """A row a rival and mode."""
    x = torch.randn(options.rows, K).to(rivals["frozen"].weight.dtype).requires_grad_()
    dy = torch.ones(options.rows, N, dtype=x.dtype)
    modes = {
        "forward, no gradients": (torch.no_grad, None),
        "forward + backward": (nullcontext, dy),
    }
    rows = []
    for mode, (context, gradient) in modes.items():
        times, counts, order = {name: [] for name in rivals}, {}, list(rivals)
        for _ in range(WARM_UP + options.rounds):
            for name in order:
                before = launches()
                with context():
                    start = time.perf_counter()
                    step(rivals[name], x, gradient)
                    times[name].append(1e6 * (time.perf_counter() - start))
                counts[name] = launches() - before
            order.append(order.pop(0))
        for name, us in times.items():
            ratios = [a / b for a, b in zip(us[WARM_UP:], times[RIVAL][WARM_UP:], strict=True)]
            rows.append(
                dict(
                    rival=name,
                    mode=mode,
                    us=statistics.median(us[WARM_UP:]),
                    ratio=statistics.median(ratios),
                    launches=counts[name],
                )
            )
    return rows


def step(layer: nn.Module, x: Tensor, dy: Tensor | None) -> None:
    y = layer(x)
    if dy is not None:
        y.backward(dy)


def table(found: dict[str, list[dict]]) -> str:
    lines = ["| path | layer | what | us | / LoRA | launches |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {path} | {row['rival']} | {row['mode']} | {row['us']:.0f} | {row['ratio']:.2f} | "
        f"{row['launches'] or ''} |"
        for path, rows in found.items()
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
