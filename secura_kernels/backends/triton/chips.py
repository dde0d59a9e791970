"""The chips that tiles are shipped for, and which of them a device is."""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..host import processors_of_gpu

INTERPRETER = 0  # the "chip" of Triton's interpreter, which runs the kernels on the CPU


@dataclass(frozen=True)
class Chip:
    """What the tables and ``inspect`` need to know; the first GPU of the architecture's kind.

    ``shared_memory``: bytes one block may use. ``threads``: that a processor holds. Assumed
    sustained rates, for predictions: ``flops``, dense bfloat16 products; ``bandwidth``, bytes/s of
    a copy; ``special``, special functions/s (16 a cycle and processor).
    """

    name: str
    processors: int
    shared_memory: int
    threads: int
    tensor_core: str
    flops: float
    bandwidth: float
    special: float

    @property
    def issued(self) -> float:
        """Instructions/s, counted a lane: 128 a cycle and processor."""
        return 8 * self.special


CHIPS = {
    80: Chip("A100", 108, 163 * 1024, 2048, "HMMA", 250e12, 1.75e12, 108 * 16 * 1.41e9),
    89: Chip("RTX 4090, L40S", 142, 99 * 1024, 1536, "HMMA", 300e12, 0.8e12, 142 * 16 * 2.5e9),
    90: Chip("H100, H200", 132, 227 * 1024, 2048, "HGMMA", 790e12, 3.0e12, 132 * 16 * 1.755e9),
    100: Chip("B200", 148, 227 * 1024, 2048, "UTCHMMA", 1600e12, 6.5e12, 148 * 16 * 1.85e9),
    120: Chip("RTX 5090", 170, 99 * 1024, 1536, "HMMA", 220e12, 1.5e12, 170 * 16 * 2.4e9),
    # One pass wherever it can be, so that it is tested.
    INTERPRETER: Chip("interpreter", 4, 227 * 1024, 2048, "", 790e12, 3.0e12, float("inf")),
}
_LIKE = {86: 89, 87: 80, 103: 100, 121: 120}  # the row whose limits they keep

_pretended: int | None = None


@contextmanager
def pretend(chip: int) -> Iterator[None]:
    """Every device counts as ``chip``: for compiling without a GPU, and for tests."""
    global _pretended
    before, _pretended = _pretended, chip
    try:
        yield
    finally:
        _pretended = before


def pretended() -> int | None:
    return _pretended


def chip_of(device: torch.device) -> int | None:
    """The key of CHIPS for a device, the nearest lower one for a newer chip; None below 8.0."""
    if _pretended is not None:
        return _pretended
    return _chip_of_gpu(device) if device.type == "cuda" else INTERPRETER


@functools.cache
def _chip_of_gpu(device: torch.device) -> int | None:
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    capability = _LIKE.get(capability, capability)
    lower = [chip for chip in CHIPS if chip <= capability and chip != INTERPRETER]
    if lower and capability not in CHIPS:
        warnings.warn(
            f"the GPU has compute capability {major}.{minor}, for which no tiles are "
            f"shipped: those of {max(lower) / 10} are used",
            stacklevel=2,
        )
    return max(lower, default=None)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors."""
    return processors_of_gpu(device) if device.type == "cuda" else CHIPS[chip_of(device)].processors


def rank_block(r: int) -> int:
    """Ranks as a kernel holds them whole: a power of two, at least what a tensor core takes."""
    return max(16, 1 << (r - 1).bit_length())
