"""torch.compile, torch.func, activation checkpointing and autocast: each equals eager."""

import pytest
import torch
from forms import ALL_NORMS, case
from torch import nn
from torch.utils.checkpoint import checkpoint

from secura_kernels import CURLoRALinear, ImportanceDecay, SECURALinear, SMagNorm

pytestmark = pytest.mark.filterwarnings("ignore:.*boxed.*")


def gradients(function, c, dy):
    y = function(c.x, c.core, c.adapter_bias)
    return y, *torch.autograd.grad(y, c.trained(), dy)


@pytest.mark.parametrize("norm", **ALL_NORMS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(norm, dynamic):
    c = case(dtype=torch.float32)
    dy = torch.randn(7, 12)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: c.ours(norm, *a), fullgraph=True, dynamic=dynamic,
                             backend="aot_eager")
    eager = gradients(lambda *a: c.ours(norm, *a), c, dy)
    for a, b in zip(gradients(compiled, c, dy), eager, strict=True):
        assert torch.equal(a, b)


def test_compiled_backward_is_one_op():
    """No product with a gradient of zeros for what was only saved."""
    c = case(dtype=torch.float32)
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.code))
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: c.ours(SMagNorm(), *a), fullgraph=True,
                             backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    gradients(compiled, c, torch.randn(7, 12))
    assert "cur_linear_fwd" in graphs[0] and "cur_linear_bwd" in graphs[1]
    assert "mm" not in graphs[1]


@pytest.mark.parametrize("kind", [CURLoRALinear, SECURALinear])
@pytest.mark.parametrize("basis", ["raw", "orthonormal"])
def test_compile_a_layer(kind, basis):
    settings = {} if kind is CURLoRALinear else dict(importance_decay=ImportanceDecay())
    layer = kind.from_linear(nn.Linear(24, 20), 4, basis=basis, **settings)
    with torch.no_grad():
        layer.core_parameter().normal_()
    x = torch.randn(2, 5, 24)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    if kind is SECURALinear:
        assert layer.importance.count[1] == 2 * 2 * 5 * 20


@pytest.mark.parametrize("norm", **ALL_NORMS)
def test_func_grad(norm):
    c = case()
    dy = torch.randn(7, 12, dtype=torch.float64)
    expected = gradients(lambda *a: c.ours(norm, *a), c, dy)[1:]
    got = torch.func.grad(lambda *a: (c.ours(norm, *a) * dy).sum(), argnums=(0, 1, 2))(
        *(t.detach() for t in c.trained()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm", **ALL_NORMS)
def test_vmap(norm):
    c = case()
    xs, cores = torch.randn(3, *c.x.shape).double(), torch.randn(3, *c.core.shape).double()
    for x, core, dims in ((xs, c.core, (0, None)), (xs, cores, (0, 0)), (c.x, cores, (None, 0))):
        got = torch.vmap(lambda a, b: c.ours(norm, a, b), dims)(x, core)
        expected = torch.stack([
            c.ours(norm, x if dims[0] is None else x[i], core if dims[1] is None else core[i])
            for i in range(3)])
        torch.testing.assert_close(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(lambda a: c.ours(norm, a))(xs),
                                   torch.stack([c.ours(norm, x) for x in xs]))


@pytest.mark.parametrize("norm", **ALL_NORMS)
def test_per_sample_gradients(norm):
    c = case()
    xs = torch.randn(3, *c.x.shape).double()

    def loss(core, x):
        return c.ours(norm, x, core).square().sum()

    got = torch.vmap(torch.func.grad(loss), (None, 0))(c.core.detach(), xs)
    for x, gradient in zip(xs, got, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(c.core, x), c.core)[0])


@pytest.mark.parametrize("norm", **ALL_NORMS)
def test_batched_gradients(norm):
    c = case()
    y = c.ours(norm)
    many = torch.randn(3, *y.shape).double()
    got = torch.autograd.grad(y, c.trained(), many, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(many):
        one = torch.autograd.grad(y, c.trained(), dy, retain_graph=True)
        for a, b in zip(got, one, strict=True):
            torch.testing.assert_close(a[i], b)


def test_forward_mode_is_refused_rather_than_wrong():
    c = case()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: c.ours(None, x), (c.x.detach(),), (c.x.detach(),))


@pytest.mark.parametrize("norm", **ALL_NORMS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(norm, reentrant):
    c = case()
    dy = torch.randn(7, 12, dtype=torch.float64)
    c.x.grad = c.core.grad = c.adapter_bias.grad = None
    y = checkpoint(lambda *a: c.ours(norm, *a), *c.trained(), use_reentrant=reentrant)
    y.backward(dy)
    expected = gradients(lambda *a: c.ours(norm, *a), c, dy)
    assert torch.equal(y, expected[0])
    for leaf, b in zip(c.trained(), expected[1:], strict=True):
        assert torch.equal(leaf.grad, b)


@pytest.mark.parametrize("norm", **ALL_NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_equals_casting_by_hand(norm, dtype, backward_inside):
    c = case(dtype=torch.float32)
    dy = torch.randn(7, 12).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        y = c.ours(norm)
        if backward_inside:
            got = torch.autograd.grad(y, c.trained(), dy)
    assert y.dtype == dtype
    if not backward_inside:
        got = torch.autograd.grad(y, c.trained(), dy)
    assert [g.dtype for g in got] == [torch.float32] * 3
    by_hand = case(dtype=torch.float32)
    by_hand.__dict__.update(c.__dict__)
    by_hand.x = c.x.detach().to(dtype).requires_grad_()
    by_hand.W, by_hand.bias = c.W.to(dtype), c.bias.to(dtype)
    z, *expected = gradients(lambda *a: by_hand.ours(norm, *a), by_hand, dy)
    assert torch.equal(y, z)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b.float())


def test_autocast_compiled_equals_eager():
    c = case(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: c.ours(SMagNorm(), *a), fullgraph=True, backend="aot_eager")
    dy = torch.randn(7, 12).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [gradients(f, c, dy) for f in (compiled, lambda *a: c.ours(SMagNorm(), *a))]
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
