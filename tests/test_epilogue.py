"""``cur_epilogue``: the change over a base output that somebody else computed, on every backend."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICE, MARKS, poisoned_memory
from epilogue_cases import OUTPUT_NORMS, epilogue_case
from layer_cases import (
    PRECISION_NORMS,
    case,
    check_derivatives,
    check_no_more_than_eager,
    compare,
    relative_error,
    skip_where_low_precision_jumps,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from secura_kernels import SMagNorm
from secura_kernels.backends.reference.epilogue import project
from secura_kernels.backends.reference.gate import decode, encode, inverse_gate, relative_magnitude
from secura_kernels.functional.epilogue import cur_epilogue, cur_epilogue_and_moved
from secura_kernels.ops import pack_norm
from secura_kernels.ops.epilogue import cur_epilogue_bwd, cur_epilogue_fwd
from secura_kernels.ops.registry import backend

pytestmark = MARKS

PRECISION = {k: n for k, n in PRECISION_NORMS.items() if n is None or n.domain == "output"}
FULL = {k: n for k, n in OUTPUT_NORMS.items() if n is None or not n.detach_gate}
ALL = dict(argvalues=list(OUTPUT_NORMS.values()), ids=list(OUTPUT_NORMS))
FORMS = {
    "no gate": None,
    "gate": SMagNorm(),
    "full": SMagNorm(detach_gate=False),
    "max": SMagNorm(ref="max"),
    "full max": SMagNorm(ref="max", detach_gate=False),
}
# M, N, K, r: ragged; the published rank; few tokens.
SHAPES = [(101, 131, 67, 7), (33, 60, 176, 150), (20, 96, 64, 8)]


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_memory():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", PRECISION.values(), ids=PRECISION)
def test_error_is_no_more_than_eager(norm, dtype, impl):
    skip_where_low_precision_jumps(norm, dtype)
    cases = [
        epilogue_case(*shape, dtype, decay=False, small=True, device=DEVICE)
        for shape in SHAPES
        for _ in range(3)
    ]
    beside = {}
    if dtype == torch.bfloat16 and norm is not None and norm.detach_gate:
        beside["dy0"] = error_of_the_code(cases, norm)
    check_no_more_than_eager(cases, norm, impl, beside)


def error_of_the_code(cases, norm) -> float:
    """Of s in 8 bits: dy0 = beta s dy has no sum in which it would drown, as it does in the dX of a
    whole layer."""
    errors = []
    for c in cases:
        y0, t, C = c.y0.detach().double(), c.t.detach().double(), c.C.double()
        layer = c.operands(norm)._replace(core=c.core.detach().double())
        d = project(t, layer) @ C.T + c.adapter_bias.detach()
        s = inverse_gate(y0, d, norm, relative_magnitude(y0, d, norm.eps).amax())
        back = decode(encode(s.float(), norm, torch.bfloat16), norm, torch.float32)
        errors.append(relative_error(back, s) ** 2)
    return math.sqrt(sum(errors) / len(errors))


@pytest.mark.parametrize("norm", **ALL)
def test_every_form(norm, impl):
    for shape in ((70, 45, 38, 5), (1, 45, 38, 3)):
        compare(epilogue_case(*shape, torch.float32, device=DEVICE), norm, impl)


@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_strides(norm, impl):
    """Sliced, transposed and expanded operands and gradients."""
    c = epilogue_case(70, 45, 38, 5, torch.float32, device=DEVICE)
    wide = torch.randn(140, 48, device=DEVICE)
    c = replace(
        c,
        y0=wide[::2, 1:46].requires_grad_(),
        t=c.t.detach().T.contiguous().T.requires_grad_(),
        C=torch.stack([c.C, c.C * math.nan], 1)[:, 0],
        decay=c.decay[:1].expand(45),
        core=c.core.detach().T.contiguous().T.requires_grad_(),
    )
    transposed, one = torch.randn(45, 70, device=DEVICE).T, torch.ones(1, 1, device=DEVICE)
    for dy in (transposed, one.expand(70, 45)):
        compare(c, norm, impl, dy)


@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_no_tokens_and_more_dimensions(norm, impl):
    c = epilogue_case(0, 12, 10, 4, torch.float32, device=DEVICE)
    gradients = torch.autograd.grad(c.ours(norm, impl=impl).sum(), c.trained())
    assert gradients[0].shape == (0, 12) and not gradients[2].any() and not gradients[3].any()
    c = epilogue_case(6, 12, 10, 4, torch.float32, device=DEVICE)
    y = c.ours(norm, c.y0.view(2, 3, 12), c.t.view(2, 3, 4), c.core, c.adapter_bias, impl=impl)
    assert y.shape == (2, 3, 12) and torch.equal(y.view(6, 12), c.ours(norm, impl=impl))


@pytest.mark.parametrize("norm", **ALL)
def test_an_untrained_core_keeps_the_base_to_the_bit(norm, impl):
    c = epilogue_case(40, 48, 30, 4, torch.bfloat16, decay=False, device=DEVICE)
    with torch.no_grad():
        c.core.zero_()
        c.adapter_bias.zero_()
    kept = c.y0.detach().clone()
    y = c.ours(norm, impl=impl)
    assert torch.equal(y, kept) and y.data_ptr() != c.y0.data_ptr()
    if norm is None or norm.ref != "max":
        assert torch.autograd.grad(y.sum(), c.core)[0].abs().min() > 0


def test_the_base_output_is_left_alone(impl):
    for norm in (None, SMagNorm(), SMagNorm(ref="max")):
        c = epilogue_case(70, 45, 38, 5, torch.float32, device=DEVICE)
        before = [v.detach().clone() for v in (c.y0, c.t, c.C)]
        c.ours(norm, impl=impl).sum().backward()
        for value, was in zip((c.y0, c.t, c.C), before, strict=True):
            assert torch.equal(value, was)


@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_equals_cur_linear_over_its_base_product(norm, impl):
    dtype = torch.float64 if impl == "reference" else torch.float32
    c = case(70, 45, 38, 5, dtype, tied=False, device=DEVICE)
    with torch.no_grad():
        c.core.mul_(0.1)
    C, R = c.C_and_R
    y = c.ours(norm, impl=impl)
    z = cur_epilogue(
        F.linear(c.x, c.W, c.bias),
        c.x @ R.T,
        c.core,
        C,
        alpha=c.alpha,
        norm=norm,
        adapter_bias=c.adapter_bias,
        decay=c.decay,
        impl=impl,
    )
    if impl == "reference":
        assert torch.equal(y, z)
    dy = torch.randn_like(y)
    for a, b in zip(
        (y, *torch.autograd.grad(y, c.trained(), dy)),
        (z, *torch.autograd.grad(z, c.trained(), dy)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm", **ALL)
def test_equals_the_eager_formula_and_its_derivatives(norm):
    check_derivatives(epilogue_case(), norm)


def test_behind_a_task_gate(impl):
    check_derivatives(epilogue_case(task_gate=True), None)
    for dtype in (torch.float32, torch.bfloat16):
        small = dict(small=True, task_gate=True, device=DEVICE)
        check_no_more_than_eager([epilogue_case(*s, dtype, **small) for s in SHAPES], None, impl)


@pytest.mark.parametrize("norm", FULL.values(), ids=FULL)
def test_gradcheck(norm):
    c = epilogue_case(M=3, N=6, K=5, r=2)
    assert gradcheck(lambda *a: c.ours(norm, *a), c.trained())
    assert gradgradcheck(lambda *a: c.ours(norm, *a), c.trained())


@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_only_what_is_asked_for(norm, impl):
    c = epilogue_case(40, 48, 33, 4, torch.float32, device=DEVICE)
    dy = torch.randn(40, 48, device=DEVICE)
    everything = torch.autograd.grad(c.ours(norm, impl=impl), c.trained(), dy)
    for i, tensor in enumerate(c.trained()):
        for other in c.trained():
            other.requires_grad_(other is tensor)
        found = torch.autograd.grad(c.ours(norm, impl=impl), tensor, dy)[0]
        # Where G' is not written, a compiler may take a product and a sum as one operation.
        torch.testing.assert_close(found, everything[i])
    module = backend(impl, "epilogue", c.y0, 4)
    with torch.no_grad():
        _, saved, _ = module.forward(c.y0, c.t, c.operands(norm), 0.0, True)
        found = module.backward(dy, c.operands(norm), c.t, saved, (False, False, True, False))
    assert [g is not None for g in found] == [False, False, True, False]


@pytest.mark.parametrize(
    ("dtype", "gate_dtype"),
    [(torch.bfloat16, torch.uint8), (torch.float16, torch.int16), (torch.float32, torch.float32)],
)
def test_saves_t_and_the_gate(dtype, gate_dtype, impl):
    c = epilogue_case(33, 24, 40, 4, dtype, decay=False, device=DEVICE)

    def saved(norm):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            c.ours(norm, impl=impl)
        return [t for t in kept if t.shape[:1] == (33,)]

    assert {(t.shape, t.dtype) for t in saved(SMagNorm())} == {
        ((33, 4), dtype),
        ((33, 24), gate_dtype),
    }
    assert {t.shape for t in saved(None)} == {(33, 4)}
    if impl == "reference":
        assert any(t.data_ptr() == c.y0.data_ptr() for t in saved(SMagNorm(detach_gate=False)))


@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_importance_count(norm, impl):
    c = epilogue_case(70, 40, 33, 4, torch.float32, decay=False, device=DEVICE)

    def count(impl, edge=1.2):
        return cur_epilogue_and_moved(c.y0, c.t, c.operands(norm), impl, edge)[1]

    assert torch.equal(count(impl), count("reference"))
    assert count(impl, 0.0).shape == (0,)


@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_opcheck(norm, impl):
    dtype = torch.bfloat16
    c = epilogue_case(9, 12, 10, 5, dtype, task_gate=norm is None, device=DEVICE)
    core, bias, t, y0 = (v.detach() for v in (c.core, c.adapter_bias, c.t, c.y0))
    detach = norm is None or norm.detach_gate
    for save, edge in ((True, 0.0), (False, 0.0 if norm is None else 1.2)):
        settings = (c.alpha, pack_norm(norm), detach, edge, save, impl)
        forward = (y0, t, core, c.C, bias, c.decay, c.task_gate, *settings)
        opcheck(cur_epilogue_fwd, forward)
    saved = cur_epilogue_fwd(*forward[:-2], True, impl)[1] if detach else y0
    gate = norm is not None  # without one no gradient of y0 is computed: it is dy
    transposed = torch.randn(12, 9, device=DEVICE).T
    for dy, needs in ((y0, [False, True, False, True]), (transposed, [gate, True, True, True])):
        opcheck(
            cur_epilogue_bwd,
            (
                dy.to(dtype),
                core,
                c.C,
                bias,
                c.decay,
                c.task_gate,
                t,
                saved,
                c.alpha,
                pack_norm(norm),
                detach,
                needs,
                impl,
            ),
        )


@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_compiles_as_one_graph(norm, impl):
    torch.compiler.reset()
    c = epilogue_case(9, 12, 10, 4, torch.float32, device=DEVICE)
    dy = torch.randn(9, 12, device=DEVICE)
    compiled = torch.compile(
        lambda *a: c.ours(norm, *a, impl=impl), fullgraph=True, backend="aot_eager"
    )
    results = [
        torch.autograd.grad(f(*c.trained()), c.trained(), dy)
        for f in (compiled, lambda *a: c.ours(norm, *a, impl=impl))
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_flops():
    M, N, r = 64, 48, 4
    c = epilogue_case(M, N, 32, r, torch.float32, decay=False)
    with FlopCounterMode(display=False) as counter:
        y = c.ours(SMagNorm())
    assert counter.get_total_flops() == 2 * M * r * (r + N)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * M * r * (N + 2 * r)


def test_transforms():
    """torch.func.grad, vmap over any argument, and autocast, equal their loops and casts."""
    c, norm = epilogue_case(), SMagNorm()
    dy = torch.randn(7, 12).double()
    expected = torch.autograd.grad(c.ours(norm), c.trained(), dy)
    got = torch.func.grad(lambda *a: (c.ours(norm, *a) * dy).sum(), argnums=(0, 1, 2, 3))(
        *(v.detach() for v in c.trained())
    )
    torch.testing.assert_close(got, expected)
    many = torch.randn(3, 4, 4).double()
    got = torch.vmap(lambda core: c.ours(norm, c.y0, c.t, core, c.adapter_bias))(many)
    torch.testing.assert_close(
        got, torch.stack([c.ours(norm, c.y0, c.t, core, c.adapter_bias) for core in many])
    )
    low = epilogue_case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = low.ours(norm)
        got = torch.autograd.grad(y, low.trained(), dy.bfloat16())
    by_hand = replace(low, y0=low.y0.bfloat16(), t=low.t.bfloat16(), C=low.C.bfloat16())
    z = by_hand.ours(norm)
    assert torch.equal(y, z)
    for a, b in zip(got, torch.autograd.grad(z, low.trained(), dy.bfloat16()), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(norm=SMagNorm(domain="weight")), r"norm.domain='weight' is not allowed.*'output'"),
        (dict(norm="calibrated"), "norm='calibrated' is not allowed"),
        (dict(impl="cutlass"), "impl='cutlass' is not allowed"),
        (dict(alpha=math.nan), "alpha=nan is not allowed"),
        (dict(C=torch.zeros(11, 4)), r"y0.shape=\(7, 12\) is not allowed.*\(\.\.\., 11\)"),
        (dict(C=torch.zeros(12)), r"C='torch.float32 \(12,\)' is not allowed"),
        (dict(C=torch.zeros(12, 4).requires_grad_()), "C.requires_grad=True is not allowed"),
        (dict(C=torch.zeros(12, 4).double()), "C.dtype=torch.float64 is not allowed"),
        (dict(t=torch.zeros(6, 4)), r"t.shape=\(6, 4\) is not allowed.*\(7, 4\)"),
        (dict(t=torch.zeros(7, 4, device="meta")), "t.device='meta' is not allowed"),
        (dict(core=torch.zeros(3, 3)), r"core='torch.float32 \(3, 3\)' is not allowed"),
        (dict(adapter_bias=torch.zeros(4)), r"adapter_bias.shape=\(4,\) is not allowed.*\(12,\)"),
        (dict(decay=torch.zeros(12).requires_grad_()), "decay.requires_grad=True is not allowed"),
        (dict(task_gate=torch.zeros(4)), r"task_gate.shape=\(4,\) is not allowed.*\(4, 2\)"),
        (dict(task_gate=torch.zeros(4, 2).requires_grad_()), "task_gate.requires_grad=True is not"),
        (dict(task_gate=torch.zeros(4, 2), norm=SMagNorm()), "task_gate=.* None beside a norm"),
    ],
)
def test_bad_arguments(changes, message):
    good = dict(
        y0=torch.zeros(7, 12), t=torch.zeros(7, 4), core=torch.zeros(4, 4), C=torch.zeros(12, 4)
    )
    assert torch.equal(cur_epilogue(**good), good["y0"])
    with pytest.raises(ValueError, match=message):
        cur_epilogue(**good | changes)
