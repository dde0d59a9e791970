"""What only a GPU shows: streams, sizes beyond 2^31, the choice of ``impl="auto"``, real layers."""

from dataclasses import replace

import pytest
import torch
from forms import case, relative_error

from secura_kernels import SECURALinear, SMagNorm
from secura_kernels.kernels import dispatch, tuned
from secura_kernels.ops import resolve

pytestmark = pytest.mark.gpu


def test_auto_is_triton():
    assert resolve("auto", torch.device("cuda"), torch.bfloat16, 64) == "triton"


@pytest.mark.parametrize("norm", [None, SMagNorm(), SMagNorm(domain="weight")],
                         ids=["no gate", "output", "weight"])
@pytest.mark.parametrize(("M", "N", "K", "r"), [(4096, 4096, 4096, 64), (4096, 1536, 8960, 150)],
                         ids=["r 64", "r 150"])
@pytest.mark.parametrize("loss", [-0.9, 9.0], ids=["one pass", "library"])
def test_a_real_layer(M, N, K, r, norm, loss, monkeypatch):
    """Both forms of a layer, whatever would be chosen; the truth in float64 on the GPU."""
    monkeypatch.setattr(dispatch, "ASSUMED_LOSS", loss)
    monkeypatch.setattr(tuned, "choice", lambda *_: None)
    c = case(M, N, K, r, torch.bfloat16, bias=False, adapter_bias=False, decay=False, device="cuda")
    with torch.no_grad():
        c.core.mul_(0.3 / r)
    dy = torch.randn(M, N, device="cuda").bfloat16()

    def results(y, leaves):
        return y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))

    ours = results(c.ours(norm, impl="triton"), c.trained())
    for a, e, t in zip(ours, results(*c.eager(norm)), results(*c.eager(norm, torch.float64)),
                       strict=True):
        assert relative_error(a, t) <= relative_error(e, t) * 1.02 + 1e-6
    again = results(c.ours(norm, impl="triton"), c.trained())
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_two_streams():
    """Layers that run at the same time share no scratch."""
    norm = SMagNorm(domain="weight")
    cases = [case(512, 1024, 1024, 16, torch.bfloat16, bias=False, device="cuda") for _ in range(2)]
    expected = [c.ours(norm, impl="triton") for c in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(20):
        found = []
        for c, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(c.ours(norm, impl="triton"))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_more_elements_than_32_bits_count():
    M, N, K, r = 2**19 + 3, 4104, 64, 8
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of GPU memory")
    c = case(M, N, K, r, torch.bfloat16, bias=False, adapter_bias=False, decay=False, device="cuda")
    y = c.ours(SMagNorm(), impl="triton")
    dx, dcore = torch.autograd.grad(y, [c.x, c.core], y.detach())
    last = slice(M - 300, M)
    tail = replace(c, x=c.x.detach()[last].clone().requires_grad_())
    z = tail.ours(SMagNorm(), impl="triton")
    torch.testing.assert_close(y[last], z, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dx[last], torch.autograd.grad(z, tail.x, z.detach())[0],
                               rtol=2e-2, atol=2e-2)
    assert dcore.isfinite().all()


def test_a_cuda_graph_replays_a_training_step():
    layer = SECURALinear.from_linear(torch.nn.Linear(256, 256, device="cuda").bfloat16(), 16, m=32)
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
