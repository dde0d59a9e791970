"""Finds and loads the compiled library of csrc/, and calls its ops."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from ..host import DTYPES, LARGEST_RANK
from . import compiler

OLDEST_CHIP = (7, 5)

# What this version calls; csrc/ops.cpp defines the same. Outputs are preallocated: (a!).
SCHEMAS = {
    "probe": "(Tensor like, int stream) -> ()",
    "gather": "(Tensor matrix, Tensor? index, Tensor(a!) factor, int stream) -> ()",
    "down": "(Tensor a, Tensor factor, Tensor core, float alpha, Tensor(a!) p, Tensor(b!) q, "
    "Tensor(c!)? part, Tensor? task_gate, Tensor? t, int stream) -> ()",
    "project": "(Tensor a, Tensor? index, Tensor core, float alpha, Tensor(a!) p, Tensor(b!) q, "
    "Tensor? task_gate, int stream) -> ()",
    "product": "(Tensor a, Tensor b, Tensor h, Tensor factor, Tensor? bias, Tensor? adapter_bias, "
    "Tensor? decay, float[] gate, Tensor(a!) y, Tensor(b!)? saved, "
    "Tensor(c!)? moved, float edge, int stream) -> ()",
    "epilogue": "(Tensor(a!) y, Tensor h, Tensor factor, Tensor? adapter_bias, Tensor? decay, "
    "float[] gate, Tensor(b!)? saved, Tensor(c!)? moved, float edge, "
    "Tensor(d!)? largest, bool find_largest, int stream) -> ()",
    "gate_backward": "(Tensor dy, Tensor saved, Tensor factor, Tensor? rows, Tensor core, "
    "float alpha, Tensor? decay, float[] gate, Tensor(a!)? g, Tensor(b!)? v, Tensor(c!)? q, "
    "Tensor(d!)? bias_part, Tensor(e!)? v_part, int stream) -> ()",
    "core_gradient": "(Tensor v, Tensor t, float alpha, Tensor(a!) part, int stream) -> ()",
    "effective_weight": "(Tensor weight, Tensor P, Tensor factor, Tensor? decay, float[] gate, "
    "Tensor(a!)? out, Tensor(b!)? moved, float edge, Tensor(c!)? largest, "
    "bool find_largest, int stream) -> ()",
    "decode": "(Tensor x, Tensor weight, Tensor P, Tensor factor, Tensor? decay, float[] gate, "
    "Tensor? largest, Tensor(a!) part, int stream) -> ()",
    "weight_core_gradient": "(Tensor dy, Tensor x, Tensor weight, Tensor P, Tensor factor, "
    "Tensor? decay, float[] gate, Tensor? largest, Tensor(a!) q, int stream) -> ()",
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
    try:
        chip = torch.cuda.get_device_capability(device)
        if chip < OLDEST_CHIP:
            return f"the GPU has compute capability {_dotted(chip)}; the CUDA kernels need 7.5"
        if _loaded is None:
            _load_for(chip)
        _probe(device, chip)
    except (RuntimeError, AssertionError) as error:  # the latter is a CPU build of torch's
        return str(error)
    return None


def _registered_for(key: str) -> bool:
    return _loaded is not None and (
        torch._C._dispatch_has_kernel_for_dispatch_key("secura_cuda::product", key)
    )


def _dotted(chip: tuple[int, int]) -> str:
    return ".".join(map(str, chip))


def build(*args, **kwargs) -> Path:
    """``compiler.build``, and from then on the library is found."""
    library = compiler.build(*args, **kwargs)
    _why_no_library.cache_clear()
    return library


def _load_for(chip: tuple[int, int]) -> None:
    """Loads the library that was installed with the package, else what ``build`` made for this
    chip.

    Raises:
        RuntimeError: there is none, or none that can be loaded.
    """
    installed, reasons = compiler.HERE / compiler.LIBRARY, []
    for found in (
        lambda: installed if installed.is_file() else None,
        lambda: compiler.cached(["{}{}".format(*chip)]),
    ):
        try:
            library = found()
            if library is not None:
                return load(library)
        except RuntimeError as error:
            reasons.append(str(error))
        except OSError as error:
            reasons.append(
                f"the CUDA kernels cannot be loaded: {error}; "
                "secura_kernels.backends.cuda.build(force=True) compiles them again"
            )
    raise RuntimeError(
        "; ".join(reasons)
        or (
            f"the CUDA kernels are not built for compute capability {_dotted(chip)}: "
            "secura_kernels.backends.cuda.build() compiles them once (it needs nvcc), or install "
            "with SECURA_BUILD_CUDA=1"
        )
    )


_loaded: Path | None = None  # the library that this process has; it takes one, and keeps it


def load(library: Path) -> None:
    """Loads a library of this package's csrc/.

    Raises:
        OSError: it is not there, or not one for this machine. RuntimeError: it was built from
            other sources than this version's, or another library was loaded before.
    """
    global _loaded
    _why_no_library.cache_clear()
    foreign = (
        f"{library} was built from other sources than this version of secura_kernels; "
        "secura_kernels.backends.cuda.build() compiles these, or install again with "
        "SECURA_BUILD_CUDA=1"
    )
    if compiler.digest_of(Path(library)) != compiler.digest(compiler.sources()):
        raise RuntimeError(foreign)
    torch.ops.load_library(str(library))
    for name, schema in SCHEMAS.items():
        op = getattr(torch.ops.secura_cuda, name, None)
        found = None if op is None else str(op.default._schema)
        if found != f"secura_cuda::{name}{schema}":
            raise RuntimeError(f"{foreign} ({name}: {found})")
    _loaded = Path(library)


def _probe(device: torch.device, chip: tuple[int, int]) -> None:
    """Asks the device itself.

    Raises:
        RuntimeError: the loaded library has no code for it, or the driver is too old.
    """
    try:
        like = torch.empty(0, device=device)
        call("probe", like, like)
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        chips = ";".join("{}{}".format(*other) for other in sorted(here))
        raise RuntimeError(
            f"the CUDA kernels of {_loaded} do not run on compute capability {_dotted(chip)} here: "
            f"{why}; update the NVIDIA driver if it is older than the CUDA toolkit that compiled "
            "them, else compile them for every GPU that is here: SECURA_BUILD_CUDA=1 "
            f"SECURA_CUDA_ARCHES='{chips}' pip install --no-build-isolation ."
        ) from error


def call(name: str, like: Tensor, *arguments) -> None:
    """Runs an op on the current stream of the device of ``like``."""
    op = getattr(torch.ops.secura_cuda, name).default
    if like.device.type != "cuda":
        op(*arguments, 0)
        return
    with torch.cuda.device(like.device):
        op(*arguments, torch.cuda.current_stream().cuda_stream)
