"""The one place that every kernel launch passes."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import programs
from . import chips, tiles, tune_cache
from .tiles import Tile

INTERPRETED = knobs.runtime.interpret  # the kernels run on the CPU, in Triton's interpreter
if INTERPRETED:
    from .interpreter import repair

    repair()


class Launch(NamedTuple):
    """What a pass asks for: ``programs`` programs of its kernel, with these arguments."""

    programs: int
    tile: Tile
    arguments: dict


class _Prepared(NamedTuple):
    """A launch of which only the tensors are to be filled in: ``values``, all arguments in the
    kernel's order; ``places``, where in them each tensor goes, by its number among the operands,
    and the descriptor that it goes into, if any."""

    programs: int
    compiled: object
    values: list
    places: list[tuple[int, int, TensorDescriptor | None]]

    def launch(self, tensors: list[Tensor]) -> None:
        values, compiled = self.values.copy(), self.compiled
        for place, number, descriptor in self.places:
            values[place] = _filled(descriptor, tensors[number])
        active = driver.active
        compiled.run(
            self.programs,
            1,
            1,
            active.get_current_stream(active.get_current_device()),
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *values,
        )


MOST_PREPARED = 2**12  # of a pass; beyond that many all are prepared anew


def launched(kernel):
    """Makes of a function that returns a ``Launch`` of ``kernel`` one that launches it.

    Working out some thirty arguments, and Triton's own look-up, take several times as long as the
    launch itself. They follow from the operands' shapes, strides, dtypes and alignment, and from
    the settings. So a launch is prepared once for each set of these, and later calls put their own
    tensors in its places (benchmarks/host).

    Operands are tensors, None, hashable settings, and tuples of them. Every tensor among the
    arguments must be an operand, and the other arguments may depend on nothing else.
    """

    def decorate(describe: Callable[..., Launch]) -> Callable[..., None]:
        prepared: dict[tuple, _Prepared] = {}
        tune_cache.remember(prepared.clear)

        @functools.wraps(describe)
        def run(*operands, **named) -> None:
            if _once_only():
                return _launch_slowly(kernel, describe(*operands, **named))
            tensors, key = _read((*operands, *named.values()))
            device = tensors[0].device
            if device.type == "cuda" and device.index != torch.cuda.current_device():
                with torch.cuda.device(device):
                    return run(*operands, **named)
            key = (*key, *named, device, chips.pretended())
            found = prepared.get(key)
            if found is None or _profiled():
                if len(prepared) >= MOST_PREPARED:
                    prepared.clear()
                found = prepared[key] = _prepare(kernel, describe(*operands, **named), tensors)
            elif found.programs:
                found.launch(tensors)
            if found.programs:
                programs.note(found.launch, tensors)

        return run

    return decorate


def _once_only() -> bool:
    """Whether launches are not to be prepared for later ones."""
    return _instead is not None or INTERPRETED or tiles.is_forced()


def _profiled() -> bool:
    """Whether Triton calls a profiler, for launches that pass through it."""
    hook = knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


def _read(operands: tuple) -> tuple[list[Tensor], list]:
    """The tensors among operands, and all that a launch may depend on."""
    flat = []
    for operand in operands:
        if isinstance(operand, tuple):
            flat += operand
        else:
            flat.append(operand)
    tensors, key = programs.signature(flat)
    if tensors[0].dtype == torch.float32:
        key.append(dot_precision(torch.float32))
    return tensors, key


def _prepare(kernel, launch: Launch, tensors: list[Tensor]) -> _Prepared:
    """Launches, and returns how to launch again."""
    compiled = _launch_slowly(kernel, launch)
    numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
    values, places = [launch.arguments[name] for name in kernel.arg_names], []
    for place, value in enumerate(values):
        descriptor = copy(value) if isinstance(value, TensorDescriptor) else None
        tensor = value if descriptor is None else value.base
        if isinstance(tensor, Tensor):
            places.append((place, numbers[id(tensor)], descriptor))
            values[place] = None  # not to be kept alive
            if descriptor is not None:
                descriptor.base = None
    return _Prepared(launch.programs, compiled, values, places)


def _filled(descriptor: TensorDescriptor | None, tensor: Tensor) -> Tensor | TensorDescriptor:
    if descriptor is None:
        return tensor
    filled = object.__new__(TensorDescriptor)  # checked once, when it was prepared
    filled.__dict__.update(descriptor.__dict__)
    filled.base = tensor
    return filled


def _launch_slowly(kernel, launch: Launch):
    programs, tile, arguments = launch
    options = dict(num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)
    if programs == 0:
        return None
    if _instead is not None:
        return _instead(kernel, programs, arguments | options)
    return kernel[(programs,)](**arguments, **options)


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


def _state(like: Tensor) -> object:
    """See ``programs.state``."""
    if _once_only() or _profiled():
        return None
    return chips.pretended(), dot_precision(like.dtype)


programs.state = _state
tune_cache.remember(programs.forget)

LARGEST_STRIDE = 2**24


def addressable(matrix: Tensor) -> Tensor:
    """The matrix, or a copy where a stride is so long that an offset inside a tile would overflow
    32 bits (or is negative)."""
    if min(matrix.stride()) >= 0 and max(matrix.stride()) < LARGEST_STRIDE:
        return matrix
    return matrix.contiguous()


def strides(matrix: Tensor) -> tuple[int, int]:
    return matrix.stride(0), matrix.stride(1)
