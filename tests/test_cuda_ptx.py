"""The PTX that nvcc makes of csrc/, inline assembly included, executed on the simulated GPU."""

import contextlib
import functools
import os
import re

import ptx
import pytest
import torch
from cuda_host import host_library, load_cuda
from cuda_ptx import BOTH, OUTPUT, WEIGHT, Translation, ptx_of
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
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float"}
# M, N, K, r: whole chunks, others, few tokens and more steps than a pipeline has stages.
SHAPES = [(130, 136, 72, 9), (101, 131, 67, 7), (5, 96, 264, 40)]
# The same of tiles of W, and of too many tokens for `decode`, and few.
WEIGHT_SHAPES = [(66, 136, 136, 9), (67, 69, 131, 7), (5, 131, 264, 40)]
# From sm_90 on nvcc has an instruction that makes a bfloat16 a float32: in these, among others.
CHANGED_IN_90 = ("epilogue", "gate_backward", "effective_weight")


# What each changes in the PTX of `down`.
FAULTS = {
    "registers of a fragment": (r"(mma\.sync\S+ \{.*?\}, \{)(%r\d+), (%r\d+)", r"\1\3, \2"),
    "matrices as they lie": (r"\.trans\.shared", ".shared"),
    "no wait for copies": (r"cp\.async\.wait_group \d+;", ""),
    "no barrier": (r"bar\.sync\s+0;", ""),
}
CHUNKS = "11down_kernelI13__nv_bfloat16Li64ELNS_5ReadsE1EE"


def translated(name: str, dtype: torch.dtype, chip: str = "80") -> list[ptx.Kernel]:
    text = ptx_of(name, DTYPES[dtype], chip)
    return ptx.translate(text, f"{name}_{DTYPES[dtype]}_{chip}.ptx")


def of(names, dtype: torch.dtype, chip: str = "80") -> list[ptx.Kernel]:
    return [kernel for name in names for kernel in translated(name, dtype, chip)]


@functools.cache
def faulty() -> dict[str, ptx.Kernel]:
    """`down` in whole chunks with each fault."""
    text, found = ptx_of("down", "bfloat16"), {}
    for fault, how in FAULTS.items():
        changed = re.sub(*how, text)
        assert changed != text
        translated = ptx.translate(changed, f"down, {fault}")
        found[fault] = next(k for k in translated if CHUNKS in k.name)
    return found


@functools.cache
def translation(dtype: torch.dtype) -> Translation:
    """Of every kernel of a dtype that is executed here."""
    load_cuda()
    kernels = of(dict.fromkeys((*OUTPUT, *WEIGHT)), dtype)
    if dtype == torch.bfloat16:
        kernels += [*of(CHANGED_IN_90, dtype, "90"), *faulty().values()]
    return Translation(kernels, host_library(*os.environ.get("SECURA_HOST_FLAGS", "-O2").split()))


@pytest.fixture(autouse=True)
def hostile(monkeypatch):
    """Threads, warps and blocks in random order, copies as late as they may be, and no two blocks
    at one place."""
    for name in ("RACES", "BANKS"):
        monkeypatch.setenv(f"SECURA_HOST_{name}", "1")
    monkeypatch.setenv("SECURA_HOST_SCHEDULE", "random")


def check(shapes, dtype, norm, *variants):
    cases = [
        small_change(*shape, dtype=dtype, tied=tied, biases=biases, decay=decay)
        for shape in shapes
        for tied, biases, decay in variants
    ]
    check_no_more_than_eager(cases, norm, "cuda")


@contextlib.contextmanager
def running(kernels: list[ptx.Kernel], dtype: torch.dtype):
    """These alone, and each of them."""
    with translation(dtype).running(kernels):
        yield
        assert [k.name for k in kernels if not translation(dtype).launches(k)] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_no_more_than_eager(dtype, monkeypatch):
    """In every form that the passes of the output domain have."""
    with running(of(OUTPUT, dtype), dtype):
        check(SHAPES, dtype, None, (True, False, False), (False, False, False))
        check(SHAPES, dtype, SMagNorm(), (True, False, False), (False, False, True))
        check(SHAPES, dtype, SMagNorm(ref="max"), (True, True, False))
        monkeypatch.setattr(passes, "one_pass", lambda *_: True)
        check(SHAPES, dtype, SMagNorm(), (True, True, True))
        for processors in ("1", "108"):  # the first takes wide tiles
            monkeypatch.setenv("SECURA_HOST_PROCESSORS", processors)
            check(SHAPES, dtype, None, (True, True, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_on_the_weight_is_no_more_than_eager(dtype):
    """The same of the weight domain."""
    with running(of(WEIGHT, dtype), dtype):
        check(WEIGHT_SHAPES, dtype, SMagNorm(domain="weight"), (True, False, True))
        check(WEIGHT_SHAPES, dtype, SMagNorm(domain="weight", ref="max"), (False, True, False))


def test_what_sm_90_has_of_its_own(monkeypatch):
    for name in CHANGED_IN_90:
        assert "cvt.f32.bf16" in ptx_of(name, "bfloat16", "90")
        assert "cvt.f32.bf16" not in ptx_of(name, "bfloat16")
    dtype = torch.bfloat16
    others = (*BOTH, "down", "weight_core_gradient")
    monkeypatch.setattr(passes, "one_pass", lambda *_: False)
    with running([*of(CHANGED_IN_90, dtype, "90"), *of(others, dtype)], dtype):
        for norm, shapes in (SMagNorm(), SHAPES), (SMagNorm(domain="weight"), WEIGHT_SHAPES[:2]):
            check(shapes, dtype, norm, (True, True, True))


def error_of_down(kernel, monkeypatch) -> float:
    torch.manual_seed(1)
    a, factor = torch.randn(70, 264).bfloat16(), torch.randn(264, 16).bfloat16()
    monkeypatch.setenv("SECURA_HOST_SCHEDULE", "reversed")
    with translation(torch.bfloat16).running([kernel]):
        p, _ = passes.down(a, factor, torch.eye(16), 1.0, p_dtype=torch.float32)
    return relative_error(p, a.double() @ factor.double())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault, monkeypatch):
    right = next(k for k in translated("down", torch.bfloat16) if CHUNKS in k.name)
    assert error_of_down(right, monkeypatch) < 1e-5
    assert not error_of_down(faulty()[fault], monkeypatch) < 0.1  # or NaN


def test_an_unknown_instruction_is_named():
    text = ptx_of("gather", "bfloat16")
    for known, unknown in {
        r"mul\.lo\.s64": "mul.hi.s64",
        r"mov\.u32(\s+%r\d+, )%tid\.x": r"mov.u32\1%laneid",
        r"\.reg \.pred": ".local .pred",
    }.items():
        changed = re.sub(known, unknown, text)
        assert changed != text
        with pytest.raises(Unknown, match=r"gather.ptx:\d+: \S.*is not known|%laneid"):
            ptx.translate(changed, "gather.ptx")
