"""What ``python -m secura_kernels info`` advises for the machine that it runs on, in one line."""

import torch


def advice(runs: list[tuple[str, torch.device]]) -> str:
    """One line, from what was found here.

    Args:
        runs: the backends that can run, each with its device.
    """
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if not gpus or not torch.cuda.is_available():
        return "no GPU: impl='auto' takes the reference, plain PyTorch" + _of_bfloat16(
            _cpu_has_bfloat16(), "this CPU"
        )
    idle = [gpu for gpu in gpus if not any(gpu == d and impl != "reference" for impl, d in runs)]
    if idle:
        return (
            f"no kernel runs on {idle[0]}, where impl='auto' takes the reference, plain PyTorch: "
            "see the reasons above"
        )
    untuned = [gpu for gpu in gpus if ("triton", gpu) in runs and not _tuned(gpu)]
    if untuned:
        return (
            f"{untuned[0]} has tiles that were chosen on another machine: "
            "python -m secura_kernels tune measures them here, once"
        )
    native = all(torch.cuda.get_device_capability(gpu) >= (8, 0) for gpu in gpus)
    return "nothing is left to do" + _of_bfloat16(native, "every GPU" if native else "a GPU")


def _of_bfloat16(native: bool | None, where: str) -> str:
    if native is None:
        return ""
    if native:
        return f"; {where} has instructions for bfloat16"
    return f"; {where} has no instructions for bfloat16 and emulates it: take another dtype"


def _cpu_has_bfloat16() -> bool | None:
    """None where this version of torch does not say."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return None
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _tuned(gpu: torch.device) -> bool:
    from ..backends.triton import tune_cache

    return bool(tune_cache.load(tune_cache.path(gpu)))
