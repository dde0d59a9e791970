"""The fused Triton kernels; ``linear``, ``weight``, ``epilogue`` and ``batched`` have the functions
of the modules of those names in ``reference``. ``passes`` has the kernels, one file each,
and ``interface`` what the schedule sees of them. The derivation, and what each pass costs:
README.md.
"""

import torch

from ..host import DTYPES, LARGEST_RANK
from ..schedule import Epilogue, Linear, Weight
from . import batched, chips, interface
from .dispatch import Plan, plan
from .launch import INTERPRETED

__all__ = ["DTYPES", "LARGEST_RANK", "Plan", "batched", "plan", "why_unavailable"]

linear, epilogue, weight = Linear(interface), Epilogue(interface), Weight(interface)


def why_unavailable(device: torch.device, dtype: torch.dtype, r: int) -> str | None:
    """Why the kernels cannot run a layer of ``dtype`` and rank ``r`` on ``device``, or None."""
    if device.type not in ("cuda", "cpu") or torch.version.hip is not None:
        return f"the Triton kernels are for NVIDIA GPUs, not {device.type} devices"
    if device.type == "cpu" and not INTERPRETED:
        return (
            "the tensors are on the CPU; the Triton kernels need an NVIDIA GPU (or "
            "TRITON_INTERPRET=1 in the environment, to try them in Triton's interpreter)"
        )
    if device.type == "cuda" and INTERPRETED:
        return "TRITON_INTERPRET is set, so the Triton kernels run on CPU tensors only"
    if chips.chip_of(device) is None:
        major, minor = torch.cuda.get_device_capability(device)
        return f"the GPU has compute capability {major}.{minor}; the Triton kernels need 8.0"
    if dtype not in DTYPES:
        return f"the Triton kernels compute in float32, bfloat16 and float16, not in {dtype}"
    if r > LARGEST_RANK:
        return f"the rank is {r}; the Triton kernels hold up to {LARGEST_RANK}"
    return None
