"""The hand-written CUDA kernels: schedules, sanitizers, an older chip, choices and errors. What
they compute is in test_backends.py, on a simulated GPU where none is here (tests/host)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_host import SANITIZE, SCHEDULES, WATCH, host_command, load_cuda
from devices import DEVICE, GPU, MARKS
from layer_cases import DETACHED, case, compare, small_change

from secura_kernels import SMagNorm
from secura_kernels.backends.cuda import library, passes
from secura_kernels.backends.cuda.plan import one_pass

pytestmark = MARKS
simulated = pytest.mark.skipif(GPU, reason="for the simulated GPU")


@pytest.fixture(autouse=True)
def _loaded():
    load_cuda()


def test_a_device_that_runs_the_library_is_found():
    device = torch.device("cuda" if GPU else "cpu")
    chip = torch.cuda.get_device_capability() if GPU else (0, 0)
    library._probe(device, chip)


@simulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", DETACHED.values(), ids=DETACHED)
def test_no_order_of_threads_shows(norm, dtype, monkeypatch):
    """A missing barrier, or a read before a copy has landed, changes results with the order in
    which threads run and copies arrive; bits must not change."""
    found = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("SECURA_HOST_SCHEDULE", schedule)
        torch.manual_seed(1)
        c = case(130, 136, 72, 9, dtype)
        y = c.ours(norm, impl="cuda")
        found.append((y, *torch.autograd.grad(y, c.trained(), torch.randn_like(y))))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def run_tests(flags: str, selected: str, **environment: str) -> None:
    """tests/test_backends.py again, in a process of its own, with another simulated GPU."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-p",
            "no:cacheprovider",
            str(Path(__file__).with_name("test_backends.py")),
            "-k",
            f"cuda and ({selected})",
        ],
        env=os.environ | {"SECURA_HOST_FLAGS": flags} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr


@simulated
def test_without_tensor_cores():
    """A chip of sm_75: the products on plain multiply-adds, and 64 KiB of shared memory."""
    run_tests("-O0 -DSECURA_HOST_ARCH=750", "no_more_than_eager")


@simulated
def test_blocks_do_not_meet():
    """No block writes a byte of global memory that another one of its grid touches."""
    forms = "every_form or importance_count or duplicates"
    run_tests(f"-O0 {WATCH}", forms, SECURA_HOST_RACES="1")


@simulated
def test_address_and_undefined_behaviour_sanitizers():
    """No access outside of a tensor or of shared memory, no misaligned vector, no overflow."""
    libraries = [
        subprocess.run(
            [host_command()[0], f"-print-file-name={name}"], text=True, capture_output=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(path).is_file() for path in libraries):
        pytest.skip("g++ has no sanitizers")
    # What Python itself never frees is not ours to report; torch and the library share inlines.
    options = "detect_leaks=0:detect_odr_violation=0:abort_on_error=1"
    run_tests(
        " ".join(SANITIZE),
        "every_form or duplicates or expanded or any_shape",
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS=options,
        SECURA_HOST_SCHEDULE="random",
    )


@simulated
@pytest.mark.parametrize("r", [9, 100, 150])
@pytest.mark.parametrize(
    "norm", [None, SMagNorm(), SMagNorm(domain="weight")], ids=["no gate", "output", "weight"]
)
def test_no_bank_conflicts(norm, r, monkeypatch):
    """No ldmatrix meets a bank of shared memory twice; the simulated GPU ends the process if so."""
    monkeypatch.setenv("SECURA_HOST_BANKS", "1")
    c = case(130, 168, 160, r, torch.bfloat16)
    for weight in (c.W, c.W.T.contiguous().T):
        c.W = weight
        y = c.ours(norm, impl="cuda")
        torch.autograd.grad(y, c.trained(), torch.ones_like(y))


@pytest.mark.parametrize("M", [5, 70], ids=["decode", "W_eff"])
def test_columns_of_W_in_several_groups(M, monkeypatch):
    """W of 260 x 1100 in two groups of columns of several tiles each, that are added up."""
    monkeypatch.setattr(passes, "_groups", lambda K, blocks: 2)
    c = small_change(M, 260, 1100, 5, dtype=torch.float32, tied=True, biases=True, device=DEVICE)
    norm = SMagNorm(domain="weight", ref="max")
    results = []
    for impl in ("cuda", "reference"):
        y = c.ours(norm, impl=impl)
        results.append((y, *torch.autograd.grad(y, c.trained(), torch.ones_like(y))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [None, SMagNorm()], ids=["no gate", "gate"])
def test_one_pass_of_any_operands(norm, dtype, monkeypatch):
    """Strides and sizes for which the plan would take the library's product."""
    monkeypatch.setattr(passes, "one_pass", lambda *_: True)
    for M, N, K, r in ((131, 150, 67, 9), (5, 40, 33, 3), (66, 136, 72, 20)):
        c = small_change(M, N, K, r, dtype=dtype, tied=True, biases=True, device=DEVICE)
        compare(c, norm, "cuda")
        c.x = c.x.detach().T.contiguous().T.requires_grad_()
        c.W = c.W.T.contiguous().T
        compare(c, norm, "cuda", torch.randn(N, M, device=DEVICE).to(dtype).T)


@simulated
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("r", [40, 150])
@pytest.mark.parametrize("norm", [None, SMagNorm()], ids=["no gate", "gate"])
def test_one_pass_in_whole_chunks(norm, r, schedule, monkeypatch):
    """The wide tiles, which a chip of few processors takes; more steps than the pipeline has
    stages; ranks whose change is kept in shared memory, and too many for that."""
    monkeypatch.setattr(passes, "one_pass", lambda *_: True)
    monkeypatch.setenv("SECURA_HOST_PROCESSORS", "1")
    monkeypatch.setenv("SECURA_HOST_SCHEDULE", schedule)
    monkeypatch.setenv("SECURA_HOST_BANKS", "1")
    compare(
        small_change(140, 264, 328, r, dtype=torch.bfloat16, tied=True, biases=True, device=DEVICE),
        norm,
        "cuda",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm", [None, SMagNorm()], ids=["no gate", "gate"])
def test_groups_of_columns_are_added_in_order(norm, tied, dtype, monkeypatch):
    """Products of few rows, whose columns several blocks share: the same bits in every schedule."""
    monkeypatch.setattr(passes, "_groups_of_columns", lambda *_: 3)
    c = small_change(70, 200, 264, 9, dtype=dtype, tied=tied, biases=True, device=DEVICE)
    dy = torch.randn(70, 200, device=DEVICE).to(dtype)
    compare(c, norm, "cuda", dy)
    found = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("SECURA_HOST_SCHEDULE", schedule)
        y = c.ours(norm, impl="cuda")
        found.append((y, *torch.autograd.grad(y, c.trained(), dy)))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_how_many_groups_of_columns():
    assert passes._groups_of_columns(8192, 4096, 132) == 1  # rows fill the chip
    assert passes._groups_of_columns(2048, 4096, 132) == 4
    assert passes._groups_of_columns(5, 4096, 132) == 8  # no group below 512 columns
    assert passes._groups_of_columns(5, 300, 132) == passes._groups_of_columns(0, 300, 1) == 1


def test_the_plan():
    def planned(M=8192, N=4096, K=512, norm=None, dtype=torch.bfloat16, transposed=False):
        x = torch.empty(M, K, dtype=dtype, device="meta")  # planned for as on an A100
        W = (
            torch.empty(K, N, dtype=dtype, device="meta").T
            if transposed
            else torch.empty(N, K, dtype=dtype, device="meta")
        )
        return one_pass(x, W, norm)

    assert planned() and planned(norm=SMagNorm()) and planned(transposed=True)
    assert planned(K=48, dtype=torch.float32)
    assert not any(
        (
            planned(K=4096),
            planned(M=64),
            planned(norm=SMagNorm(ref="max")),
            planned(norm=SMagNorm(), transposed=True),
            planned(K=511),
            planned(dtype=torch.float32),
        )
    )


def test_bad_arguments_of_an_op():
    op = torch.ops.secura_cuda
    a, core = torch.randn(6, 8, device=DEVICE), torch.randn(4, 4, device=DEVICE)
    factor, p, q = (torch.empty(n, m, device=DEVICE) for n, m in ((8, 16), (6, 4), (6, 16)))
    with pytest.raises(RuntimeError, match=r"factor of shape \(7, 16\) is not contiguous with 128"):
        op.down(a, factor[:7], core, 1.0, p, q, None, None, None, 0)
    with pytest.raises(RuntimeError, match=r"factor of shape \(8, 12\) must have a multiple of 16"):
        op.down(a, factor[:, :12], core, 1.0, p, q, None, None, None, 0)
    with pytest.raises(RuntimeError, match="a has dtype number 7; allowed: float32, bfloat16"):
        op.down(a.double(), factor, core, 1.0, p, q, None, None, None, 0)
    with pytest.raises(RuntimeError, match="t needs task_gate"):
        op.down(a, factor, core, 1.0, p, q, None, None, p, 0)
    with pytest.raises(RuntimeError, match=r"task_gate of shape \(2, 4\) is not"):
        op.down(a, factor, core, 1.0, p, q, None, factor[:4, :2].T, None, 0)
    with pytest.raises(RuntimeError, match=r"a of shape \(6, 8\) and b of shape \(6, 4\) have no"):
        op.product(a, p, q, factor, None, None, None, [], a, None, None, 0.0, 0)


@simulated
def test_a_failed_launch_names_its_shape(monkeypatch):
    monkeypatch.setenv("SECURA_HOST_SHARED_BYTES", "32768")
    c = case(130, 136, 32, 9, torch.float32)
    with pytest.raises(RuntimeError, match=r"product\(M=130, N=136, K=32, r=16\) failed: invalid"):
        c.ours(None, impl="cuda")
    monkeypatch.delenv("SECURA_HOST_SHARED_BYTES")
    c.ours(None, impl="cuda")  # nothing is left of the failure


def test_why_unavailable():
    c = case(4, 400, 300, 4, torch.float64, bias=False, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"impl='cuda' cannot run here.*float64.*'reference'"):
        c.ours(None, impl="cuda")
    wide = case(4, 400, 300, 257, torch.float32, bias=False, device=DEVICE)
    with pytest.raises(RuntimeError, match="rank is 257; the CUDA kernels hold up to 256"):
        wide.ours(None, impl="cuda")
    reason = library.why_unavailable(torch.device("meta"), torch.float32, 4)
    assert reason == "the CUDA kernels are for NVIDIA GPUs, not meta devices"
