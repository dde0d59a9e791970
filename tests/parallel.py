"""Models for the tests of distributed training, what one process computes with them, and the
processes themselves."""

import json
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

RANKS = 2
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
GATED = dict(norm="calibrated")
CURLORA = dict(variant="curlora", norm=None)


# Processes.


def run(checks: dict[str, Callable], folder: Path, seconds: float) -> dict[str, str | None]:
    """Runs checks ``(rank, folder)`` in one group of processes, one after another.

    Returns:
        each check's error, None where it passed on every rank. After an error the ranks may be out
        of step, so that the checks behind it are not run.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.spawn(_work, (port, checks, folder), RANKS, join=False)
    try:
        finished = context.join(seconds, grace_period=1)
    except Exception as error:
        return {name: f"a process ended: {error}" for name in checks}
    for process in context.processes:
        process.kill()
    found = {}
    for name in checks:
        errors = [_read(folder / f"{name}.{rank}") for rank in range(RANKS)]
        errors = [e for e in errors if e is not None]
        found[name] = "\n".join(errors) or None
        if not finished and any(e.startswith("no result") for e in errors):
            found[name] = f"{found[name]} within {seconds} s"
    return found


def _read(path: Path) -> str | None:
    if not path.exists():
        return "no result: an earlier check failed, or it hung"
    return json.loads(path.read_text())


def _work(rank: int, port: int, checks: dict[str, Callable], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= dict(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        OMP_NUM_THREADS="1",
    )  # else accelerate sets another number of threads
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            check(rank, folder)
            error = None
        except Exception:
            error = f"rank {rank}: {traceback.format_exc()}"
        (folder / f"{name}.{rank}").write_text(json.dumps(error))
        if error:
            break
    os._exit(0)  # destroying the group could wait for a rank that is stuck


# Models.


def llama(dtype: torch.dtype = torch.float64) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_bias=True,
        mlp_bias=True,
        use_cache=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


def with_peft(model: nn.Module, **settings) -> nn.Module:
    """A PEFT model, of SECURA with a gate by default, whose adapters have left their start."""
    from peft import get_peft_model

    from secura_kernels.peft import SecuraConfig

    settings = dict(variant="secura", r=4, target_modules=TARGETS) | GATED | settings
    return _moved(get_peft_model(model, SecuraConfig(**settings)))


def with_modules(model: nn.Module, **settings) -> nn.Module:
    from secura_kernels import SECURALinear

    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if name.endswith(("q_proj", "v_proj", "down_proj")):
            model.set_submodule(name, SECURALinear.from_linear(layer, r=4, **GATED | settings))
    return _moved(model)


def _moved(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(
                    parameter.shape, generator=generator, dtype=torch.float64
                ).to(parameter.dtype)
    return model


def fully_sharded(model: nn.Module, layers: nn.ModuleList, **settings) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in layers:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


# What they compute.


def tokens() -> Tensor:
    return torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(2))


def share(batch: Tensor, rank: int) -> Tensor:
    return batch.chunk(RANKS)[rank]


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the trained parameters, gathered, by their names in one process."""
    return {
        name.removeprefix("module."): full(p.grad)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To the rounding of float64."""
    assert found.keys() == expected.keys(), set(found) ^ set(expected)
    for name, value in expected.items():
        scale = value.abs().max()
        assert scale > 0, f"{name} says nothing: it is zero"
        error = float((found[name] - value).abs().max() / scale)
        assert error < 1e-12, f"{name}: {error:.1e}"
