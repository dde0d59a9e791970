"""What only a GPU shows: streams, sizes beyond 2^31, the choice of ``impl="auto"``, real layers."""

from dataclasses import replace

import pytest
import torch
from devices import KERNELS
from layer_cases import case, compare, relative_error

from secura_kernels import CURLoRALinear, SECURALinear, SMagNorm
from secura_kernels.backends import programs
from secura_kernels.backends.cuda import passes as cuda_passes
from secura_kernels.backends.triton import dispatch, tune_cache
from secura_kernels.ops import resolve
from secura_kernels.tools.replay import NotCaptured, Recorder, replayed_ms

pytestmark = pytest.mark.gpu
FORMS = dict(argnames="one_pass", argvalues=[True, False], ids=["one pass", "library"])


def take(one_pass: bool, monkeypatch) -> None:
    """Both backends take this form of a layer, whatever would be chosen."""
    monkeypatch.setattr(dispatch, "assumed_loss", lambda *_: -0.9 if one_pass else 9.0)
    monkeypatch.setattr(tune_cache, "choice", lambda *_: None)
    monkeypatch.setattr(cuda_passes, "one_pass", lambda *_: one_pass)
    programs.forget()


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    programs.forget()  # what ``take`` has forced


def test_auto_is_triton():
    assert resolve("auto", torch.device("cuda"), torch.bfloat16, 64) == "triton"


@KERNELS
@pytest.mark.parametrize(
    "norm", [None, SMagNorm(), SMagNorm(domain="weight")], ids=["no gate", "output", "weight"]
)
@pytest.mark.parametrize(
    ("M", "N", "K", "r"), [(4096, 4096, 4096, 64), (4096, 1536, 8960, 150)], ids=["r 64", "r 150"]
)
@pytest.mark.parametrize(**FORMS)
def test_a_real_layer(M, N, K, r, norm, one_pass, impl, monkeypatch):
    """The truth in float64 on the GPU."""
    take(one_pass, monkeypatch)
    c = case(M, N, K, r, torch.bfloat16, bias=False, adapter_bias=False, decay=False, device="cuda")
    with torch.no_grad():
        c.core.mul_(0.3 / r)
    dy = torch.randn(M, N, device="cuda").bfloat16()

    def results(y, leaves):
        return y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))

    ours = results(c.ours(norm, impl=impl), c.trained())
    for a, e, t in zip(
        ours, results(*c.eager(norm)), results(*c.eager(norm, torch.float64)), strict=True
    ):
        assert relative_error(a, t) <= relative_error(e, t) * 1.02 + 1e-6
    again = results(c.ours(norm, impl=impl), c.trained())
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@KERNELS
@pytest.mark.parametrize(**FORMS)
def test_a_task_gate_of_a_real_layer(one_pass, impl, monkeypatch):
    take(one_pass, monkeypatch)
    shape = dict(M=4096, N=4096, K=4096, r=64, dtype=torch.bfloat16, device="cuda")
    c = case(**shape, tied=False, bias=False, adapter_bias=False, decay=False, task_gate=True)
    with torch.no_grad():
        c.core.mul_(0.3 / 64)
    compare(c, None, impl)


@pytest.mark.parametrize(
    "norm",
    [None, SMagNorm(), SMagNorm(ref="max"), SMagNorm(domain="weight")],
    ids=["no gate", "output", "max", "weight"],
)
def test_a_call_by_heart_computes_on_its_own_operands(norm, monkeypatch):
    """What was recorded on one layer is repeated on others, forwards and backwards."""
    recorded = []
    record = programs._recorded
    monkeypatch.setattr(
        programs, "_recorded", lambda *a: recorded.append(record(*a)) or recorded[-1]
    )
    for seed in range(3):
        torch.manual_seed(seed)
        c = case(300, 264, 136, 24, torch.bfloat16, device="cuda", task_gate=norm is None)
        with torch.no_grad():
            c.core.mul_(0.01)
        compare(c, norm, "triton")
    assert len(recorded) == 2 and all(program is not None for _, program in recorded)


@KERNELS
@pytest.mark.parametrize("norm", [SMagNorm(), SMagNorm(domain="weight")], ids=["output", "weight"])
def test_two_streams(norm, impl):
    """Layers that run at the same time share no scratch."""
    cases = [case(512, 1024, 1024, 16, torch.bfloat16, bias=False, device="cuda") for _ in range(2)]
    expected = [c.ours(norm, impl=impl) for c in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(20):
        found = []
        for c, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(c.ours(norm, impl=impl))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@KERNELS
@pytest.mark.parametrize(**FORMS)
def test_more_elements_than_32_bits_count(one_pass, impl, monkeypatch):
    take(one_pass, monkeypatch)
    M, N, K, r = 2**19 + 3, 4104, 64, 8
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of GPU memory")
    c = case(M, N, K, r, torch.bfloat16, bias=False, adapter_bias=False, decay=False, device="cuda")
    y = c.ours(SMagNorm(), impl=impl)
    dx, dcore = torch.autograd.grad(y, [c.x, c.core], y.detach())
    last = slice(M - 300, M)
    tail = replace(c, x=c.x.detach()[last].clone().requires_grad_())
    z = tail.ours(SMagNorm(), impl=impl)
    # Sums in another order, rounded: one row off would be an error of 1.
    assert relative_error(y[last], z) < 2**-8
    assert relative_error(dx[last], torch.autograd.grad(z, tail.x, z.detach())[0]) < 2**-7
    assert dcore.isfinite().all()


@KERNELS
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "norm", [None, SMagNorm(), SMagNorm(domain="weight")], ids=["no gate", "output", "weight"]
)
def test_the_device_of_the_tensors_counts(norm, impl):
    """Not the current one."""
    c = case(130, 136, 72, 9, torch.bfloat16, device="cuda:1")
    dy = torch.randn(130, 136).to("cuda:1", torch.bfloat16)

    def results(current: int):
        with torch.cuda.device(current):
            y = c.ours(norm, impl=impl)
            found = y.detach(), *torch.autograd.grad(y, c.trained(), dy)
            torch.cuda.synchronize("cuda:1")
        return found

    assert all(torch.equal(a, b) for a, b in zip(results(0), results(1), strict=True))


@KERNELS
def test_a_cuda_graph_replays_a_training_step(impl):
    layer = SECURALinear.from_linear(
        torch.nn.Linear(256, 256, device="cuda").bfloat16(), 16, m=32, norm="calibrated", impl=impl
    )
    x = torch.randn(128, 256, device="cuda").bfloat16()

    def step():
        layer.zero_grad(set_to_none=False)
        layer(x).square().mean().backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    expected = [p.grad.clone() for p in layer.parameters() if p.requires_grad]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
    found = [p.grad for p in layer.parameters() if p.requires_grad]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_layers_graphed_by_pytorch_train_as_without():
    """``make_graphed_callables``, as docs/speed.md shows it."""
    layers, samples, x = [], [], torch.randn(128, 256, device="cuda").bfloat16()
    for _ in range(2):
        linear = torch.nn.Linear(256, 256, device="cuda").bfloat16()
        layers.append(CURLoRALinear.from_linear(linear, 16))
        torch.nn.init.normal_(layers[-1].core_parameter(), std=0.1)
        samples.append((torch.randn_like(x).requires_grad_(),))

    def results(layers):
        first = y = x.clone().requires_grad_()
        for layer in layers:
            y = layer(y)
        trained = [layer.core_parameter() for layer in layers]
        return y.detach(), *torch.autograd.grad(y.float().square().mean(), [first, *trained])

    expected = results(layers)
    for a, b in zip(
        results(torch.cuda.make_graphed_callables(tuple(layers), tuple(samples))),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_compiled_into_graphs_it_trains_as_without():
    """``torch.compile(mode="reduce-overhead", fullgraph=True)``, as docs/speed.md shows it."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU()).cuda().bfloat16()
    model[0] = layer = CURLoRALinear.from_linear(model[0], r=16)
    torch.nn.init.normal_(layer.core_parameter(), std=0.1)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # the first runs compile and capture
        x = torch.randn(128, 256, device="cuda").bfloat16()
        found = []
        for form in (compiled, model):
            layer.zero_grad()
            y = form(x)
            y.float().square().mean().backward()
            found.append((y.detach().clone(), layer.core_parameter().grad.clone()))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


def test_a_replay_is_timed_and_what_synchronises_is_left_out():
    x, calls = torch.ones(2**22, device="cuda"), []

    def add():
        calls.append(x.add_(1))

    recorder = Recorder()
    replay, _ = recorder.capture(add)
    before, host = x[0].item(), len(calls)
    replay()
    assert x[0].item() == before + 1 and len(calls) == host
    with pytest.raises(NotCaptured):
        recorder.capture(lambda: x.sum().item())
    replay, total = recorder.capture(lambda: x.sum())
    replay()
    assert total.item() == pytest.approx(x.double().sum().item(), rel=1e-6)
    assert 0 < replayed_ms(add) < 1000
