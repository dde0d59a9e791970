"""Error against float64: no more than eager PyTorch's in the same dtype, plus 1e-6."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import PRECISION_NORMS as NORMS
from layer_cases import (
    case,
    check_no_more_than_eager,
    skip_where_low_precision_jumps,
    small_change,
)

from secura_kernels import SMagNorm
from secura_kernels.backends.reference.gate import decode, encode

# (M, N, K, r): a layer; ragged; the published rank; few tokens.
SHAPES = [(192, 128, 256, 32), (133, 131, 67, 7), (96, 160, 176, 150), (5, 96, 64, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_error_is_no_more_than_eager(name, dtype):
    skip_where_low_precision_jumps(NORMS[name], dtype)
    check_no_more_than_eager(
        [
            small_change(*shape, dtype=dtype, tied=tied, biases=biases)
            for shape in SHAPES
            for tied, biases in ((True, True), (True, False), (False, False))
        ],
        NORMS[name],
        "auto",
    )


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


dimension = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(0, 40),
    N=dimension,
    K=dimension,
    data=st.data(),
    norm=st.sampled_from(list(NORMS.values())),
    tied=st.booleans(),
    biases=st.booleans(),
    strided=st.booleans(),
)
def test_any_shape_and_stride(M, N, K, data, norm, tied, biases, strided):
    r = data.draw(st.integers(1, min(N, K)), label="r")
    c = case(M, N, K, r, tied=tied, bias=biases, adapter_bias=biases)
    if strided:
        c.x = torch.randn(2 * M, K + 3, dtype=torch.float64)[::2, 1 : K + 1].requires_grad_()
        c.W = torch.randn(K, N, dtype=torch.float64).T
    y, (z, leaves) = c.ours(norm), c.eager(norm)
    assert y.shape == (M, N) and y.is_contiguous()
    torch.testing.assert_close(y, z)
    dy = torch.randn(N, M, dtype=torch.float64).T if strided else torch.randn_like(z)
    for a, b in zip(
        torch.autograd.grad(y, c.trained(), dy), torch.autograd.grad(z, leaves, dy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_more_than_one_block_of_rows(norm, monkeypatch):
    from secura_kernels.backends.reference import blocks

    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 100)
    assert len(list(blocks.row_blocks(23, 30))) > 5
    c = case(M=23, N=30, K=20, r=5)
    y, (z, leaves) = c.ours(norm), c.eager(norm)
    torch.testing.assert_close(y, z)
    dy = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, c.trained(), dy), torch.autograd.grad(z, leaves, dy), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_nan_and_zeros(norm):
    """A NaN reaches the outputs of its token and no other; a zero base or change gives no NaN."""
    c = case(M=6, decay=False)
    with torch.no_grad():
        c.x[2, 3] = torch.nan
    y = c.ours(norm)
    whole = norm is not None and norm.domain == "output" and norm.ref == "max"
    assert y[2].isnan().all() and (whole or not y[[0, 1, 3, 4, 5]].isnan().any())
    c = case(M=6, decay=False)
    with torch.no_grad():
        c.x[1] = 0
        c.W[3] = 0
        c.bias.zero_()
        c.adapter_bias.zero_()
    y = c.ours(norm)
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), c.trained()))
