"""The backward pass of ``cur_batched``: an adapter's gradients are those of its own rows alone."""

import math

import pytest
import torch
from batched_cases import ADAPTERS, Batch, batch, by_token
from devices import DEVICE, GPU, MARKS, poisoned_memory
from layer_cases import (
    check_derivatives,
    check_no_more_than_eager,
    compare,
    relative_error,
    skip_where_low_precision_jumps,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from secura_kernels import SMagNorm
from secura_kernels.backends.reference import batched as reference
from secura_kernels.backends.reference import by_adapter
from secura_kernels.backends.reference.gate import decode, encode, inverse_gate, relative_magnitude
from secura_kernels.functional.epilogue import cur_batched
from secura_kernels.ops import pack_norm
from secura_kernels.ops.batched import cur_batched_bwd, cur_batched_fwd
from secura_kernels.ops.registry import backend

pytestmark = MARKS

FORMS = {
    "no gate": None,
    "gate": SMagNorm(),
    "max": SMagNorm(ref="max"),
    "full": SMagNorm(detach_gate=False),
    "full max": SMagNorm(ref="max", detach_gate=False),
}
ALL = dict(argvalues=list(FORMS.values()), ids=list(FORMS))
BY_TOKEN = {name: norm for name, norm in FORMS.items() if norm is None or norm.ref != "max"}


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_memory():
        yield


def cases(norm, dtype) -> list[Batch]:
    """By sample and, where that has a meaning, by token: ragged, the published rank, few rows."""
    found = [batch(20, 90, 7, dtype)]
    if norm is not None and norm.ref == "max":
        # Of one token the maximum is one of 60 elements, and its rounding is the whole error.
        found += [batch(12, 60, 150, dtype)]
    else:
        found += [batch(1, 60, 150, dtype), batch(40, 96, 16, dtype, adapters=by_token())]
    return [c.training() for c in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "norm", [*FORMS.values(), SMagNorm.preset("published")], ids=[*FORMS, "published"]
)
def test_error_is_no_more_than_eager_single_runs(norm, dtype, impl):
    skip_where_low_precision_jumps(norm, dtype)
    some = [c for _ in range(2) for c in cases(norm, dtype)]
    beside = {}
    if dtype == torch.bfloat16 and norm is not None and norm.detach_gate:
        beside["dy0"] = error_of_the_code(some, norm)
    check_no_more_than_eager(some, norm, impl, beside)


def error_of_the_code(some: list[Batch], norm: SMagNorm) -> float:
    """Of s in 8 bits, as in test_epilogue.py: in dy0 = beta s dy there is no sum to drown it."""
    errors = []
    for c in some:
        y0, change = c.y0.detach().double(), c.eager(None, torch.float64)[0].detach()
        change -= y0
        largest = relative_magnitude(y0, change, norm.eps).amax(tuple(range(1, y0.ndim)), True)
        s = inverse_gate(y0, change, norm, largest)
        back = decode(encode(s.float(), norm, torch.bfloat16), norm, torch.float32)
        errors.append(relative_error(back, s) ** 2)
    return math.sqrt(sum(errors) / len(errors))


@pytest.mark.parametrize("norm", **ALL)
def test_every_form(norm, impl):
    for c in cases(norm, torch.float32):
        compare(c, norm, impl)


@pytest.mark.parametrize("norm", **ALL)
def test_layouts_of_operands_and_gradients(norm, impl):
    c = batch(7, 45, 5)
    c.y0 = c.y0.transpose(0, 2).contiguous().transpose(0, 2)
    c.t = torch.stack([c.t, c.t * math.nan], 3)[..., 0]
    c.cores = c.cores.mT.contiguous().mT
    c.C = c.C.T.contiguous().T
    c.adapter_bias = torch.stack([c.adapter_bias] * 2, 2)[..., 0]
    c.training()
    transposed = torch.randn(45, 7, 8, device=DEVICE).permute(2, 1, 0)
    for dy in (transposed, torch.ones(1, 1, 1, device=DEVICE).expand(8, 7, 45)):
        compare(c, norm, impl, dy)


@pytest.mark.parametrize("norm", **ALL)
@pytest.mark.parametrize("tokens", [False, True])
def test_equals_the_eager_formula_and_its_derivatives(norm, tokens):
    if tokens and norm is not None and norm.ref == "max":
        pytest.skip("refused")
    ids = by_token() if tokens else ADAPTERS
    check_derivatives(
        batch(40 if tokens else 5, 12, 4, torch.float64, adapters=ids).training(), norm
    )


@pytest.mark.parametrize(
    "norm", [None, FORMS["full"], FORMS["full max"]], ids=["no gate", "full", "full max"]
)
def test_gradcheck(norm):
    c = batch(2, 4, 2, torch.float64, adapters=[1, -1, 4, 1]).training()
    assert gradcheck(lambda *a: c.ours(norm, *a), c.trained())
    assert gradgradcheck(lambda *a: c.ours(norm, *a), c.trained())


@pytest.mark.parametrize("norm", BY_TOKEN.values(), ids=BY_TOKEN)
def test_an_adapters_gradient_is_of_its_own_rows(norm, impl):
    """Alone, with its rows in one sample; and none for an adapter without rows."""
    dtype = torch.float64 if impl == "reference" else torch.float32
    c = batch(40, 70, 9, dtype, adapters=by_token()).training()
    dy = torch.randn_like(c.y0)
    whole = dict(
        zip(
            c.quantities[1:],
            torch.autograd.grad(c.ours(norm, impl=impl), c.trained(), dy),
            strict=True,
        )
    )
    for k in range(5):
        rows = c.adapter == k
        bias = c.adapter_bias[k].detach()[None]
        alone = Batch(
            c.y0.detach()[rows][None],
            c.t.detach()[rows][None],
            c.cores.detach()[k][None],
            c.C,
            bias,
            torch.zeros(1, dtype=torch.int64, device=DEVICE),
        ).training()
        if not rows.any():
            assert not whole["dcores"][k].any() and not whole["dadapter_bias"][k].any()
            continue
        dy0, dt, dcore, dbias = torch.autograd.grad(
            alone.ours(norm, impl=impl), alone.trained(), dy[rows][None]
        )
        for got, expected in (
            (whole["dy0"][rows], dy0[0]),
            (whole["dt"][rows], dt[0]),
            (whole["dcores"][k], dcore[0]),
            (whole["dadapter_bias"][k], dbias[0]),
        ):
            torch.testing.assert_close(got, expected)
    none = c.adapter < 0
    assert not whole["dt"][none].any()
    torch.testing.assert_close(whole["dy0"][none], dy[none])


@pytest.mark.parametrize("norm", [FORMS["no gate"], FORMS["gate"]], ids=["no gate", "gate"])
@pytest.mark.parametrize(
    "ids",
    [[4] * 5, [4, 3, 2, 1, 0], [-1, 2, -1, 2, -1]],
    ids=["one", "falling", "between"],
)
def test_chunks_of_any_adapters(ids, norm, impl):
    """Where chunks of rows end within an adapter, and where both end at once."""
    for S in (64, 50):
        compare(batch(S, 40, 5, adapters=ids).training(), norm, impl)


@pytest.mark.parametrize("norm", **ALL)
def test_no_adapter_at_all(norm, impl):
    c = batch(adapters=[-1, -1]).training()
    dy = torch.randn_like(c.y0)
    dy0, *others = torch.autograd.grad(c.ours(norm, impl=impl), c.trained(), dy)
    torch.testing.assert_close(dy0, dy)
    assert not any(gradient.any() for gradient in others)


@pytest.mark.parametrize("norm", **ALL)
def test_rows_do_not_meet(norm, impl):
    """A NaN and a number out of range stay with their adapter."""
    c = batch().training()
    dy = torch.randn_like(c.y0)

    def results(y0, adapter):
        y = c.ours(norm, y0, c.t, c.cores, c.adapter_bias, impl=impl, adapter=adapter)
        return torch.autograd.grad(y, (c.t, c.cores, c.adapter_bias), dy)

    y0, adapter = c.y0.detach().clone().requires_grad_(), c.adapter.clone()
    dt, dcores, dbias = results(y0, adapter)
    with torch.no_grad():
        y0[4, 2, 1] = torch.nan  # of adapter 2
    adapter[3] = 99
    again = results(y0, adapter)
    for k in (0, 1, 3):
        assert torch.equal(again[1][k], dcores[k]) and torch.equal(again[2][k], dbias[k])
    for i in (0, 2, 5, 7):
        assert torch.equal(again[0][i], dt[i])


@pytest.mark.parametrize("norm", **ALL)
def test_no_rows(norm, impl):
    for B, S in ((0, 3), (8, 0)):
        c = batch(S, adapters=ADAPTERS[:B]).training() if B else batch(S)
        if not B:
            c.y0, c.t, c.adapter = c.y0[:0], c.t[:0], c.adapter[:0]
            c.training()
        found = torch.autograd.grad(c.ours(norm, impl=impl).sum(), c.trained())
        assert [g.shape for g in found] == [v.shape for v in c.trained()]
        assert not found[2].any() and not found[3].any()


@pytest.mark.parametrize("norm", **ALL)
def test_only_what_is_asked_for(norm, impl):
    c = batch().training()
    dy = torch.randn_like(c.y0)
    everything = torch.autograd.grad(c.ours(norm, impl=impl), c.trained(), dy)
    for i, tensor in enumerate(c.trained()):
        for other in c.trained():
            other.requires_grad_(other is tensor)
        found = torch.autograd.grad(c.ours(norm, impl=impl), tensor, dy)[0]
        assert torch.equal(found, everything[i])


@pytest.mark.parametrize(
    ("dtype", "gate_dtype"),
    [(torch.bfloat16, torch.uint8), (torch.float16, torch.int16), (torch.float32, torch.float32)],
)
def test_saves_t_and_the_gate(dtype, gate_dtype, impl):
    c = batch(3, 45, 5, dtype).training()

    def saved(norm, impl=impl):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            c.ours(norm, impl=impl)
        return [t for t in kept if t.shape[:1] == (24,)]

    assert {(t.shape, t.dtype) for t in saved(SMagNorm())} == {
        ((24, 5), dtype),
        ((24, 45), gate_dtype),
    }
    assert {t.shape for t in saved(None)} == {(24, 5)}
    assert any(t.data_ptr() == c.y0.data_ptr() for t in saved(FORMS["full"], "reference"))
    module = backend(impl if impl != "cuda" else "reference", "batched", c.y0, 5)
    with torch.no_grad():
        rows = c.y0.flatten(0, 1), c.t.flatten(0, 1), c.cores, c.adapter, c.C, c.adapter_bias
        assert module.forward(*rows, 0.7, SMagNorm(), False)[1].shape == (0,)


@pytest.mark.parametrize("norm", **ALL)
def test_opcheck(norm, impl):
    c = batch(3, dtype=torch.bfloat16)
    y0, t = c.y0.flatten(0, 1), c.t.flatten(0, 1)
    layer = (c.cores, c.adapter, c.C, c.adapter_bias)
    detach = norm is None or norm.detach_gate
    for save in (True, False):
        opcheck(cur_batched_fwd, (y0, t, *layer, 0.7, pack_norm(norm), detach, save, impl))
    saved = y0
    if detach:
        saved = cur_batched_fwd(y0, t, *layer, 0.7, pack_norm(norm), detach, True, impl)[1]
    gate = norm is not None  # without one no gradient of y0 is computed: it is dy
    transposed = torch.randn(45, 24, device=DEVICE).T.to(y0.dtype)
    for dy, needs in ((y0, [False, True, False, True]), (transposed, [gate, True, True, True])):
        settings = (0.7, pack_norm(norm), detach, needs, impl)
        opcheck(cur_batched_bwd, (dy, *layer, t, saved, *settings))


@pytest.mark.parametrize("norm", **ALL)
def test_compiles_as_one_graph(norm, impl):
    torch.compiler.reset()
    c = batch().training()
    dy = torch.randn_like(c.y0)
    compiled = torch.compile(
        lambda *a: c.ours(norm, *a, impl=impl, check_ids=True), fullgraph=True, backend="aot_eager"
    )
    results = [
        (y := f(*c.trained()), *torch.autograd.grad(y, c.trained(), dy))
        for f in (compiled, lambda *a: c.ours(norm, *a, impl=impl))
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_vmap_over_cores(impl):
    c, norm = batch(), SMagNorm()
    cores = torch.stack([c.cores, 2 * c.cores])
    got = torch.vmap(lambda each: c.ours(norm, impl=impl, cores=each))(cores)
    assert torch.equal(got, torch.stack([c.ours(norm, impl=impl, cores=each) for each in cores]))


@pytest.mark.parametrize("norm", **ALL)
def test_transforms(norm):
    """torch.func.grad over vmap, the other way round, and many gradients at once: as in loops."""
    c = batch(3, 12, 4, torch.float64).training()
    many = torch.stack([c.cores.detach(), 2 * c.cores.detach()])

    def total(cores):
        return torch.vmap(lambda each: c.ours(norm, cores=each))(cores).square().sum()

    leaf = many.clone().requires_grad_()
    loop = sum(c.ours(norm, cores=each).square().sum() for each in leaf)
    expected = torch.autograd.grad(loop, leaf)[0]
    torch.testing.assert_close(torch.func.grad(total)(many), expected)
    each = torch.vmap(torch.func.grad(lambda cores: c.ours(norm, cores=cores).square().sum()))
    torch.testing.assert_close(each(many), expected)
    y, dy = c.ours(norm), torch.randn(3, *c.y0.shape).double().to(DEVICE)
    got = torch.autograd.grad(y, c.trained(), dy, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(dy):
        loop = torch.autograd.grad(y, c.trained(), one, retain_graph=True)
        for a, b in zip(got, loop, strict=True):
            torch.testing.assert_close(a[i], b)


def test_autocast_and_checkpointing():
    c, norm = batch().training(), SMagNorm()
    dy = torch.randn_like(c.y0)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = c.ours(norm)
    low = c.ours(norm, *(getattr(c, n).bfloat16() for n in ("y0", "t")), C=c.C.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(y, low)
    results = [torch.autograd.grad(v, c.trained(), dy.bfloat16()) for v in (y, low)]
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    expected = torch.autograd.grad(c.ours(norm), c.trained(), dy)
    for reentrant in (True, False):
        y = checkpoint(lambda *a: c.ours(norm, *a), *c.trained(), use_reentrant=reentrant)
        for value in c.trained():
            value.grad = None
        y.backward(dy)
        for value, gradient in zip(c.trained(), expected, strict=True):
            assert torch.equal(value.grad, gradient)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("norm", [FORMS["no gate"], FORMS["gate"]], ids=["no gate", "gate"])
def test_two_runs_are_bitwise_equal(norm, tokens, impl, monkeypatch):
    """Without a GPU the second run takes the programs in reverse order."""

    def results():
        torch.manual_seed(1)
        c = batch(40, 70, 9, adapters=by_token(6) if tokens else ADAPTERS).training()
        y = c.ours(norm, impl=impl)
        return y, *torch.autograd.grad(y, c.trained(), torch.randn_like(y))

    first = results()
    if not GPU:
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        forward = builder.set_grid_idx
        monkeypatch.setattr(
            builder, "set_grid_idx", lambda x, y, z: forward(builder.grid_dim[0] - 1 - x, y, z)
        )
    for a, b in zip(first, results(), strict=True):
        assert torch.equal(a, b)


def test_the_host_never_reads_which_adapter():
    from secura_kernels.backends.triton import batched as triton_batched
    from secura_kernels.backends.triton.launch import instead_of_launching

    c = batch()
    rows = c.y0.flatten(0, 1), c.t.flatten(0, 1), c.cores, c.adapter, c.C, c.adapter_bias
    needs = (True, True, True, True)

    def run(module, y0, t, *layer, norm):
        y, saved = module.forward(y0, t, *layer, 0.7, norm, True)
        return y, *module.backward(y, *layer, t, saved, 0.7, norm, needs)

    shapes = [c.y0.flatten(0, 1).shape, *(v.shape for v in (*rows[:3], c.adapter_bias))]
    for norm in (None, SMagNorm(), SMagNorm(ref="max")):
        with instead_of_launching(lambda *_: None):
            found = run(triton_batched, *(v.to("meta") for v in rows), norm=norm)
        assert [v.shape for v in found] == shapes
        with FakeTensorMode() as mode:
            found = run(reference, *map(mode.from_tensor, rows), norm=norm)
        assert [v.shape for v in found] == shapes


def test_sums_by_adapter():
    """A GPU has its own way to add."""
    values, ids = torch.randn(50, 3, 2).double(), torch.randint(-1, 4, (50,))
    expected = torch.stack([values[ids == k].sum(0) for k in range(4)])
    torch.testing.assert_close(by_adapter.sums(values, ids, 4), expected)
    if GPU:
        torch.testing.assert_close(by_adapter.sums(values.cuda(), ids.cuda(), 4).cpu(), expected)


def test_flops():
    S, N, r = 8, 48, 4
    c = batch(S, N, r).training()
    M = 8 * S
    with FlopCounterMode(display=False) as counter:
        y = c.ours(SMagNorm())
    assert counter.get_total_flops() == 2 * M * r * (r + N)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * M * r * (N + 2 * r)


def test_an_untrained_core_learns():
    """A gate does not stop the first step."""
    c = batch()
    cores = torch.zeros_like(c.cores).requires_grad_()
    y = cur_batched(c.y0, c.t, cores, c.adapter, c.C, norm=SMagNorm())
    assert torch.equal(y, c.y0)
    assert torch.autograd.grad(y.sum(), cores)[0].abs().amin() > 0
