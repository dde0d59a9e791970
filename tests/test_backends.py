"""Every backend against float64: every form, shape, stride and dtype. Without a GPU the kernels run
in Triton's interpreter, and on a simulated GPU (``cuda_host``)."""

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICE, KERNELS, MARKS, poisoned_memory
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from layer_cases import (
    ALL_NORMS,
    case,
    check_derivatives,
    check_no_more_than_eager,
    compare,
    skip_where_low_precision_jumps,
    small_change,
)
from layer_cases import PRECISION_NORMS as NORMS

from secura_kernels import SMagNorm
from secura_kernels.backends.cuda import passes
from secura_kernels.backends.reference import blocks
from secura_kernels.backends.triton.passes import gate_backward
from secura_kernels.ops.registry import backend

pytestmark = MARKS

# M, N, K, r and why. In the interpreter one pass is taken for M > 64, N and K multiples of 8.
SHAPES = {
    "one pass": (130, 136, 72, 9),
    "no multiple of 8": (101, 131, 67, 7),
    "the published rank, one pass": (70, 160, 176, 150),
    "few tokens": (5, 96, 64, 8),
    "one token": (1, 70, 45, 3),
    "columns in two parts": (70, 530, 40, 9),
}


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_memory():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_error_is_no_more_than_eager(norm, dtype, impl):
    skip_where_low_precision_jumps(norm, dtype)
    check_no_more_than_eager(
        [
            small_change(*shape, dtype=dtype, tied=tied, biases=biases, device=DEVICE)
            for shape in SHAPES.values()
            for tied, biases in ((True, True), (True, False), (False, False))
        ],
        norm,
        impl,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_behind_a_task_gate_is_no_more_than_eager(dtype, impl):
    settings = dict(dtype=dtype, task_gate=True, device=DEVICE)
    cases = [
        small_change(*shape, tied=tied, biases=biases, **settings)
        for shape in SHAPES.values()
        for tied, biases in ((True, True), (True, False), (False, False))
    ]
    check_no_more_than_eager(cases, None, impl)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "stored"])
@pytest.mark.parametrize("norm", **ALL_NORMS)
def test_every_form(norm, tied, impl):
    compare(case(70, 45, 38, 5, torch.float32, tied=tied, device=DEVICE), norm, impl)


@pytest.mark.parametrize(
    "norm", [None, SMagNorm(), SMagNorm(domain="weight")], ids=["no gate", "output", "weight"]
)
@pytest.mark.parametrize("r", [1, 2, 15, 16, 17, 33, 64, 65, 128, 150, 256])
def test_ranks(r, norm, impl):
    c = case(66, 260, 257, r, torch.float32, decay=False, device=DEVICE)
    with torch.no_grad():
        c.core.mul_(0.3 / r)
    compare(c, norm, impl)


@pytest.mark.parametrize("r", [1, 15, 64, 65, 150, 256])
def test_ranks_behind_a_task_gate(r, impl):
    c = case(66, 260, 257, r, torch.float32, decay=False, task_gate=True, device=DEVICE)
    with torch.no_grad():
        c.core.mul_(0.3 / r)
    compare(c, None, impl)


def test_a_task_gate_that_is_shut_or_open(impl):
    """To the bit: logits of 1,000 either way."""
    c = case(70, 40, 33, 4, torch.float32, tied=False, adapter_bias=False, device=DEVICE)
    opened = c.ours(None, impl=impl)
    dy = torch.randn_like(opened)
    free = torch.autograd.grad(opened, c.trained(), dy)
    for logit, expected in ((1e3, opened), (-1e3, F.linear(c.x, c.W, c.bias))):
        c.task_gate = torch.tensor([[0.0, logit / 4]] * 4, device=DEVICE)
        y = c.ours(None, impl=impl)
        dx, dcore = torch.autograd.grad(y, c.trained(), dy)
        assert torch.equal(y, expected)
        assert torch.equal(dcore, free[1] if logit > 0 else torch.zeros_like(dcore))
        torch.testing.assert_close(dx, free[0] if logit > 0 else dy @ c.W)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    M=st.integers(0, 90),
    N=st.integers(1, 90),
    K=st.integers(1, 90),
    data=st.data(),
    norm=st.sampled_from(list(NORMS.values())),
    tied=st.booleans(),
    biases=st.booleans(),
    decay=st.booleans(),
    task_gate=st.booleans(),
    strides=st.sampled_from(["contiguous", "sliced", "transposed"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_stride_and_dtype(
    impl, M, N, K, data, norm, tied, biases, decay, task_gate, strides, dtype, seed
):
    torch.manual_seed(seed)
    assume(impl == "reference" or norm is None or norm.detach_gate)
    if norm is not None and (not norm.continuous or not norm.detach_gate):
        dtype = torch.float32  # low precision costs a jump, or divides by a rounded base
    r = data.draw(st.integers(1, min(N, K)), label="r")
    has = dict(bias=biases, adapter_bias=biases, decay=decay, task_gate=task_gate and norm is None)
    c = case(M, N, K, r, dtype, tied=tied, device=DEVICE, **has)
    with torch.no_grad():
        c.core.mul_(0.5 / r)
    dy = torch.randn(M, N, device=DEVICE).to(dtype)
    if strides == "sliced":
        c.x = torch.randn(2 * M, K + 3, device=DEVICE).to(dtype)[::2, 1 : K + 1].requires_grad_()
        dy = torch.randn(M, 2 * N + 1, device=DEVICE).to(dtype)[:, 1::2]
    if strides == "transposed":
        c.x = torch.randn(K, M, device=DEVICE).to(dtype).T.requires_grad_()
        c.W = (torch.randn(K, N, device=DEVICE) / K**0.5).to(dtype).T
        dy = torch.randn(N, M, device=DEVICE).to(dtype).T
        for name in ("bias", "adapter_bias", "decay", "cols", "rows", "task_gate"):
            vector = getattr(c, name)
            if vector is not None:
                apart = torch.stack([vector.detach(), torch.full_like(vector, 1000)], 1)[:, 0]
                setattr(c, name, apart.requires_grad_(vector.requires_grad))
    compare(c, norm, impl, dy)


@pytest.mark.parametrize("norm", **ALL_NORMS)
def test_an_untrained_layer_is_the_base(norm, impl):
    """A zero core: the output is F.linear's, to the bit where the product is the library's, and
    every gradient is finite."""
    for M in (40, 100):
        c = case(M, 64, 60, 4, torch.float32, decay=False, adapter_bias=False, device=DEVICE)
        with torch.no_grad():
            c.core.zero_()
        y = c.ours(norm, impl=impl)
        base = F.linear(c.x, c.W, c.bias)
        if norm is not None and norm.domain == "weight":
            torch.testing.assert_close(y, base)
        else:
            assert torch.equal(y, base)
        compare(c, norm, impl)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_nan_stays_in_its_token(norm, impl):
    # bfloat16 products of a CPU with AMX write it into the next row too (oneDNN 3.12): of the base
    # product in any backend, of all others in the reference.
    dtype = torch.float64 if impl == "reference" else torch.bfloat16
    c = case(M=70, N=40, K=33, r=4, dtype=dtype, decay=False, device=DEVICE)
    if norm is None:
        c.task_gate = torch.randn(4, 2, device=DEVICE)
    with torch.no_grad():
        c.x[2, 3] = torch.nan
    y = c.ours(norm, impl=impl)
    others = ~F.linear(c.x, c.W).isnan().any(1)
    assert y[2].isnan().all() and not others[2] and not y[others].isnan().any()


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_zero_base_or_change_gives_no_nan(norm, impl):
    c = case(M=6, dtype=torch.float32, decay=False, device=DEVICE)
    with torch.no_grad():
        c.x[1] = 0
        c.W[3] = 0
        c.bias.zero_()
        c.adapter_bias.zero_()
    y = c.ours(norm, impl=impl)
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), c.trained()))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_more_than_one_block_of_rows(norm, monkeypatch):
    """The reference, in float64."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 100)
    assert len(list(blocks.row_blocks(23, 30))) > 5
    check_derivatives(case(M=23, N=30, K=20, r=5), norm)


@pytest.mark.parametrize("N", [40, 600])
@pytest.mark.parametrize("norm", [None, SMagNorm()], ids=["no gate", "gate"])
def test_duplicates_among_indices(norm, N, impl):
    c = case(70, N, 33, 24, torch.float32, device=DEVICE)
    c.rows = torch.tensor([5] * 3 + [7] * 20 + [39], device=DEVICE)
    c.cols = torch.tensor([5] * 3 + [7] * 20 + [32], device=DEVICE)
    compare(c, norm, impl)


@pytest.mark.parametrize(
    "norm",
    [None, SMagNorm(), SMagNorm(ref="max"), SMagNorm(domain="weight")],
    ids=["no gate", "output", "max", "weight"],
)
def test_importance_count(norm, impl):
    from secura_kernels.functional.linear import cur_linear_and_moved

    c = case(70, 40, 33, 4, torch.float32, decay=False, device=DEVICE)
    counts = [
        cur_linear_and_moved(c.x, c.operands(norm), impl, 1.2)[1] for impl in (impl, "reference")
    ]
    assert torch.equal(*counts)


# Where each backend starts its gate's backward pass, and what it is to write: g, v, parts of the
# adapter bias's gradient.
STARTS = {
    "triton": (
        gate_backward,
        "_launch_gate_backward",
        lambda *arguments: arguments[-3:],
    ),
    "cuda": (
        passes,
        "call",
        lambda name, *a: (a[-5], a[-4], a[-2]) if name == "gate_backward" else None,
    ),
}


@KERNELS
def test_needs_input_grad(impl, monkeypatch):
    """Only what is asked for is computed: with x frozen, no (M, N) gradient is written."""
    layer = backend(impl, "linear", torch.empty(0, device=DEVICE), 4)
    c = case(40, 48, 33, 4, torch.float32, decay=False, device=DEVICE)
    for tensor in c.trained():
        tensor.requires_grad_(False)
    operands = c.operands(SMagNorm())
    y, t, saved, _ = layer.forward(c.x, operands, 0.0, True)
    arguments = (torch.randn_like(y), operands, t, saved)
    everything = layer.backward(*arguments, (True, True, True))
    module, name, written = STARTS[impl]
    start, found = getattr(module, name), []
    monkeypatch.setattr(
        module, name, lambda *a, **k: (found.append(written(*a, **k)), start(*a, **k))
    )
    for needs in ((False, True, False), (False, False, True), (True, False, False)):
        found.clear()
        part = layer.backward(*arguments, needs)
        ((g, v, bias_part),) = filter(None, found)
        assert (g is not None) == needs[0]
        assert (v is not None) == (needs[0] or needs[1])
        assert (bias_part is not None) == needs[2]
        for a, b, wanted in zip(part, everything, needs, strict=True):
            assert torch.equal(a, b) if wanted else a is None


def test_without_save_nothing_is_saved(impl):
    layer = backend(impl, "linear", torch.empty(0, device=DEVICE), 4)
    c = case(40, 48, 33, 4, torch.bfloat16, device=DEVICE)
    for norm in (SMagNorm(), None):
        with torch.no_grad():
            saved = layer.forward(c.x, c.operands(norm), 0.0, False)[2]
        assert saved.numel() == 0


def test_expanded_operands(impl):
    """Strides of 0: the gradient of a sum, one decay factor for every channel."""
    c = case(70, 48, 40, 4, torch.float32, device=DEVICE)
    c.decay = torch.tensor(0.9, device=DEVICE).expand(48)
    for norm in (None, SMagNorm(), SMagNorm(ref="max"), SMagNorm(domain="weight")):
        compare(c, norm, impl, torch.ones(1, 1, device=DEVICE).expand(70, 48))
        compare(c, norm, impl, torch.randn(48, device=DEVICE).expand(70, 48))
