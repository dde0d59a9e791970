"""One fine-tuning step of a mixture of experts: CURLoRA, SECURA and PEFT's LoRA on the experts.

    python benchmarks/experts/run.py            # a minute or two on a CPU
    python benchmarks/experts/run.py --quick    # seconds: does it run

A Qwen3-MoE with random weights, whose ``gate_up_proj`` and ``down_proj`` are adapted
(``target_parameters``) and nothing else. Each method runs in a process of its own; forward, loss,
backward and AdamW are timed, the first steps are not. The first layer's experts with a change are
compared with merged ones in float64; what is off by more than rounding is not reported.
"""

import argparse
import copy
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "layer"))

import machine

# Experts, chosen ones, hidden, intermediate; layers, batch, sequence.
MODELS = {
    "quick": (8, 2, 32, 16, 1, 1, 16),
    "16 experts": (16, 4, 512, 256, 2, 2, 128),
    "64 experts": (64, 8, 512, 256, 2, 2, 128),
    "128 experts": (128, 8, 512, 256, 2, 2, 128),
}
METHODS = ("frozen", "CURLoRA", "CURLoRA, 4 r", "SECURA", "LoRA (PEFT)")
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
WARM_UP = 2
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of ||y||, in ``error``


def base_model(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts, chosen, hidden, intermediate, layers, _, sequence = MODELS[name]
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=max(8, hidden // 4),
        num_experts=experts,
        num_experts_per_tok=chosen,
        max_position_embeddings=sequence,
        use_cache=False,
    )
    config._experts_implementation = "grouped_mm"
    return Qwen3MoeForCausalLM(config).to(device, dtype)


def adapted(model: nn.Module, method: str, r: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    from secura_kernels.peft import SecuraConfig

    r = 4 * r if method.endswith("4 r") else r
    common = dict(r=r, target_modules=[], target_parameters=TARGETS)
    if method == "frozen":
        return model.requires_grad_(False)
    if method == "LoRA (PEFT)":
        return get_peft_model(model, LoraConfig(lora_alpha=r, **common))
    variant = "secura" if method == "SECURA" else "curlora"
    return get_peft_model(model, SecuraConfig(variant=variant, **common))


@torch.no_grad()
def error(model: nn.Module, method: str) -> float | None:
    """||y - y64|| / ||y64|| of the first layer's experts: y with an adapter in use, y64 of a copy
    in float64, merged (SECURA's biases, zero here, left out)."""
    if method == "frozen":
        return None
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith("adapter_bias"):
            noise = 0.02 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter))
    for module in model.modules():
        for adapter in getattr(module, "secura_adapter", {}).values():
            adapter.adapter_bias = None
    wide = copy.deepcopy(model).double()
    wide.merge_adapter()
    block, wide_block = (m.base_model.model.model.layers[0].mlp for m in (model, wide))
    device = next(model.parameters()).device
    x = torch.randn(64, model.config.hidden_size, generator=generator).to(device)
    E, k = model.config.num_experts, model.config.num_experts_per_tok
    chosen = torch.rand(64, E, generator=generator).topk(k).indices.to(device)
    weights = torch.full((64, k), 1 / k, device=device)
    plain = (
        wide_block.experts.get_base_layer()
        if method == "LoRA (PEFT)"
        else (wide_block.experts.base_layer)
    )
    plain.config = copy.copy(plain.config)
    plain.config._experts_implementation = "eager"
    dtype = next(p for p in block.parameters() if not p.requires_grad).dtype
    truth = plain(x.to(dtype).double(), chosen, weights.double())
    y = block.experts(x.to(dtype), chosen, weights.to(dtype)).double()
    return float((y - truth).norm() / truth.norm())


def measure(name: str, method: str, r: int, steps: int, device: torch.device) -> dict:
    torch.manual_seed(0)
    if device.type != "cuda":
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = adapted(base_model(name, device, dtype), method, r).train()
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, args, y: y.requires_grad_())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    *_, batch, sequence = MODELS[name]
    inputs = torch.randint(512, (batch, sequence), device=device)

    def step() -> torch.Tensor:
        loss = model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    kept = kept_bytes(model, lambda: model(input_ids=inputs, labels=inputs).loss)
    before = peak(device, reset=True)
    seconds = []
    for i in range(WARM_UP + steps):
        start = clock(device)
        loss = step()
        if i >= WARM_UP:
            seconds.append(clock(device) - start)
    if not torch.isfinite(loss):
        raise RuntimeError(f"the loss of {method} is {loss.item()}")
    above = peak(device) - before
    token = one_token(model, device)
    off = error(model, method)
    if off is not None and off > ALLOWED[dtype]:
        raise RuntimeError(f"{method} is off from float64 by {off:.1e}")
    low, median, high = statistics.quantiles(seconds, n=4)
    return dict(
        model=name,
        method=method,
        r=r,
        trained=sum(p.numel() for p in trained),
        median_s=median,
        low_s=low,
        high_s=high,
        token_s=token,
        kept_bytes=kept,
        peak_bytes=above,
        error=off,
    )


def clock(device: torch.device) -> float:
    """Of a GPU wall-clock time; of a CPU that of one thread, without what others take of it."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def one_token(model: nn.Module, device: torch.device) -> float:
    """Median seconds of a forward pass of one token, without gradients."""
    seconds, inputs = [], torch.ones(1, 1, dtype=torch.long, device=device)
    model.eval()
    for _ in range(32):
        start = clock(device)
        model(input_ids=inputs)
        seconds.append(clock(device) - start)
    return statistics.median(seconds[2:])


def kept_bytes(model: nn.Module, forward) -> int:
    """What a forward pass keeps for the backward pass, beside the model's own tensors: whole
    storages, each once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    total = sum(found.values())  # while the graph lives: no address is used twice
    del loss
    return total


def peak(device: torch.device, reset: bool = False) -> int:
    """The most memory since the last ``reset``, which returns what is in use: of the GPU's
    allocator, or of the process (Linux)."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() if reset else torch.cuda.max_memory_allocated()
    if reset:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def table(rows: list[dict]) -> str:
    lines = [
        f"One step, r = {rows[0]['r']}, the experts' two weights adapted:",
        "",
        "| model | method | trained | step ms | quartiles | / frozen | kept for backward, MB | "
        "peak above start, MB | one token, ms | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    frozen = {row["model"]: row["median_s"] for row in rows if row["method"] == "frozen"}
    for row in rows:
        ratio = row["median_s"] / frozen[row["model"]] if row["model"] in frozen else None
        lines.append(
            f"| {row['model']} | {row['method']} | {row['trained']:,} | "
            f"{1e3 * row['median_s']:.0f} | {1e3 * row['low_s']:.0f}-{1e3 * row['high_s']:.0f} | "
            f"{'' if ratio is None else f'{ratio:.2f}'} | {row['kept_bytes'] / 1e6:.0f} | "
            f"{row['peak_bytes'] / 1e6:.0f} | {1e3 * row['token_s']:.1f} | "
            f"{'' if row['error'] is None else format(row['error'], '.0e')} |"
        )
    return "\n".join(lines) + "\n"


def in_own_process(name: str, method: str, options: argparse.Namespace) -> dict:
    print(f"{name}, {method} ...", file=sys.stderr, flush=True)
    words = ["--one", name, method, "--rank", str(options.rank), "--steps", str(options.steps)]
    done = subprocess.run(
        [sys.executable, __file__, *words, "--device", options.device],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{name}, {method} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="results folder")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 2 or options.rank < 1:
        parser.error("--steps takes a whole number above 1, --rank one above 0")
    device = torch.device(options.device)
    if options.one:
        print(json.dumps(measure(*options.one, options.rank, options.steps, device)))
        return 0
    names = ["quick"] if options.quick else [name for name in MODELS if name != "quick"]
    rows = [in_own_process(name, method, options) for name in names for method in METHODS]
    folder = options.out or machine.ROOT / "benchmarks/results" / machine.chip(device)
    folder.mkdir(parents=True, exist_ok=True)
    about = dict(machine=machine.describe(device), rows=rows)
    (folder / "experts.json").write_text(json.dumps(about, indent=1) + "\n")
    (folder / "experts.md").write_text(table(rows))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
