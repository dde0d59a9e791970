"""The layers on the CPU beside their rivals: one process, interleaved, medians.

    python benchmarks/layer/cpu.py [--tokens 512] [--features 1536] [--rounds 40] [--json FILE]

Every rival runs the same step: forward, then the gradients of x and of what it trains. Those that
compute the same thing are checked to agree before anything is timed. "frozen" is the floor: an
``nn.Linear`` that trains nothing, its forward and its input gradient. "dense" materialises delta_W
at every step and lets autograd keep it, as both published codes do.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from secura_kernels import CURLoRALinear, SECURALinear, SMagNorm, reference


class DenseLinear(nn.Module):
    """The published form: the update as a dense (N, K) matrix, formed and multiplied every step."""

    def __init__(self, layer: CURLoRALinear | SECURALinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer, W = self.layer, self.layer.weight
        C, R = W[:, layer.cols], W[layer.rows, :]
        delta = F.linear(x, reference.delta_weight(layer.core(), C, R, layer.alpha))
        base = F.linear(x, W, layer.bias)
        if layer.norm is None:
            return base + delta
        return reference.smagnorm(base, reference.eager.add(delta, layer.adapter_bias), layer.norm)


def rivals(linear: nn.Linear, r: int) -> dict[str, nn.Module]:
    """Every rival on a copy of the same frozen layer, its update not zero."""
    generator = torch.Generator().manual_seed(0)

    def ours(kind, **settings):
        layer = kind.from_linear(copy.deepcopy(linear), r, selection="inverted", replace=False,
                                 generator=generator.manual_seed(0), **settings)
        with torch.no_grad():
            layer.core_parameter().normal_(std=0.02, generator=generator.manual_seed(1))
        return layer

    m = r + r // 3
    calibrated = ours(SECURALinear, m=m, adapter_bias=False)
    weight = ours(SECURALinear, m=m, adapter_bias=False, norm=SMagNorm(domain="weight"))
    curlora = ours(CURLoRALinear)
    found = {
        "frozen": copy.deepcopy(linear).requires_grad_(False),
        "CURLoRA": curlora,
        "CURLoRA, dense": DenseLinear(curlora),
        "SECURA": calibrated,
        "SECURA, dense": DenseLinear(calibrated),
        "SECURA, weight domain": weight,
    }
    return found | peft_rivals(linear, r)


def peft_rivals(linear: nn.Linear, r: int) -> dict[str, nn.Module]:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        print("PEFT is not installed: LoRA and DoRA are left out (pip install peft)")
        return {}
    found = {}
    for name, dora in (("LoRA (PEFT)", False), ("DoRA (PEFT)", True)):
        config = LoraConfig(r=r, lora_alpha=r, target_modules=["0"], use_dora=dora)
        model = get_peft_model(nn.Sequential(copy.deepcopy(linear)), config)
        layer = model.base_model.model[0]
        nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
        found[name] = layer
    return found


def check_agreement(found: dict[str, nn.Module], x: Tensor) -> None:
    """The dense forms compute what ours do: outputs and input gradients agree."""
    for name in ("CURLoRA", "SECURA"):
        results = [step(found[n], x, torch.ones_like) for n in (name, f"{name}, dense")]
        for mine, dense in zip(*results, strict=True):
            torch.testing.assert_close(mine, dense, rtol=1e-3, atol=1e-3)


def step(layer: nn.Module, x: Tensor, gradient: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Forward and backward of one layer: y and dx; parameters' gradients are formed and dropped."""
    x = x.detach().requires_grad_()
    y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return y, torch.autograd.grad(y, [x, *trained], gradient(y))[0]


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x.detach().requires_grad_())
    return sum(kept.values())


def measure(M: int, K: int, N: int, r: int, rounds: int) -> list[dict]:
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=False)
    x, dy = torch.randn(M, K), torch.randn(M, N)
    found = rivals(linear, r)
    check_agreement(found, x)
    times: dict[str, list[float]] = {name: [] for name in found}
    for warm_up in [True] * 3 + [False] * rounds if rounds < 2 else track(
            [True] * 3 + [False] * rounds, description=f"M, N, K = {M}, {N}, {K}; r = {r}"):
        for name, layer in found.items():
            start = time.perf_counter()
            step(layer, x, lambda _: dy)
            if not warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    floor = statistics.median(times["frozen"])
    return [dict(M=M, N=N, K=K, r=r, rival=name, median_ms=statistics.median(ms),
                 quartiles_ms=statistics.quantiles(ms, n=4)[::2] if len(ms) > 1 else ms * 2,
                 ratio=statistics.median(ms) / floor, saved_bytes=saved_bytes(found[name], x))
            for name, ms in times.items()]


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="M")
    parser.add_argument("--features", type=int, default=1536, help="N = K")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 150])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    rows = [row for r in options.ranks for row in
            measure(options.tokens, options.features, options.features, r, options.rounds)]
    machine = dict(processor=processor(), threads=torch.get_num_threads(),
                   torch=torch.__version__, date=time.strftime("%Y-%m-%d"))
    table = Table("r", "layer", "median ms", "quartiles", "÷ frozen", "saved MB",
                  title=f"forward + backward, float32, M = {options.tokens}, "
                        f"N = K = {options.features}; {machine['processor']}, "
                        f"{machine['threads']} threads, torch {machine['torch']}")
    for row in rows:
        low, high = row["quartiles_ms"]
        table.add_row(str(row["r"]), row["rival"], f"{row['median_ms']:.2f}",
                      f"{low:.2f}-{high:.2f}", f"{row['ratio']:.3f}",
                      f"{row['saved_bytes'] / 1e6:.2f}")
    Console(width=100).print(table)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(dict(machine=machine, rows=rows), file, indent=1)


if __name__ == "__main__":
    main()
