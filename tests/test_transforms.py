"""torch.compile, torch.func, activation checkpointing and autocast: each equals eager."""

import pytest
import torch
from epilogue_cases import OUTPUT_NORMS, epilogue_case
from layer_cases import ALL_NORMS, case
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from secura_kernels import CURLoRALinear, ImportanceDecay, SECURALinear, SMagNorm
from secura_kernels.functional.epilogue import cur_batched
from secura_kernels.peft import SecuraConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*boxed.*")
GATED = dict(norm="calibrated")


def gradients(function, c, dy):
    y = function(c.x, c.core, c.adapter_bias)
    return y, *torch.autograd.grad(y, c.trained(), dy)


@pytest.mark.parametrize("norm", **ALL_NORMS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(norm, dynamic):
    c = case(dtype=torch.float32)
    dy = torch.randn(7, 12)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: c.ours(norm, *a), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
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
    compiled = torch.compile(
        lambda *a: c.ours(SMagNorm(), *a),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=keep, bw_compiler=keep),
    )
    gradients(compiled, c, torch.randn(7, 12))
    assert "cur_linear_fwd" in graphs[0] and "cur_linear_bwd" in graphs[1]
    assert "mm" not in graphs[1]


@pytest.mark.parametrize("kind", [CURLoRALinear, SECURALinear])
@pytest.mark.parametrize("basis", ["raw", "orthonormal"])
def test_compile_a_layer(kind, basis):
    settings = {} if kind is CURLoRALinear else GATED | dict(importance_decay=ImportanceDecay())
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
        *(t.detach() for t in c.trained())
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("norm", "task_gate"),
    [*((norm, False) for norm in ALL_NORMS["argvalues"]), (None, True)],
)
def test_vmap(norm, task_gate):
    c = case(task_gate=task_gate)
    xs, cores = torch.randn(3, *c.x.shape).double(), torch.randn(3, *c.core.shape).double()
    for x, core, dims in ((xs, c.core, (0, None)), (xs, cores, (0, 0)), (c.x, cores, (None, 0))):
        got = torch.vmap(lambda a, b: c.ours(norm, a, b), dims)(x, core)
        expected = torch.stack(
            [
                c.ours(norm, x if dims[0] is None else x[i], core if dims[1] is None else core[i])
                for i in range(3)
            ]
        )
        torch.testing.assert_close(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.vmap(lambda a: c.ours(norm, a))(xs), torch.stack([c.ours(norm, x) for x in xs])
        )


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


def of_layer(norm):
    """A layer's output of x, core and adapter bias; its arguments."""
    c = case()
    return lambda *a: c.ours(norm, *a), [t.detach() for t in c.trained()]


def of_update(norm):
    """The same of a base output that somebody else computed."""
    c = epilogue_case()
    return lambda *a: c.ours(norm, *a), [t.detach() for t in c.trained()]


def behind_a_task_gate(form):
    def of(norm):
        c = dict(layer=case, update=epilogue_case)[form](task_gate=True)
        return lambda *a: c.ours(norm, *a), [t.detach() for t in c.trained()]

    return of


FORWARD_MODE = (
    [(of_layer, norm) for norm in ALL_NORMS["argvalues"]]
    + [(of_update, norm) for norm in OUTPUT_NORMS.values()]
    + [(behind_a_task_gate(form), None) for form in ("layer", "update")]
)


@pytest.mark.parametrize("form, norm", FORWARD_MODE)
def test_forward_mode_equals_reverse_mode(form, norm):
    function, arguments = form(norm)
    every = tuple(range(len(arguments)))
    pairs = [
        (
            torch.func.jacfwd(function, every)(*arguments),
            torch.func.jacrev(function, every)(*arguments),
        )
    ]

    def scalar(*a):
        return function(*a).square().sum()

    for i in every:
        pairs.append(
            (
                torch.func.hessian(scalar, i)(*arguments),
                torch.func.jacrev(torch.func.jacrev(scalar, i), i)(*arguments),
            )
        )
    for got, expected in pairs:
        torch.testing.assert_close(got, expected)
    tangents = [torch.randn_like(a) for a in arguments]
    y, dy = torch.func.jvp(function, tuple(arguments), tuple(tangents))
    torch.testing.assert_close(y, function(*arguments))
    with torch.autograd.forward_ad.dual_level():
        duals = [
            torch.autograd.forward_ad.make_dual(a, b)
            for a, b in zip(arguments, tangents, strict=True)
        ]
        again = torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent
    torch.testing.assert_close(again, dy)


@pytest.mark.parametrize("norm", [None, SMagNorm(), SMagNorm(ref="max")])
def test_forward_mode_of_a_mixed_batch(norm):
    y0, t, C = (torch.randn(*shape).double() for shape in ((3, 5, 12), (3, 5, 4), (12, 4)))
    cores, adapter = torch.randn(2, 4, 4).double(), torch.tensor([1, -1, 0])

    def function(t, cores):
        return cur_batched(y0, t, cores, adapter, C, norm=norm)

    for i in (0, 1):
        torch.testing.assert_close(
            torch.func.jacfwd(function, i)(t, cores), torch.func.jacrev(function, i)(t, cores)
        )


def test_forward_mode_counts_nothing():
    """Of a layer, through its parameters; a training layer's count cannot be taken."""
    layer = SECURALinear.from_linear(
        nn.Linear(6, 5).double(), 2, **GATED, importance_decay=ImportanceDecay()
    )
    with torch.no_grad():
        layer.B.normal_()
    x = torch.randn(3, 6).double()
    with pytest.raises(RuntimeError, match=r"importance decay are not possible.*eval\(\) first"):
        torch.func.jacfwd(layer)(x)
    trained = {n: p.detach() for n, p in layer.eval().named_parameters() if p.requires_grad}

    def loss(values):
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    torch.testing.assert_close(
        torch.func.hessian(loss)(trained), torch.func.jacrev(torch.func.jacrev(loss))(trained)
    )
    assert not layer.importance.count.any()


@pytest.mark.parametrize("stage", [None, "stage_m1", "stage_m2"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind, settings", [(CURLoRALinear, {}), (SECURALinear, GATED)])
def test_export_of_a_layer_alone(kind, settings, stage, strict):
    """As the root module: torch numbers the buffers of that one as if none were None."""
    layer = kind.from_linear(nn.Linear(24, 20), 4, **settings)
    for _ in range(2 if stage else 1):
        with torch.no_grad():
            layer.core_parameter().normal_()
        if stage and layer.C is None:
            getattr(layer, stage)()
    x = torch.randn(3, 24)
    exported = torch.export.export(layer.eval(), (x,), strict=strict)
    assert torch.equal(exported.module()(x), layer(x))
    model = get_peft_model(
        nn.Sequential(nn.Linear(24, 20)),
        SecuraConfig(
            r=4,
            target_modules=["0"],
            variant="curlora" if kind is CURLoRALinear else "secura",
            **settings,
        ),
    )
    inner = model.base_model.model[0].eval()
    exported = torch.export.export(inner, (x,), strict=strict)
    assert torch.equal(exported.module()(x), inner(x))


def test_jit_script_is_refused_in_a_sentence():
    layer = SECURALinear.from_linear(nn.Linear(24, 20), 4, **GATED)
    model = get_peft_model(
        nn.Sequential(nn.Linear(24, 20)),
        SecuraConfig(r=4, target_modules=["0"], variant="secura", **GATED),
    )
    for module in (layer, nn.Sequential(layer), model.base_model.model):
        with pytest.raises(TypeError, match=r"torch.jit.script cannot compile .*torch.export"):
            torch.jit.script(module)


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
