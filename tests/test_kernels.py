"""The Triton and the CUDA kernels against float64 and the reference: every form, shape, stride and
dtype. Without a GPU: in Triton's interpreter, and on a simulated GPU (``cuda_host``)."""

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICE, MARKS, poisoned_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_cases import (
    ALL_NORMS,
    case,
    check_no_more_than_eager,
    compare,
    skip_where_low_precision_jumps,
    small_change,
)
from layer_cases import PRECISION_NORMS as NORMS

from secura_kernels import SMagNorm
from secura_kernels.backends.cuda import passes
from secura_kernels.backends.triton import chips, dispatch, plan
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
@pytest.mark.parametrize("name", NORMS)
def test_error_is_no_more_than_eager(name, dtype, impl):
    skip_where_low_precision_jumps(NORMS[name], dtype)
    check_no_more_than_eager(
        [
            small_change(*shape, dtype=dtype, tied=tied, biases=biases, device=DEVICE)
            for shape in SHAPES.values()
            for tied, biases in ((True, True), (True, False), (False, False))
        ],
        NORMS[name],
        impl,
    )


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
    strides=st.sampled_from(["contiguous", "sliced", "transposed"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_stride_and_dtype(
    impl, M, N, K, data, norm, tied, biases, decay, strides, dtype, seed
):
    torch.manual_seed(seed)
    if norm is not None and (not norm.continuous or not norm.detach_gate):
        dtype = torch.float32  # low precision costs a jump, or divides by a rounded base
    r = data.draw(st.integers(1, min(N, K)), label="r")
    c = case(
        M, N, K, r, dtype, tied=tied, bias=biases, adapter_bias=biases, decay=decay, device=DEVICE
    )
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
        for name in ("bias", "adapter_bias", "decay", "cols", "rows"):
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
    c = case(M=70, N=40, K=33, r=4, dtype=torch.bfloat16, decay=False, device=DEVICE)
    with torch.no_grad():
        c.x[2, 3] = torch.nan
    y = c.ours(norm, impl=impl)
    # The bfloat16 product of a CPU with AMX writes it into the next row too (oneDNN 3.12).
    others = ~F.linear(c.x, c.W).isnan().any(1)
    assert y[2].isnan().all() and not others[2] and not y[others].isnan().any()


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
        lambda *_, g=None, v=None, sums=None, **__: (g, v, sums),
    ),
    "cuda": (
        passes,
        "call",
        lambda name, *a: (a[-6], a[-5], a[-3]) if name == "gate_backward" else None,
    ),
}


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
    for norm in (SMagNorm(), SMagNorm(detach_gate=False), None):
        with torch.no_grad():
            saved = layer.forward(c.x, c.operands(norm), 0.0, False)[2]
        assert saved.numel() == 0


def test_expanded_operands(impl):
    """Strides of 0: the gradient of a sum, one decay factor for every channel."""
    c = case(70, 48, 40, 4, torch.float32, device=DEVICE)
    c.decay = torch.tensor(0.9, device=DEVICE).expand(48)
    for norm in NORMS.values():
        compare(c, norm, impl, torch.ones(1, 1, device=DEVICE).expand(70, 48))
        compare(c, norm, impl, torch.randn(48, device=DEVICE).expand(70, 48))


def test_a_long_stride_is_copied():
    from secura_kernels.backends.triton.launch import LARGEST_STRIDE, addressable

    x = torch.randn(6, 4, device=DEVICE)
    assert addressable(x) is x
    far = torch.empty(2 * LARGEST_STRIDE + 4, device=DEVICE).as_strided((2, 4), (LARGEST_STRIDE, 1))
    assert addressable(far).is_contiguous()


def test_plans_and_their_reasons():
    device, bf16 = torch.device(DEVICE), torch.bfloat16
    with chips.pretend(90):

        def reason(M=8192, N=4096, K=4096, norm=None, dtype=bf16, **more):
            found = plan(M, N, K, 64, dtype, torch.device("meta"), norm, **more)
            assert found.one_pass == found.reason.startswith("one pass")
            return found.reason

        assert reason(input_gradient=True) == (
            "one pass: 376 us against 393 by the library's product and an epilogue (predicted)"
        )
        assert reason() == "library product: 398 us against 421 in one pass (predicted)"
        # A bias: t costs a reading of x in either form, so one pass loses nothing by it.
        assert reason(needs_down=True).startswith("one pass: 376 us against 393")
        assert reason(norm=SMagNorm(), needs_down=True) == (
            "library product: 404 us against 484 in one pass (predicted)"
        )
        assert "ref='max' needs the largest" in reason(norm=SMagNorm(ref="max"))
        assert reason(M=dispatch.MOST_TOKENS).startswith("library product: for M <= 64")
        assert reason(M=256, N=512).startswith("library product: fewer tiles than the 132")
        assert reason(K=16384).startswith("library product: ")
        assert reason(dtype=torch.float32).startswith("library product: float32")
        odd = torch.empty(16, 4095, dtype=bf16)
        assert reason(input_gradient=True, operands=(odd, odd)).startswith(
            "library product: rows are not on 16-byte boundaries"
        )
    assert plan(100, 200, 64, 4, bf16, device, None).reason


def test_a_newer_chip_takes_the_rows_of_the_nearest_lower_one(monkeypatch):
    device, found = torch.device("cuda", 5), {}
    for capability in ((7, 5), (8, 6), (10, 3), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        found[capability] = chips._chip_of_gpu.__wrapped__(device)
    assert found == {(7, 5): None, (8, 6): 89, (10, 3): 100, (9, 0): 90}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (13, 0))
    with pytest.warns(UserWarning, match="capability 13.0, for which no tiles are shipped: those"):
        assert chips._chip_of_gpu.__wrapped__(device) == 120


def test_why_unavailable():
    from secura_kernels import cur_linear

    c = case(4, 400, 300, 4, torch.float64, bias=False, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run here.*float64.*'reference'"):
        c.ours(None, impl="triton")
    wide = case(4, 400, 300, 257, torch.float32, bias=False, device=DEVICE)
    with pytest.raises(RuntimeError, match="rank is 257; the Triton kernels hold up to 256"):
        cur_linear(wide.x, wide.W, wide.core, cols=wide.cols, rows=wide.rows, impl="triton")
