"""The one place that every kernel launch passes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from triton import knobs

from .tiles import Tile

INTERPRETED = knobs.runtime.interpret  # the kernels run on the CPU, in Triton's interpreter
if INTERPRETED:
    from .interpreter import repair

    repair()


def launch(kernel, programs: int, tile: Tile, device: torch.device, **arguments) -> None:
    """Runs ``programs`` programs of ``kernel`` on the current stream of ``device``."""
    if programs == 0:
        return
    arguments |= dict(num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)
    if _instead is not None:
        _instead(kernel, programs, arguments)
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](**arguments)


_instead: Callable | None = None


@contextmanager
def instead_of_launching(function: Callable) -> Iterator[None]:
    """Hands each launch to ``function(kernel, programs, arguments)``: to compile it for a chip that
    is not here, or to count what it would do."""
    global _instead
    _instead = function
    try:
        yield
    finally:
        _instead = None


def dot_precision(dtype: torch.dtype) -> str:
    """How products of ``dtype`` multiply: TF32 in float32 only where PyTorch was asked for it."""
    if dtype != torch.float32:
        return "tf32"  # without effect on bfloat16 and float16 operands
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# Ranks that one float32 product takes at a time: as three TF32 products, more spill.
WIDE_STEP = 32


def wide_precision(dtype: torch.dtype) -> str:
    """How the float32 products with the core multiply: in a low-precision layer as three TF32
    products, exact to 2^-21, on tensor cores; in a float32 layer in float32."""
    return "ieee" if dtype == torch.float32 else "tf32x3"


LARGEST_STRIDE = 2**24


def addressable(matrix: Tensor) -> Tensor:
    """The matrix, or a copy where a stride is so long that an offset inside a tile would overflow
    32 bits (or is negative)."""
    if all(0 <= stride < LARGEST_STRIDE for stride in matrix.stride()):
        return matrix
    return matrix.contiguous()


def strides(matrix: Tensor) -> tuple[int, int]:
    return matrix.stride(0), matrix.stride(1)
