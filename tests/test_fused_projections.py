"""Layers that share an input: the same outputs to the bit, gradients within rounding, and every
way in which a call may not be shared."""

import copy
from functools import partial

import pytest
import torch
from projection_cases import (
    FORMS,
    QKV,
    Attention,
    K,
    M,
    assert_same,
    every_form,
    inputs,
    pair,
    relative_error,
    run,
)
from torch.utils.checkpoint import checkpoint

from secura_kernels import fuse_projections

# The same as the layers by themselves.


@every_form
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(M, K), (2, 5, K), (K,), (0, K)], ids=str)
def test_same_as_separate_layers(form, bias, shape, products):
    separate, fused = pair(form, bias)
    x = inputs(shape=shape)
    expected = run(separate, x)
    assert not products
    assert_same(run(fused, x), expected)
    assert products == [3]


@pytest.mark.parametrize("form", ["CURLoRA", "gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_separate_layers(form, dtype, products):
    separate, fused = pair(form, dtype=dtype)
    x = inputs(dtype, (64, K))
    truth = run(copy.deepcopy(separate).double(), x.double())[2]
    before, after = run(separate, x), run(fused, x)
    for a, b in zip(before[0], after[0], strict=True):
        assert torch.equal(a, b)
    for name, gradient in before[1].items():
        assert torch.equal(gradient, after[1][name]), name
    off = [relative_error(found[2], truth) for found in (before, after)]
    assert 0 < off[1] <= off[0] + (1e-6 if dtype is torch.float32 else 0)  # as in layer_cases.py
    assert products == [3]


def test_under_autocast(products):
    separate, fused = pair("gate", dtype=torch.float32)
    x = inputs(torch.float32, (64, K))
    truth = run(copy.deepcopy(separate).double(), x.double())[2]
    with torch.autocast("cpu", torch.bfloat16):
        before, after = run(separate, x), run(fused, x)
    for a, b in zip(before[0], after[0], strict=True):
        assert torch.equal(a, b) and b.dtype == torch.bfloat16
    assert 0 < relative_error(after[2], truth) <= relative_error(before[2], truth)
    assert after[2].dtype == torch.float32 and products == [3]
    separate, fused = pair("gate")
    with torch.autocast("cpu", torch.bfloat16):  # leaves float64 as it is
        assert_same(run(fused), run(separate))


@pytest.mark.parametrize("form", ["CURLoRA", "gate"])
@pytest.mark.parametrize("bias", [False, True])
def test_triton_kernels(form, bias, products):
    """In the interpreter, or on a GPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    separate, fused = pair(form, bias, dtype=torch.float32)
    truth = run(copy.deepcopy(separate).double())
    before = run(separate, inputs(torch.float32))
    for name in QKV:
        getattr(fused, name).impl = "triton"
    found = run(fused.to(device), inputs(torch.float32).to(device))
    assert products == [3]
    for mine, reference, true in (
        *zip(found[0], before[0], truth[0], strict=True),
        *((found[1][name], before[1][name], truth[1][name]) for name in truth[1]),
        (found[2], before[2], truth[2]),
    ):
        assert relative_error(mine.cpu(), true) <= relative_error(reference, true) + 1e-6


def test_stored_C_and_R(products):
    separate, fused = pair()
    for model in (separate, fused):
        for name in QKV[1:]:  # of q they stay slices
            layer = getattr(model, name)
            layer.untie(layer.weight)
    assert_same(run(fused), run(separate))
    assert products == [3]


def test_stage_and_past(products):
    separate, fused = pair()
    for model in (separate, fused):
        model.q_proj.stage_m2()
        with torch.no_grad():
            model.q_proj.U.fill_(0.1)
        k = model.k_proj
        k.C_past, k.R_past = k.weight[:, :3].clone(), k.weight[:3].clone()
    found, expected = run(fused), run(separate)
    assert_same(found, expected)
    assert products == [3]


def test_second_derivatives():
    def gradient_of_gradient(model):
        x = inputs()
        y = sum((part**3).sum() for part in model(x))
        trained = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(y, [x, *trained], create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), [x, *trained])

    for form in FORMS:
        separate, fused = pair(form)
        for a, b in zip(gradient_of_gradient(fused), gradient_of_gradient(separate), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("used", [(0,), (1, 2), (0, 2)], ids=str)
def test_outputs_that_nobody_uses(used, products):
    separate, fused = pair("gate")
    assert_same(run(fused, used=used), run(separate, used=used))
    assert products == [len(used)]


def test_gradients_of_the_input_alone_and_of_cores_alone(products):
    separate, fused = pair()
    for model in (separate, fused):
        model.requires_grad_(False)
    assert_same(run(fused), run(separate))
    assert products == [3]
    separate, fused = pair()
    y, expected = (model(inputs().detach()) for model in (fused, separate))
    sum(part.sum() for part in y).backward()
    sum(part.sum() for part in expected).backward()
    assert torch.equal(fused.v_proj.U.grad, separate.v_proj.U.grad)
    assert products == [3]


# What may come between.


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, products):
    separate, fused = pair("gate")
    call = partial(checkpoint, fused, use_reentrant=reentrant)
    assert_same(run(fused, call=call), run(separate))
    assert products == [3]


def test_torch_compile():
    separate, fused = pair("gate")
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_same(run(fused, call=compiled), run(separate))
    fused.to(torch.float32)
    found = run(fused, inputs(torch.float32), call=compiled)
    for a, b in zip(found[0], run(separate.float(), inputs(torch.float32))[0], strict=True):
        assert torch.equal(a, b)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_one_layer_compiled_alone(products):
    torch.compiler.reset()  # another test's compilation would be compiled again
    separate, fused = pair("gate")
    fused.q_proj.compile(fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert_same(run(fused), run(separate))
    assert products == [2, 2, 2]


def test_functional_transforms(products):
    separate, fused = pair()
    x = inputs().detach()
    for transform in (torch.func.grad, torch.func.hessian):
        a, b = (
            transform(lambda x, m=model: sum((y**2).sum() for y in m(x)))(x)
            for model in (fused, separate)
        )
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not products


def test_other_inputs_run_apart(products):
    separate, fused = pair()
    other = inputs().detach() * 2
    assert_same(run(fused, other=other), run(separate, other=other))
    equal = inputs().detach()
    assert_same(run(fused, other=equal), run(separate, other=equal))  # another tensor
    assert set(products) == {1}  # q's own


def test_input_changed_in_place_between_the_calls():
    class Changing(Attention):
        def forward(self, x):
            x = x * 1
            q = self.q_proj(x)
            x.mul_(2)
            return q, self.k_proj(x), self.v_proj(x)

    separate = Changing()
    fused = copy.deepcopy(separate)
    fuse_projections(fused)
    assert_same(run(fused), run(separate))


def test_chunks_and_calls_again(products):
    class Chunked(Attention):
        def forward(self, x):
            chunks = [Attention.forward(self, part) for part in x.split(5)]
            self.q_proj(x)  # nobody uses it
            return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    separate = Chunked()
    fused = copy.deepcopy(separate)
    fuse_projections(fused)
    assert_same(run(fused), run(separate))
    assert products == [3, 3]


def test_layer_outside_its_parent_and_exceptions(products):
    separate, fused = pair()
    x = inputs()
    with pytest.raises(ValueError, match=r"x\.shape"):
        fused(inputs(shape=(M, K + 1)))
    with pytest.raises(ValueError, match=r"x\.shape"):  # k's
        fused(x, other=inputs(shape=(M, K + 1)))
    assert all(getattr(fused, name).group_call is None for name in QKV)
    assert torch.equal(fused.q_proj(x), separate.q_proj(x))
    assert_same(run(fused), run(separate))
    assert products == [3]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    separate, fused = pair("gate")
    for training in (True, False):
        with mode():
            for a, b in zip(
                fused.train(training)(inputs()), separate.train(training)(inputs()), strict=True
            ):
                assert torch.equal(a, b)
    assert_same(run(fused), run(separate))
