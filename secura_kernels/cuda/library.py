"""Finds and loads the compiled library of csrc/, and calls its ops."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from ..kernel_host import DTYPES, LARGEST_RANK
from . import compiler

OLDEST_CHIP = (7, 5)

# What this version calls; csrc/ops.cpp defines the same. Outputs are preallocated: (a!).
SCHEMAS = {
    "gather": "(Tensor matrix, Tensor? index, Tensor(a!) side, int stream) -> ()",
    "down": "(Tensor a, Tensor side, Tensor core, float alpha, Tensor(a!) p, Tensor(b!) q, "
            "Tensor(c!)? part, int stream) -> ()",
    "project": "(Tensor a, Tensor? index, Tensor core, float alpha, Tensor(a!) p, Tensor(b!) q, "
               "int stream) -> ()",
    "product": "(Tensor a, Tensor b, Tensor h, Tensor side, Tensor? bias, Tensor? adapter_bias, "
               "Tensor? decay, float[] gate, Tensor(a!) y, Tensor(b!)? saved, bool save_base, "
               "Tensor(c!)? moved, float edge, int stream) -> ()",
    "epilogue": "(Tensor(a!) y, Tensor h, Tensor side, Tensor? adapter_bias, Tensor? decay, "
                "float[] gate, Tensor(b!)? saved, bool save_base, Tensor(c!)? moved, float edge, "
                "Tensor(d!)? largest, bool find_largest, int stream) -> ()",
    "gate_backward": "(Tensor dy, Tensor saved, Tensor? change, Tensor side, Tensor? rows, "
                     "Tensor core, float alpha, Tensor? adapter_bias, Tensor? decay, "
                     "float[] gate, Tensor(a!)? largest, bool find_largest, Tensor? through, "
                     "Tensor(b!)? g, Tensor(c!)? v, Tensor(d!)? q, Tensor(e!)? bias_part, "
                     "Tensor(f!)? statistics, Tensor(g!)? v_part, int stream) -> ()",
    "core_gradient": "(Tensor v, Tensor t, float alpha, Tensor(a!) part, int stream) -> ()",
    "effective_weight": "(Tensor weight, Tensor P, Tensor side, Tensor? decay, float[] gate, "
                        "Tensor(a!)? out, Tensor(b!)? moved, float edge, Tensor(c!)? largest, "
                        "bool find_largest, int stream) -> ()",
    "decode": "(Tensor x, Tensor weight, Tensor P, Tensor side, Tensor? decay, float[] gate, "
              "Tensor? largest, Tensor(a!) part, int stream) -> ()",
    "weight_core_gradient": "(Tensor dy, Tensor x, Tensor weight, Tensor P, Tensor side, "
                            "Tensor? decay, float[] gate, Tensor? largest, Tensor? through, "
                            "bool full, Tensor(a!) q, Tensor(b!)? statistics, int stream) -> ()",
}


def why_unavailable(device: torch.device, dtype: torch.dtype, r: int) -> str | None:
    """Why the kernels cannot run a layer of ``dtype`` and rank ``r`` on ``device``, or None."""
    if dtype not in DTYPES:
        return f"the CUDA kernels compute in float32, bfloat16 and float16, not in {dtype}"
    if r > LARGEST_RANK:
        return f"the rank is {r}; the CUDA kernels hold up to {LARGEST_RANK}"
    return _why_no_library(device)


@functools.cache
def _why_no_library(device: torch.device) -> str | None:
    if device.type == "cpu" and _registered_for("CPU"):
        return None  # the tests' simulated GPU
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the CUDA kernels are for NVIDIA GPUs, not {device.type} devices"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST_CHIP:
        return f"the GPU has compute capability {major}.{minor}; the CUDA kernels need 7.5"
    if _registered_for("CUDA"):
        return None
    library = _find()
    if library is None:
        return ("the CUDA kernels are not built: secura_kernels.cuda.build() compiles them once "
                "(it needs nvcc), or install with SECURA_BUILD_CUDA=1")
    try:
        load(library)
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def _registered_for(key: str) -> bool:
    return hasattr(torch.ops.secura_cuda, "product") and (
        torch._C._dispatch_has_kernel_for_dispatch_key("secura_cuda::product", key))


def build(*args, **kwargs) -> Path:
    """``compiler.build``, and from then on the library is found."""
    library = compiler.build(*args, **kwargs)
    _why_no_library.cache_clear()
    return library


def _find() -> Path | None:
    """The library that was installed with the package, else what ``build`` made."""
    installed = compiler.HERE / compiler.LIBRARY
    return installed if installed.is_file() else compiler.cached()


def load(library: Path) -> None:
    """Loads a library of this package's csrc/.

    Raises:
        OSError: it is not there, or not one for this machine. RuntimeError: it was built from
            other sources than this version's.
    """
    torch.ops.load_library(str(library))
    _why_no_library.cache_clear()
    for name, schema in SCHEMAS.items():
        op = getattr(torch.ops.secura_cuda, name, None)
        found = None if op is None else str(op.default._schema)
        if found != f"secura_cuda::{name}{schema}":
            raise RuntimeError(f"{library} was built from other sources than this version of "
                               f"secura_kernels ({name}: {found}); build it again")


def call(name: str, like: Tensor, *arguments) -> None:
    """Runs an op on the current stream of the device of ``like``."""
    op = getattr(torch.ops.secura_cuda, name).default
    if like.device.type != "cuda":
        op(*arguments, 0)
        return
    with torch.cuda.device(like.device):
        op(*arguments, torch.cuda.current_stream().cuda_stream)
