"""First and second derivatives of every form, in float64."""

import pytest
import torch
from layer_cases import ALL_NORMS, NORMS, case, check_derivatives
from torch.autograd import gradcheck, gradgradcheck

from secura_kernels import SMagNorm

FULL = {name: norm for name, norm in NORMS.items() if norm is None or not norm.detach_gate}


@pytest.mark.parametrize("norm", **ALL_NORMS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "stored"])
def test_equals_the_eager_formula_and_its_derivatives(norm, tied):
    check_derivatives(case(tied=tied), norm)


@pytest.mark.parametrize("norm", FULL.values(), ids=FULL)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "stored"])
def test_gradcheck(norm, tied):
    c = case(M=3, N=6, K=5, r=2, tied=tied)
    inputs = (c.x, c.core, c.adapter_bias)
    assert gradcheck(lambda *a: c.ours(norm, *a), inputs)
    assert gradgradcheck(lambda *a: c.ours(norm, *a), inputs)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "stored"])
def test_derivatives_behind_a_task_gate(tied):
    check_derivatives(case(tied=tied, task_gate=True), None)
    c = case(M=3, N=6, K=5, r=2, tied=tied, task_gate=True)
    inputs = (c.x, c.core, c.adapter_bias)
    assert gradcheck(lambda *a: c.ours(None, *a), inputs)
    assert gradgradcheck(lambda *a: c.ours(None, *a), inputs)


@pytest.mark.parametrize("domain", ["output", "weight"])
def test_gradcheck_of_a_detached_gate(domain):
    """With the gate's constant frozen at this point, the layer is linear in the change, and its
    numerical derivative is the detached one."""
    norm = SMagNorm(domain=domain)
    c = case(M=3, N=6, K=5, r=2)
    y = c.ours(norm)
    got = torch.autograd.grad(y, c.core, torch.ones_like(y))[0]
    z, leaves = c.eager(norm)
    torch.testing.assert_close(got, torch.autograd.grad(z.sum(), leaves[1])[0])
    full = c.ours(SMagNorm(domain=domain, detach_gate=False))
    assert not torch.allclose(torch.autograd.grad(full.sum(), c.core)[0], got)


@pytest.mark.parametrize("norm", **ALL_NORMS)
def test_only_what_is_asked_for(norm):
    c = case()
    everything = torch.autograd.grad(c.ours(norm).sum(), c.trained())
    for i, tensor in enumerate(c.trained()):
        for t in c.trained():
            t.requires_grad_(t is tensor)
        torch.testing.assert_close(
            torch.autograd.grad(c.ours(norm).sum(), tensor)[0],
            everything[i],
            rtol=1e-12,
            atol=1e-12,
        )
        for t in c.trained():
            t.requires_grad_()


@pytest.mark.parametrize(
    "norm",
    [n for n in NORMS.values() if n is not None and n.ref != "max"],
    ids=[k for k, n in NORMS.items() if n is not None and n.ref != "max"],
)
def test_a_zero_change_passes_gradients_to_the_core(norm):
    """At the start d == 0 everywhere: out is b, and the core must still learn."""
    c = case(decay=False)
    with torch.no_grad():
        c.core.zero_()
        c.adapter_bias.zero_()
    y = c.ours(norm)
    torch.testing.assert_close(y, torch.nn.functional.linear(c.x, c.W, c.bias), rtol=0, atol=0)
    dx, dcore, dbias = torch.autograd.grad(y, c.trained(), torch.ones_like(y))
    torch.testing.assert_close(dx, torch.ones_like(y) @ c.W)
    assert dcore.abs().min() > 0 and dbias.abs().min() > 0
    z, leaves = c.eager(norm)
    for a, e in zip((dx, dcore, dbias), torch.autograd.grad(z.sum(), leaves), strict=True):
        torch.testing.assert_close(a, e)
