"""One fine-tuning step of a Llama with random weights: CURLoRA, SECURA, and PEFT's LoRA and DoRA.

    python benchmarks/step/run.py                        # on a GPU: 1b and 8b
    python benchmarks/step/run.py --model 1b --method SECURA "LoRA (PEFT)"

Every linear layer of every block is adapted, at one rank. Each method runs in a process of its own,
so that its peak memory is its own; forward, loss, backward and AdamW are timed, the first steps are
not. On a GPU the same step is timed once more as a CUDA graph, for which the host does nothing.
Random weights: speed and memory do not depend on them, and nothing is downloaded.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "layer"))

import machine
import results
from rivals import put_natural_basis

from secura_kernels.tools.replay import FAILURES, Recorder, first_line

# hidden, layers, heads, key-value heads, intermediate, vocabulary; batch, sequence.
MODELS = {
    "tiny": (64, 2, 4, 2, 128, 256, 2, 32),
    "1b": (2048, 16, 32, 8, 8192, 128256, 4, 1024),
    "8b": (4096, 32, 32, 8, 14336, 128256, 2, 1024),
}
FUSED = ", fused projections"
METHODS = (
    "CURLoRA",
    f"CURLoRA{FUSED}",
    "CURLoRA, natural",
    "CURLoRA, natural, gated",
    f"CURLoRA, natural, gated{FUSED}",
    "SECURA",
    "LoRA (PEFT)",
    "DoRA (PEFT)",
)
RANK = 64
WARM_UP = 3


def base_model(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A Llama of that size with random weights, on the device from the start."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, kv_heads, intermediate, vocabulary, _, sequence = MODELS[name]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        max_position_embeddings=sequence,
        use_cache=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def adapt(model: nn.Module, method: str, r: int) -> nn.Module:
    """The model with every linear layer of its blocks adapted, and nothing else trained."""
    if method.endswith("(PEFT)"):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=r,
            lora_alpha=r,
            target_modules="all-linear",
            use_dora=method.startswith("DoRA"),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)
    from secura_kernels import CURLoRALinear, SECURALinear, fuse_projections

    model.requires_grad_(False)
    kind = SECURALinear if method == "SECURA" else CURLoRALinear
    settings = {}
    if method == "SECURA":
        settings = dict(m=r + r // 3, selection="lowest", norm="calibrated")
    if ", natural" in method:
        settings = dict(basis="natural")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and not name.endswith("lm_head"):
            model.set_submodule(name, adapted := kind.from_linear(layer, r, **settings))
            if ", natural" in method:
                put_natural_basis(adapted, gated=", gated" in method)
    if method.endswith(FUSED):
        fuse_projections(model)
    return model


def measure(name: str, method: str, r: int, steps: int, device: torch.device) -> dict:
    """Time and memory of one method's steps."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = adapt(base_model(name, device, dtype), method, r).train()
    model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    *_, vocabulary, batch, sequence = MODELS[name]
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for i in range(WARM_UP + steps):
        tokens = torch.randint(vocabulary, (batch, sequence), device=device)
        _wait(device)
        start = time.perf_counter()
        loss = train_step(model, optimizer, tokens)
        _wait(device)
        if i >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    if not torch.isfinite(loss):
        raise RuntimeError(f"the loss of {method} is {loss.item()}")
    peak, last, graph = None, loss.item(), {}
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        del loss, optimizer
        graph = replayed(model, trained, tokens, vocabulary, steps)
    quartiles = statistics.quantiles(seconds, n=4)
    return dict(
        model=name,
        method=method,
        r=r,
        batch=batch,
        sequence=sequence,
        steps=steps,
        trained=sum(p.numel() for p in trained),
        median_s=statistics.median(seconds),
        low_s=quartiles[0],
        high_s=quartiles[2],
        tokens_per_s=batch * sequence / statistics.median(seconds),
        peak_bytes=peak,
        loss=last,
        **graph,
    )


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor
) -> torch.Tensor:
    """Returns the loss."""
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def replayed(
    model: nn.Module, trained: list[nn.Parameter], tokens: torch.Tensor, vocabulary: int, steps: int
) -> dict:
    """``graph_s``: median seconds of the whole step, replayed from a CUDA graph; or
    ``not_captured``: why there is none."""
    optimizer = torch.optim.AdamW(trained, lr=1e-4, capturable=True)
    seconds, losses = [], set()
    try:
        replay, loss = Recorder().capture(lambda: train_step(model, optimizer, tokens))
        for i in range(WARM_UP + steps):
            tokens.copy_(torch.randint_like(tokens, vocabulary))
            _wait(tokens.device)
            start = time.perf_counter()
            replay()
            _wait(tokens.device)
            losses.add(loss.item())
            if i >= WARM_UP:
                seconds.append(time.perf_counter() - start)
    except FAILURES as error:
        return dict(not_captured=first_line(error))
    if len(losses) < 2 or not all(map(math.isfinite, losses)):
        return dict(not_captured=f"the replay gave the losses {sorted(losses)}")
    return dict(graph_s=statistics.median(seconds))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def run(options: argparse.Namespace, device: torch.device) -> list[dict]:
    """Each model and method that the results do not hold yet, in a process of its own."""
    unfinished = options.out / f"{options.name}.unfinished.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    key = dict(commit=machine.commit(), steps=options.steps, r=options.rank)
    lines = unfinished.read_text().splitlines() if unfinished.exists() else []
    done = {
        (row["model"], row["method"]): row for row, about in map(json.loads, lines) if about == key
    }
    rows = []
    for name in options.model:
        for method in options.method:
            row = done.get((name, method))
            if row is None:
                print(f"{name}, {method} ...", file=sys.stderr, flush=True)
                words = [
                    "--one",
                    "--model",
                    name,
                    "--method",
                    method,
                    "--rank",
                    str(options.rank),
                    "--steps",
                    str(options.steps),
                    "--device",
                    str(device),
                ]
                finished = subprocess.run(
                    [sys.executable, __file__, *words], capture_output=True, text=True
                )
                if finished.returncode:
                    raise RuntimeError(f"{name}, {method} failed:\n{finished.stderr[-3000:]}")
                row = json.loads(finished.stdout.splitlines()[-1])
                with open(unfinished, "a") as file:
                    file.write(json.dumps([row, key]) + "\n")
            rows.append(row)
    results.write(options.out, options.name, rows, machine.describe(device))
    draw(options.out / f"{options.name}.png", rows)
    unfinished.unlink(missing_ok=True)
    return rows


def draw(file: Path, rows: list[dict]) -> None:
    """Tokens per second and, on a GPU, peak memory of each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [f"{row['model']}\n{row['method']}" for row in rows]
    figures = {"tokens/s": [row["tokens_per_s"] for row in rows]}
    if all(row["peak_bytes"] is not None for row in rows):
        figures["peak GB"] = [row["peak_bytes"] / 1e9 for row in rows]
    figure, panels = plt.subplots(
        1, len(figures), figsize=(1.2 * len(rows) * len(figures) + 2, 4), squeeze=False
    )
    for panel, (name, values) in zip(panels[0], figures.items(), strict=True):
        panel.bar(labels, values)
        panel.set_title(name)
        panel.tick_params(axis="x", labelsize=8)
    figure.suptitle("one fine-tuning step, random weights, all linear layers")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def print_table(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "model",
        "method",
        "trained",
        "tokens/s",
        "÷ LoRA's time",
        "step ms",
        "quartiles",
        "graph ms",
        "÷ LoRA's graph",
        "peak GB",
        title="one fine-tuning step, random weights, all linear layers",
    )
    lora = {row["model"]: row for row in rows if row["method"] == "LoRA (PEFT)"}

    def ratio(row: dict, field: str) -> str:
        """To LoRA's, where both were measured."""
        rival = lora.get(row["model"], {})
        return f"{row[field] / rival[field]:.3f}" if field in row and field in rival else ""

    for row in rows:
        table.add_row(
            row["model"],
            row["method"],
            f"{row['trained']:,}",
            f"{row['tokens_per_s']:,.0f}",
            ratio(row, "median_s"),
            f"{1e3 * row['median_s']:.1f}",
            f"{1e3 * row['low_s']:.1f}-{1e3 * row['high_s']:.1f}",
            f"{1e3 * row['graph_s']:.1f}" if "graph_s" in row else row.get("not_captured", ""),
            ratio(row, "graph_s"),
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
        )
    Console(width=120).print(table)


def main() -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", nargs="+", choices=list(MODELS), default=["1b", "8b"] if gpu else ["tiny"]
    )
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rank", type=int, default=RANK if gpu else 8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--out", type=Path, help="results folder")
    parser.add_argument("--name", default="step", help="name of the results' files")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 2 or options.rank < 1:
        parser.error("--steps takes a whole number above 1, --rank one above 0")
    device = torch.device(options.device)
    if options.one:
        print(
            json.dumps(
                measure(options.model[0], options.method[0], options.rank, options.steps, device)
            )
        )
        return 0
    if options.out is None:
        options.out = machine.ROOT / "benchmarks/results" / machine.chip(device)
    print_table(run(options, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
