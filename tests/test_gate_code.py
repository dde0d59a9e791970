"""The saved gate: s in 8 or 16 bits."""

import math

import pytest
import torch

from secura_kernels import SMagNorm
from secura_kernels.backends.reference.gate import decode, encode


@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [
        (torch.bfloat16, 2**-9),  # bfloat16's own largest relative rounding error
        (torch.float16, 2**-11 / 30),
        (torch.float32, 0),
        (torch.float64, 0),
    ],
)
@pytest.mark.parametrize(
    "norm",
    [
        SMagNorm(),
        SMagNorm.preset("published"),
        SMagNorm.preset("figure"),
        SMagNorm(shift=-50, beta=1.0),
    ],
    ids=["calibrated", "published", "figure", "always 1"],
)
def test_code_of_the_saved_gate(dtype, allowed, norm):
    wide = torch.promote_types(dtype, torch.float32)
    g = torch.linspace(1, max(norm.gate_at_zero, norm.base_weight), 10_001, dtype=wide)
    s = g.reciprocal()
    back = decode(encode(s, norm, dtype), norm, wide)
    assert ((back - s).abs() / s).max() <= allowed + 1e-6
    unmoved = torch.tensor([1 / norm.base_weight], dtype=wide)
    torch.testing.assert_close(
        decode(encode(unmoved, norm, dtype), norm, wide), unmoved, rtol=2e-7, atol=0
    )
    assert torch.isfinite(decode(encode(s * math.nan, norm, torch.bfloat16), norm, wide)).all()
