"""What is measured beside the loss: predictions, memory, what backward needs, the machine."""

import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, batch_size: int) -> tuple[float, Tensor]:
    """What `model` says of `windows` (windows, seq_len), in evaluation mode.

    Returns exp of the mean next-token loss, and the likeliest next token at each place, int32.
    """
    was_training = model.training
    model.eval()
    total, likeliest = 0.0, []
    for batch in windows.split(batch_size):
        batch = batch.to(next(model.parameters()).device)
        out = model(input_ids=batch, labels=batch, use_cache=False)
        total += out.loss.item() * len(batch)
        likeliest.append(out.logits.argmax(-1).int().cpu())
    model.train(was_training)
    return math.exp(total / len(windows)), torch.cat(likeliest)


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count into {"bytes"} what autograd saves inside the block, each storage once.

    The model's own parameters and buffers are not counted: they are there anyway.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    own |= {tensor.untyped_storage().data_ptr() for tensor in model.buffers()}
    seen: set[int] = set()
    count = {"bytes": 0}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own | seen:
            seen.add(storage.data_ptr())  # an address stays taken: saved tensors stay alive
            count["bytes"] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


def reset_peak_memory(device: torch.device) -> bool:
    """Let the peak start here; False where the system cannot, and it counts from the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> int | None:
    """Bytes: allocated on the GPU, or resident for the CPU; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures were measured on."""
    found: dict[str, str | int] = {
        "system": platform.system(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_model() -> str:
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        rows = []
    named = (row.partition(":")[2].strip() for row in rows if row.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
