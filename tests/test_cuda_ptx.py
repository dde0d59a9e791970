"""The PTX that nvcc makes of csrc/, inline assembly included, executed on the simulated GPU."""

import os
import re

import ptx
import pytest
import torch
from cuda_host import host_library, load_cuda
from cuda_ptx import PASSES, Translation, ptx_of
from devices import GPU, MARKS
from layer_cases import check_no_more_than_eager, relative_error, small_change
from ptx_operands import Unknown

from secura_kernels import SMagNorm
from secura_kernels.backends.cuda import compiler, passes

try:
    compiler.tools()
    MISSING = ""
except RuntimeError as error:
    MISSING = str(error)
pytestmark = [
    *MARKS,
    pytest.mark.skipif(GPU, reason="for the simulated GPU"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]
DTYPES = {torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}
# M, N, K, r: whole chunks, others, few tokens and more steps than a pipeline has stages.
SHAPES = [(130, 136, 72, 9), (101, 131, 67, 7), (5, 96, 264, 40)]


# What each changes in the PTX of `down`.
FAULTS = {
    "registers of a fragment": (r"(mma\.sync\S+ \{.*?\}, \{)(%r\d+), (%r\d+)", r"\1\3, \2"),
    "matrices as they lie": (r"\.trans\.shared", ".shared"),
    "no wait for copies": (r"cp\.async\.wait_group \d+;", ""),
    "no barrier": (r"bar\.sync\s+0;", ""),
}
CHUNKS = "11down_kernelI13__nv_bfloat16Li64ELNS_5ReadsE1EE"


@pytest.fixture(scope="module")
def kernels() -> list[ptx.Kernel]:
    return [k for name in PASSES for k in ptx.translate(ptx_of(name), f"{name}.ptx")]


@pytest.fixture(scope="module")
def faulty() -> dict[str, ptx.Kernel]:
    """`down` in whole chunks with each fault."""
    text, found = ptx_of("down"), {}
    for fault, how in FAULTS.items():
        changed = re.sub(*how, text)
        assert changed != text
        translated = ptx.translate(changed, f"down, {fault}")
        found[fault] = next(k for k in translated if CHUNKS in k.name)
    return found


@pytest.fixture(scope="module")
def translation(kernels, faulty) -> Translation:
    load_cuda()
    library = host_library(*os.environ.get("SECURA_HOST_FLAGS", "-O2").split())
    return Translation([*kernels, *faulty.values()], library)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_no_more_than_eager(translation, kernels, dtype, monkeypatch):
    """In every form that these passes have, with threads, warps and blocks in random order, copies
    as late as they may be, and no two blocks at one place. Each kernel of this dtype runs."""

    def check(norm, *variants):
        cases = [
            small_change(*shape, dtype=dtype, tied=tied, biases=biases)
            for shape in SHAPES
            for tied, biases in variants
        ]
        check_no_more_than_eager(cases, norm, "cuda")

    for name in ("RACES", "BANKS"):
        monkeypatch.setenv(f"SECURA_HOST_{name}", "1")
    monkeypatch.setenv("SECURA_HOST_SCHEDULE", "random")
    kernels = [kernel for kernel in kernels if DTYPES[dtype] in kernel.name]
    with translation.running(kernels):
        check(None, (True, False), (False, False))
        check(SMagNorm(), (True, False), (False, False))
        check(SMagNorm(ref="max"), (True, True))
        monkeypatch.setattr(passes, "one_pass", lambda *_: True)
        check(SMagNorm(), (True, True))
        for processors in ("1", "108"):  # the first takes wide tiles
            monkeypatch.setenv("SECURA_HOST_PROCESSORS", processors)
            check(None, (True, True))
        assert [k.name for k in kernels if not translation.launches(k)] == []


def error_of_down(translation, kernel, monkeypatch) -> float:
    torch.manual_seed(1)
    a, factor = torch.randn(70, 264).bfloat16(), torch.randn(264, 16).bfloat16()
    monkeypatch.setenv("SECURA_HOST_SCHEDULE", "reversed")
    with translation.running([kernel]):
        p, _ = passes.down(a, factor, torch.eye(16), 1.0, p_dtype=torch.float32)
    return relative_error(p, a.double() @ factor.double())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(translation, kernels, faulty, fault, monkeypatch):
    right = next(k for k in kernels if CHUNKS in k.name)
    assert error_of_down(translation, right, monkeypatch) < 1e-5
    assert not error_of_down(translation, faulty[fault], monkeypatch) < 0.1  # or NaN


def test_an_unknown_instruction_is_named():
    text = ptx_of("gather")
    for known, unknown in {
        r"mul\.lo\.s64": "mul.hi.s64",
        r"mov\.u32(\s+%r\d+, )%tid\.x": r"mov.u32\1%laneid",
        r"\.reg \.pred": ".local .pred",
    }.items():
        changed = re.sub(known, unknown, text)
        assert changed != text
        with pytest.raises(Unknown, match=r"gather.ptx:\d+: \S.*is not known|%laneid"):
            ptx.translate(changed, "gather.ptx")
