"""Where a study runs, and in what precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = ("bfloat16", "float32")
_products = [PRECISIONS[0]]


def set_precision(precision: str) -> None:
    """Of every product of a study, set before its subject is read."""
    _products[0] = precision


@contextmanager
def mixed_precision() -> Iterator[None]:
    """What every pass runs under, the base's as the tuned models': products in bfloat16, and what
    is trained in float32; or products in float32 too, which a CPU without instructions for bfloat16
    makes ten times faster. A decorator, or for a with statement."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=_products[0] == PRECISIONS[0]):
        yield


def on_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}
