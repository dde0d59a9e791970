"""What ``calibrate`` costs: seconds beside a plain pass of the same text, and memory.

    python benchmarks/calibration/run.py           # SmolLM2 on a CPU: 15 minutes
    python benchmarks/calibration/run.py --quick   # a tiny model, seconds
    python benchmarks/calibration/run.py --llama-8b   # that size, random weights; on a GPU

Every linear layer of every block is calibrated. The plain pass runs the same batches through the
same model, forwards and backwards, and measures nothing. The memory is computed from the layers'
sizes, for the model that is run and for Llama-3.1-8B: what the sums, the roots of the moments and
the random matrices take at once, beside the model and its activations. On a GPU the peak beyond
what was there before is measured too, activations included.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "layer"))
import machine  # noqa: E402

from secura_kernels import calibrate  # noqa: E402
from secura_kernels.peft import SecuraConfig  # noqa: E402
from secura_kernels.train.calibration.natural import OVERSAMPLING  # noqa: E402

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FORMS = (
    ("whitened", None),
    ("whitened, quiet", None),
    ("natural", 0),
    ("natural", 64),
    ("natural", 256),
    ("natural, gated", 256),
)
R = 64
GIB = 2**30
# N, K of the seven layers of a block, and the number of blocks.
LLAMA_8B = (
    (
        (4096, 4096),
        (1024, 4096),
        (1024, 4096),
        (4096, 4096),
        (14336, 4096),
        (14336, 4096),
        (4096, 14336),
    ),
    32,
)


def bytes_of(basis: str, rank: int | None, shapes: list[tuple[int, int]], r: int = R) -> int:
    """The most that is held at once, of layers of these N, K."""
    if basis.startswith("whitened"):
        return sum(2 * 8 * r * r for _ in shapes)
    sums = roots = sketches = 0
    tests = {}
    for N, K in shapes:
        for size, side in ((K, 0), (N, 1)):
            kept = min(rank, size)
            sums += 4 * size * (kept + 2)
            roots += 4 * size * kept + 8 * size
            tests[size, side] = 4 * size * kept
        q = min(r + OVERSAMPLING, N, K)
        # The two factors of the range finder, in float64, and a pass's factor and product.
        sketches += q * (8 * (N + K) + 4 * (N + K))
    return sums + sum(tests.values()) + roots + sketches


def adapted(base: nn.Module, basis: str, r: int) -> nn.Module:
    from peft import get_peft_model

    config = SecuraConfig(
        variant="curlora", r=r, basis=basis.split(",")[0], target_modules=list(TARGETS)
    )
    return get_peft_model(copy.deepcopy(base), config)


def plain(model: nn.Module, batches: list[dict]) -> None:
    """Forwards and backwards, the inputs' gradient included."""
    from secura_kernels.train.calibration.measuring import own_loss

    loss = own_loss(model, 0, next(model.parameters()).device)
    embedded = model.get_input_embeddings().register_forward_hook(
        lambda _, args, y: y.requires_grad_()
    )
    for batch in batches:
        loss(batch, None).backward()
    embedded.remove()


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rows(
    base: nn.Module, general: list[dict], task: list[dict], r: int, forms: tuple
) -> list[dict]:
    base = base.requires_grad_(False).eval()
    shapes = [
        (m.out_features, m.in_features)
        for name, m in base.named_modules()
        if name.endswith(TARGETS)
    ]
    found = []
    gpu = torch.cuda.is_available()
    for basis, rank in forms:
        model = adapted(base, basis, r)
        settings = {} if rank is None else dict(rank=rank)
        if basis.endswith("quiet"):
            settings["selection"] = "quiet"
        if basis.endswith("gated"):
            settings["gated"] = True
        batches = task if rank is not None else None
        if gpu:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        both = (
            seconds(lambda: plain(base, general)),
            seconds(
                lambda model=model, batches=batches, settings=settings: calibrate(
                    model, general, batches, progress=False, **settings
                )
            ),
        )
        found.append(
            dict(
                basis=basis,
                rank=rank,
                plain_s=both[0],
                calibrate_s=both[1],
                peak_MiB=(torch.cuda.max_memory_allocated() - before) / 2**20 if gpu else None,
                MiB=bytes_of(basis, rank, shapes, r) / 2**20,
                GiB_8b=bytes_of(basis, rank, LLAMA_8B[0] * LLAMA_8B[1]) / GIB,
            )
        )
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
        del model
    return found


def table(found: list[dict], tokens: int, task_tokens: int, r: int) -> str:
    lines = [
        f"{tokens} general tokens, {task_tokens} of the task twice, and once more for a gate; "
        f"r = {r}",
        "",
        "| basis | rank of the moments | seconds | times a plain pass of the general tokens | "
        "memory | of Llama-3.1-8B, r = 64 (computed) | measured peak |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['basis']} | {'' if row['rank'] is None else row['rank']} | "
        f"{row['calibrate_s']:.0f} | {row['calibrate_s'] / row['plain_s']:.2f} | "
        f"{row['MiB']:.0f} MiB | {row['GiB_8b']:.2f} GiB | "
        + ("" if row["peak_MiB"] is None else f"{row['peak_MiB']:.0f} MiB")
        + " |"
        for row in found
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a tiny model with random weights")
    size.add_argument("--llama-8b", action="store_true", help="as large, random weights, bfloat16")
    parser.add_argument("--tokens", type=int, default=4096, help="general ones")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "calibration")
    options = parser.parse_args()
    if options.llama_8b and not torch.cuda.is_available():
        parser.error("--llama-8b needs an NVIDIA GPU, and none is here")
    base, r = (llama_8b(), R) if options.llama_8b else model_of(options.quick)
    vocabulary, device = base.config.vocab_size, next(base.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def batch(rows: int, length: int) -> torch.Tensor:
        return torch.randint(vocabulary, (rows, length), generator=generator).to(device)

    length = 32 if options.quick else 128
    count = -(-options.tokens // (8 * length))
    general = [dict(input_ids=batch(8, length)) for _ in range(count)]
    task = [dict(input_ids=ids, labels=ids) for ids in (batch(4, 64) for _ in range(8))]
    forms = [FORMS[i] for i in (0, 2, 4)] if options.llama_8b else FORMS
    found = rows(base, general, task, r, forms)
    text = table(found, count * 8 * length, 8 * 4 * 64, r)
    options.out.mkdir(parents=True, exist_ok=True)
    about = dict(machine=machine.describe(device), tokens=count * 8 * length, rows=found)
    (options.out / "calibration.json").write_text(json.dumps(about, indent=1) + "\n")
    (options.out / "calibration.md").write_text(text)
    print(text)
    return 0


def llama_8b() -> nn.Module:
    sys.path.insert(0, str(ROOT / "benchmarks" / "step"))
    import run

    return run.base_model("8b", torch.device("cuda"), torch.bfloat16)


def model_of(quick: bool) -> tuple[nn.Module, int]:
    """The model, and the rank of its adapters."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if quick:
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        return LlamaForCausalLM(config).to(device), 16
    from secura_kernels.finetune.smollm2 import smollm2_folder

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    return model.to(device), R


if __name__ == "__main__":
    sys.exit(main())
