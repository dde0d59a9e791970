"""The last line of ``python -m secura_kernels info``."""

import pytest
import torch

from secura_kernels import __main__ as command
from secura_kernels.tools.advice import advice

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
REFERENCE = [("reference", CPU), ("reference", GPU)]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """One GPU whose compute capability the call sets; the cache of tuned tiles is empty."""
    tune_cache = pytest.importorskip("secura_kernels.backends.triton.tune_cache")

    def present(capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        return tune_cache

    yield present
    tune_cache.forget()


def test_info_ends_with_it(monkeypatch, capsys):
    monkeypatch.setattr(command, "check", lambda *_: 0)
    assert command.info() == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("advice: ")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (dict(avx512_bf16=True), "; this CPU has instructions for bfloat16"),
        (dict(bf16=True, amx_bf16=False), "; this CPU has instructions for bfloat16"),
        (dict(avx2=True, avx512_bf16=False), "; this CPU has no instructions for bfloat16"),
        (None, ""),
    ],
)
def test_a_cpu(found, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    if found is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    line = advice(REFERENCE[:1])
    start = "no GPU: impl='auto' takes the reference, plain PyTorch"
    assert line.startswith(start + said) and bool(said) == (line != start) and "\n" not in line


def test_a_gpu_without_kernels_one_that_was_not_tuned_and_one_that_was(gpu):
    tune_cache = gpu()
    assert advice(REFERENCE).startswith("no kernel runs on cuda:0")
    kernels = [*REFERENCE, ("triton", GPU)]
    assert "python -m secura_kernels tune measures them here" in advice(kernels)
    # The CUDA kernels have no tiles to tune.
    assert advice([*REFERENCE, ("cuda", GPU)]).startswith("nothing is left to do")
    tune_cache.save(tune_cache.path(GPU), {"down bfloat16 8x8 r8": tune_cache.LIBRARY}, {}, {})
    assert advice(kernels) == "nothing is left to do; every GPU has instructions for bfloat16"


def test_a_gpu_that_emulates_bfloat16(gpu):
    gpu(capability=(7, 5))
    assert advice([*REFERENCE, ("cuda", GPU)]).startswith(
        "nothing is left to do; a GPU has no instructions for bfloat16 and emulates it"
    )
