"""What the Triton and the CUDA kernels share on the host: the gate's numbers, the layout of their
internal matrices, and what is saved."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..settings import SMagNorm
from .gate_code import code_range, highest_gate, saved_dtype

# What both compute in, and the widest core they hold.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_RANK = 256
LOG2_E = 1 / math.log(2)


@dataclass(frozen=True)
class GateNumbers:
    """The gate's settings as the kernels take them, z in units of ln 2; ``slope`` is yet to be
    divided by max(rho) where ``ref`` is "max". ``code_steps`` and ``code_low``: the saved code of
    g."""

    slope: float
    offset: float
    eps: float
    beta: float
    top: float
    code_steps: float
    code_low: float

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of(cls, norm: SMagNorm, dtype: torch.dtype) -> "GateNumbers":
        low, high = code_range(dtype) or (0, 0)
        top = highest_gate(norm)
        return cls(
            slope=norm.scale * LOG2_E / (1.0 if norm.ref == "max" else norm.ref),
            offset=norm.scale * norm.shift * LOG2_E,
            eps=norm.eps,
            beta=norm.base_weight,
            top=top,
            code_steps=(high - low) / (top - 1),
            code_low=float(low),
        )

    @functools.lru_cache(maxsize=64)  # noqa: B019 (few gates, and they live as long as a program)
    def arguments(self) -> dict[str, float]:
        """By the names of Triton's arguments, whose dtype of the code says what ``code_low`` is."""
        return {name: value for name, value in vars(self).items() if name != "code_low"}


NO_GATE = GateNumbers(0.0, 0.0, 1.0, 1.0, 2.0, 1.0, 0.0)


@functools.cache
def processors_of_gpu(device: torch.device) -> int:
    """Streaming multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def padded_rank(r: int) -> int:
    """Row stride of the internal (M, r) matrices: 16-byte rows; the padding is written as zero."""
    return cdiv(r, 16) * 16


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Vectors and saved matrices, whose strides the kernels take as given."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def saved_for_backward(
    x: Tensor, N: int, norm: SMagNorm | None, save: bool
) -> tuple[Tensor, Tensor | None]:
    """(the op's output, the kernel's argument)."""
    if norm is None:
        return x.new_empty(0), None
    saved = x.new_empty((x.shape[0], N) if save else (0,), dtype=saved_dtype(x.dtype))
    return saved, saved if save else None
