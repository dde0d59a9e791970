"""The one place that every kernel launch passes."""

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles import Tile

INTERPRETED = knobs.runtime.interpret  # the kernels run on the CPU, in Triton's interpreter
if INTERPRETED:
    from .interpreter import repair

    repair()


def launch(kernel, programs: int, tile: Tile, device: torch.device, **arguments) -> None:
    """Runs ``programs`` programs of ``kernel`` on the current stream of ``device``."""
    if programs == 0:
        return
    if _instead is not None:
        _instead(kernel, programs, arguments | _options(tile))
    elif INTERPRETED:
        kernel[(programs,)](**arguments, **_options(tile))
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, programs, tile, arguments)
    else:
        _launch(kernel, programs, tile, arguments)


def _options(tile: Tile) -> dict:
    return dict(num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)


# What Triton compiled, by everything that it compiles for and more: the arguments' types (1 equals
# 1.0) and values, of tensors their dtypes and alignment; not the values that it is told to leave
# alone, such as M, so that batches of any length find the same. Triton's own ``run`` binds,
# specialises and looks up anew in every call (benchmarks/host).
_compiled: dict[tuple, object] = {}
MOST_COMPILED = 2**14  # beyond that many sets of values all are asked for anew


def _launch(kernel, programs: int, tile: Tile, arguments: dict) -> None:
    active = driver.active
    device = active.get_current_device()
    names, special = _arguments_of(kernel)
    values = names(arguments)
    key = (id(kernel), device, tile.warps, tile.stages, *map(type, values),
           *[v if type(v) in _NUMBERS else _seen(v) for v in special(arguments)])
    compiled, profiler = _compiled.get(key), knobs.runtime.launch_enter_hook
    if compiled is None or getattr(profiler, "calls", profiler):
        if len(_compiled) >= MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = kernel[(programs,)](**arguments, **_options(tile))
        return
    compiled.run(programs, 1, 1, active.get_current_stream(device), compiled.function,
                 compiled.packed_metadata, None, None, None, *values)


@functools.cache
def _arguments_of(kernel) -> tuple[Callable[[dict], tuple], Callable[[dict], tuple]]:
    """What reads all values of a kernel's arguments from a dict, and those that it is compiled
    for."""
    special = [name for name in kernel.arg_names if name not in (kernel.do_not_specialize or ())]
    return operator.itemgetter(*kernel.arg_names), operator.itemgetter(*special)


_NUMBERS = frozenset((int, float, bool, str, type(None)))


def _seen(operand: Tensor | TensorDescriptor) -> tuple:
    """What of an operand decides which code Triton runs."""
    if isinstance(operand, Tensor):
        return operand.dtype, operand.data_ptr() & 15 == 0
    return operand.base.dtype, *operand.block_shape


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
    if min(matrix.stride()) >= 0 and max(matrix.stride()) < LARGEST_STRIDE:
        return matrix
    return matrix.contiguous()


def strides(matrix: Tensor) -> tuple[int, int]:
    return matrix.stride(0), matrix.stride(1)
