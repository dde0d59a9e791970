"""Stacks of experts: each row with its own expert's matrix, each expert with its own core."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from secura_kernels.backends.reference import eager
from secura_kernels.bases import orthonormal_basis
from secura_kernels.functional.experts import (
    Routing,
    cur_experts,
    frozen_product,
    grouped_product,
    rows_of,
)
from secura_kernels.nn.experts import (
    CURLoRAExperts,
    SECURAExperts,
    experts_linear,
    select_experts,
)
from secura_kernels.settings import ImportanceDecay, SMagNorm

E, N, K, R = 5, 24, 16, 8
# Expert 2 gets no token, expert 0 one token twice.
CHOSEN = torch.tensor([[0, 1], [1, 3], [3, 4], [0, 4], [4, 3], [1, 0], [0, 0]])
ALLOWED = 1e-6


def stack(dtype=torch.float64, seed=0, shape=(E, N, K)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def adapter(weight, kind=CURLoRAExperts, rule="inverted", std=0.2, seed=1, r=R, **settings):
    """One that has learned something."""
    generator = torch.Generator().manual_seed(seed)
    cols, rows = select_experts(weight, r, rule, generator)
    made = kind(weight, cols, rows, **settings)
    with torch.no_grad():
        for parameter in made.learned_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(std * noise)
    return made


def core_of(made, e, weight):
    """Between C and R of one expert, as a reader would write it."""
    parameters = [p[e].to(weight.dtype) for p in made.core_parameters()]
    core = parameters[0] if len(parameters) == 1 else eager.cabr_core(*parameters)
    if made.basis == "orthonormal":
        C, rows = weight[e][:, made.cols[e]], weight[e][made.rows[e]]
        _, S_c, _, S_r = orthonormal_basis(C, rows)
        core = torch.linalg.inv(S_c).to(core) @ core @ torch.linalg.inv(S_r).T.to(core)
    return core


def by_expert(x, weight, bias, adapters, routing):
    """The dense formula, one expert after the other."""
    parts = []
    for e, (start, end) in enumerate(pairwise([0, *routing.ends.tolist()])):
        rows = x[start:end]
        b = None if bias is None else bias[e]
        y = F.linear(rows, weight[e], b)
        for made in adapters:
            C, R_ = weight[e][:, made.cols[e]], weight[e][made.rows[e]]
            more = None if made.adapter_bias is None else made.adapter_bias[e].to(x.dtype)
            y = eager.cur_epilogue(
                y,
                rows @ R_.T,
                core_of(made, e, weight),
                C,
                alpha=made.alpha,
                norm=made.norm,
                adapter_bias=more,
            )
        parts.append(y)
    return torch.cat(parts)


def test_rows_are_sorted_by_expert_and_come_back():
    routing = Routing.of(CHOSEN, E)
    assert routing.experts.tolist() == sorted(CHOSEN.flatten().tolist())
    assert routing.ends.tolist() == [5, 8, 8, 11, 14] and routing.ends.dtype == torch.int32
    assert routing.tokens[:5].tolist() == [0, 3, 5, 6, 6]
    assert torch.equal(routing.back(routing.experts), CHOSEN.flatten())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(24, 16), (23, 16), (24, 5)], ids=str)
def test_each_group_with_its_own_matrix(dtype, sizes):
    """torch's grouped product where rows are whole 16 bytes, a product an expert elsewhere."""
    n, k = sizes
    weight, routing = stack(dtype, shape=(E, n, k)), Routing.of(CHOSEN, E)
    x = stack(dtype, seed=1, shape=(len(routing.tokens), k))
    y = grouped_product(x, weight.mT, routing.ends)
    expected = torch.stack([weight[e] @ row for e, row in zip(routing.experts, x, strict=True)])
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected)
    none = grouped_product(x[:0], weight.mT, torch.zeros(E, dtype=torch.int32))
    assert none.shape == (0, n)


@pytest.mark.parametrize("chosen", [None, "rows"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [2, 3])  # fewer rows than experts, and more
def test_derivatives_of_products_with_frozen_matrices(chosen, transposed, tokens):
    routing = Routing.of(CHOSEN[-tokens:], E)
    weight = stack(shape=(E, 6, 4))
    index = None if chosen is None else torch.stack([torch.randperm(6)[:3] for _ in range(E)])
    width = 4 if transposed else 6 if index is None else 3
    x = stack(seed=1, shape=(2 * tokens, width)).requires_grad_()

    def product(x):
        return frozen_product(x, weight, routing.ends, index, transposed)

    matrices = weight if index is None else rows_of(weight, index)
    matrices = matrices.mT if transposed else matrices
    expected = torch.stack([row @ matrices[e] for e, row in zip(routing.experts, x, strict=True)])
    torch.testing.assert_close(product(x), expected)
    assert torch.autograd.gradcheck(product, x)
    assert torch.autograd.gradgradcheck(product, x)


@pytest.mark.parametrize("tokens", [2, 3])
def test_derivatives_of_the_change_within_the_product(tokens):
    weight, routing = stack(shape=(E, 6, 5)), Routing.of(CHOSEN[-tokens:], E)
    cols, rows = (torch.stack([torch.randperm(n)[:3] for _ in range(E)]) for n in (5, 6))
    x = stack(seed=1, shape=(2 * tokens, 5)).requires_grad_()
    core = stack(seed=2, shape=(E, 3, 3)).requires_grad_()

    def product(x, core):
        return cur_experts(x, weight, core, cols, rows, routing)

    assert torch.autograd.gradcheck(product, (x, core))
    assert torch.autograd.gradgradcheck(product, (x, core))


def secura(**settings):
    return dict(kind=SECURAExperts, m=10, rule="lowest") | settings


FORMS = {
    "raw": [dict(basis="raw", alpha=0.7)],
    "orthonormal": [dict()],
    "A and B, a bias": [secura()],
    "A and B, no bias": [secura(adapter_bias=False, basis="raw", a_init="truncated_svd")],
    "calibrated gate": [secura(norm="calibrated")],
    "published gate": [secura(norm="published", basis="raw")],
    "whole gate": [dict(norm=SMagNorm(detach_gate=False))],
    "two adapters": [dict(), secura(seed=2)],
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_expert_by_expert_it_equals_the_dense_formula(form, biased):
    """Outputs and gradients in float64."""
    weight, routing = stack(), Routing.of(CHOSEN, E)
    bias = stack(seed=3, shape=(E, N)) if biased else None
    adapters = [adapter(weight, **settings) for settings in FORMS[form]]
    x = stack(seed=4, shape=(14, K)).requires_grad_()
    trained = [x, *(p for made in adapters for p in made.parameters())]
    dy = stack(seed=5, shape=(14, N))
    y = experts_linear(x, weight, bias, adapters, routing)
    truth = by_expert(x, weight, bias, adapters, routing)
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(y, trained, dy)
    expected = torch.autograd.grad(truth, trained, dy)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    for made in adapters:
        at = [p is made.core_parameter() for p in trained].index(True)
        assert found[at].any() and not found[at][2].any()  # expert 2 had no token


@pytest.mark.parametrize("form", FORMS)
def test_stored_sides_change_nothing(form):
    """C and R kept, as where the folds would be ill conditioned."""
    weight, routing = stack(), Routing.of(CHOSEN, E)
    x = stack(seed=4, shape=(14, K))
    adapters = [adapter(weight, **settings) for settings in FORMS[form]]
    before = experts_linear(x, weight, None, adapters, routing)
    for made in adapters:
        made.untie(weight)
        assert made.C.shape == (E, N, R) and made.R.shape == (E, R, K)
    torch.testing.assert_close(experts_linear(x, weight, None, adapters, routing), before)


def test_ill_conditioned_columns_are_stored():
    weight = stack(torch.bfloat16)
    weight[3, :, 1:9] = weight[3, :, :1] + 1e-2 * weight[3, :, 1:9]
    cols = torch.arange(R).expand(E, R).contiguous()
    made = CURLoRAExperts(weight, cols, cols)
    assert made.C is not None and made.fold_c is None
    eye = torch.eye(R, dtype=torch.float64)
    assert (made.C.double().mT @ made.C.double() - eye).abs().max() < 2**-6
    assert made.has_C_and_R_of(weight) and not made.has_C_and_R_of(weight.flip(0))


@pytest.mark.parametrize("norm", [None, "calibrated"])
@pytest.mark.parametrize("stage", ["m1", "m2"])
def test_stages(stage, norm):
    """Without a gate a stage changes no output, and what is learned later adds up."""
    weight, routing = stack(), Routing.of(CHOSEN, E)
    x = stack(seed=4, shape=(14, K))
    made = adapter(weight, norm=norm)
    core = made.U.detach().clone()
    before = experts_linear(x, weight, None, [made], routing)
    made.stage(stage)
    assert not made.U.any()
    after = experts_linear(x, weight, None, [made], routing)
    plain = adapter(weight)
    torch.testing.assert_close(after, experts_linear(x, weight, None, [plain], routing))
    if norm is None:
        torch.testing.assert_close(after, before)
    with torch.no_grad():
        made.U.copy_(core)
    if norm is None:
        plain.U.data *= 2
        later = experts_linear(x, weight, None, [made], routing)
        torch.testing.assert_close(later, experts_linear(x, weight, None, [plain], routing))


@pytest.mark.parametrize("form", [f for f in FORMS if "gate" not in f])
def test_the_change_as_a_stack_of_matrices(form):
    weight, routing = stack(), Routing.of(CHOSEN, E)
    x = stack(seed=4, shape=(14, K))
    made = adapter(weight, **FORMS[form][-1])
    merged = made.merged_matrix(weight)
    y = grouped_product(x, merged.mT, routing.ends)
    if made.adapter_bias is not None:
        y = y + made.adapter_bias[routing.experts]
    torch.testing.assert_close(y, experts_linear(x, weight, None, [made], routing))
    C, core, R_ = made.factors(weight)
    torch.testing.assert_close(C @ core @ R_, merged - weight)


def test_an_untrained_adapter_is_the_base_to_the_bit():
    for dtype in (torch.float32, torch.bfloat16):
        weight, routing = stack(dtype), Routing.of(CHOSEN, E)
        x = stack(dtype, seed=4, shape=(14, K))
        base = experts_linear(x, weight, None, [], routing)
        for settings in (dict(), secura(), secura(norm="calibrated"), secura(norm="published")):
            y = experts_linear(x, weight, None, [adapter(weight, **settings, std=0)], routing)
            assert torch.equal(y, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["raw", "orthonormal", "A and B, a bias", "calibrated gate"])
def test_error_is_no_more_than_eager(form, dtype):
    """Off from float64 by no more than the dense formula in the same dtype, plus 1e-6."""
    shape, tokens = (4, 64, 96), 256
    chosen = torch.randint(0, 4, (tokens, 2), generator=torch.Generator().manual_seed(0))
    routing = Routing.of(chosen, 4)
    found, errors = {}, {}
    for precision in (torch.float64, dtype):
        weight = (stack(shape=shape) / 8).to(dtype).to(precision)
        made = adapter(weight, **FORMS[form][0] | dict(std=0.05))
        x = stack(seed=4, shape=(2 * tokens, 96)).to(dtype).to(precision).requires_grad_()
        dy = stack(seed=5, shape=(2 * tokens, 64)).to(dtype).to(precision)
        trained = [x, made.core_parameter()]
        for name, forward in (("ours", experts_linear), ("eager", by_expert)):
            y = forward(x, weight, None, [made], routing)
            grads = torch.autograd.grad(y, trained, dy)
            found[precision, name] = [t.detach().double() for t in (y, *grads)]
    truth = found[torch.float64, "eager"]
    for name in ("ours", "eager"):
        pairs = zip(found[dtype, name], truth, strict=True)
        errors[name] = [float((value - true).norm() / true.norm()) for value, true in pairs]
    for ours, theirs in zip(errors["ours"], errors["eager"], strict=True):
        assert ours <= theirs + ALLOWED, errors


@pytest.mark.parametrize("form", ["orthonormal", "calibrated gate"])
def test_nothing_of_the_size_of_an_expert_is_kept_for_the_backward_pass(form):
    weight, routing = stack(torch.float32), Routing.of(CHOSEN, E)
    made = adapter(weight, **FORMS[form][0])
    x = stack(torch.float32, seed=4, shape=(14, K)).requires_grad_()
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts_linear(x, weight, None, [made], routing)
    own = weight.untyped_storage().data_ptr()
    others = [t for t in kept if t.untyped_storage().data_ptr() != own]
    assert {tuple(t.shape) for t in others} & {(14, R), (E, R, R)}
    assert not {tuple(t.shape) for t in others} & {(E, N, R), (E, R, K), (E, N, K), (14, K)}


def test_indices_are_drawn_for_each_expert_and_again_from_a_seed():
    weight = stack()
    cols, rows = select_experts(weight, R, "inverted", torch.Generator().manual_seed(3))
    again, _ = select_experts(weight, R, "inverted", torch.Generator().manual_seed(3))
    assert cols.shape == rows.shape == (E, R) and torch.equal(cols, again)
    assert len({tuple(row.tolist()) for row in cols}) == E
    assert all(len(set(row.tolist())) == R for row in cols)


def fill(value):
    def change(weight):
        weight[2] = value
        return weight

    return change


@pytest.mark.parametrize(
    "change, settings, message",
    [
        (fill(0.0), {}, "weight='a tensor of zeros' is not allowed"),
        (fill(torch.nan), {}, "weight='a tensor with NaN"),
        (lambda w: w[0], {}, r"weight.shape=\(24, 16\) is not allowed.*\(E, N, K\)"),
        (lambda w: w, dict(r=17), "r=17 is not allowed"),
        (lambda w: w, dict(basis="natural"), "basis='natural' is not allowed.*stacked experts"),
        (lambda w: w, dict(norm="figure"), "norm=.*is not allowed.*domain 'output'"),
        (lambda w: w, dict(norm=SMagNorm(ref="max")), "norm=.*is not allowed.*number as ref"),
        (
            lambda w: w,
            dict(norm="published", importance_decay=ImportanceDecay()),
            "importance_decay=.*is not allowed",
        ),
    ],
)
def test_refusals(change, settings, message):
    with pytest.raises(ValueError, match=message):
        adapter(change(stack()), **settings)


@pytest.mark.parametrize(
    "cols, rows, message",
    [
        (torch.zeros(R, dtype=torch.int64), None, r"cols=.*\(5, r\)"),
        (torch.zeros(E, R), None, r"cols='torch.float32"),
        (torch.full((E, R), K), None, r"cols=\[16, 16\].*from 0 to 15"),
        (torch.zeros(E, R, dtype=torch.int64), torch.full((E, R), -1), r"rows=\[-1, -1\]"),
        (torch.zeros(E, 2, dtype=torch.int64), torch.zeros(E, 3, dtype=torch.int64), "rows.shape"),
    ],
)
def test_indices_are_checked(cols, rows, message):
    with pytest.raises(ValueError, match=message):
        CURLoRAExperts(stack(), cols, cols if rows is None else rows, basis="raw")
