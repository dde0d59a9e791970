"""Layers that share an input, and how they are compared with their equals by themselves."""

import copy

import pytest
import torch
from torch import nn

from secura_kernels import (
    CURLoRALinear,
    ImportanceDecay,
    SECURALinear,
    SMagNorm,
    fuse_projections,
)

QKV, SIZES, K, M = ("q_proj", "k_proj", "v_proj"), (20, 8, 12), 24, 10
FORMS = {
    "CURLoRA": (CURLoRALinear, {}),
    "raw": (CURLoRALinear, dict(basis="raw")),
    "SECURA": (SECURALinear, {}),
    "gate": (SECURALinear, dict(norm="calibrated")),
    "full gate": (SECURALinear, dict(norm=SMagNorm(detach_gate=False))),
    "decay": (
        SECURALinear,
        dict(norm="published", importance_decay=ImportanceDecay(edge=1.9, ratio=0.1)),
    ),
}
every_form = pytest.mark.parametrize("form", FORMS)


class Attention(nn.Module):
    """q, k and v of one input, or of two."""

    def __init__(self, form="CURLoRA", bias=False, dtype=torch.float64, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        kind, settings = FORMS[form]
        for name, N in zip(QKV, SIZES, strict=True):
            layer = kind.from_linear(nn.Linear(K, N, bias, dtype=dtype), 4, **settings)
            setattr(self, name, layer)
            with torch.no_grad():
                for parameter in layer.learned_parameters():
                    parameter.normal_(std=0.1)

    def forward(self, x, other=None):
        other = x if other is None else other
        return self.q_proj(x), self.k_proj(other), self.v_proj(other)


def pair(*args, **kwargs):
    """A module and its equal, fused."""
    separate = Attention(*args, **kwargs)
    fused = copy.deepcopy(separate)
    assert fuse_projections(fused) == 1
    return separate, fused


def inputs(dtype=torch.float64, shape=(M, K)):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def run(model, x=None, call=None, used=(0, 1, 2), **kwargs):
    """Outputs; gradients of the input and, by name, of what trains."""
    x = inputs() if x is None else x.detach().requires_grad_()
    model.zero_grad()
    y = (model if call is None else call)(x, **kwargs)
    sum((i + 1) * (y[i] * (y[i] + 1)).double().sum() for i in used).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [part.detach() for part in y], gradients, x.grad


def assert_same(found, expected):
    """Outputs and what is trained to the bit; float64 gradients of the input to rounding."""
    for a, b in zip(found[0], expected[0], strict=True):
        assert torch.equal(a, b)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        assert torch.equal(gradient, expected[1][name]), name
    torch.testing.assert_close(found[2], expected[2], rtol=1e-12, atol=1e-12)


def relative_error(value, truth):
    return float((value.double() - truth).norm() / truth.norm())
