"""Where a study runs, and in what precision."""

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def mixed_precision() -> torch.autocast:
    """What every pass runs under, the base's as the tuned models': products in bfloat16, and what
    is trained in float32. A decorator, or for a with statement."""
    return torch.autocast(DEVICE, torch.bfloat16)


def on_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}
