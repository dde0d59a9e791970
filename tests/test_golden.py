"""The author's published implementation, reproduced from its recorded inputs and results."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from secura_kernels import SECURALinear, SMagNorm, cur_linear, select
from secura_kernels.backends import reference

GOLDEN = np.load(Path(__file__).parent / "data" / "secura_published.npz")
CASES = ("plain", "biases", "zero_core")
PUBLISHED = SMagNorm.preset("published")


def arrays(case: str) -> dict[str, torch.Tensor]:
    return {k.split("/")[1]: torch.from_numpy(GOLDEN[k]) for k in GOLDEN if k.startswith(case)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("norm", "suffix"), [(PUBLISHED, ""), (None, "_plain")])
def test_reference_reproduces_outputs_and_gradients(case, norm, suffix):
    g = arrays(case)
    x, A, B = (g[n].clone().requires_grad_() for n in ("x", "A", "B"))
    adapter_bias = g["adapter_bias"].clone().requires_grad_() if "adapter_bias" in g else None
    arguments = dict(alpha=1.0, norm=norm, adapter_bias=adapter_bias)
    core = reference.cabr_core(A, B)
    leaves = [x, A, B] if adapter_bias is None or norm is None else [x, A, B, adapter_bias]
    names = ["dx", "dA", "dB", "dadapter_bias"]
    for y in (
        cur_linear(
            x, g["W"], core, cols=g["cols"], rows=g["rows"], bias=g.get("bias"), **arguments
        ),
        reference.cur_linear(
            x.reshape(-1, 48),
            g["W"],
            g.get("bias"),
            core,
            g["W"][:, g["cols"]],
            g["W"][g["rows"]],
            **arguments,
        ).view(2, 9, 40),
    ):
        torch.testing.assert_close(y, g["y" + suffix], rtol=1e-8, atol=1e-8)
        got = torch.autograd.grad(y, leaves, g["dy"], retain_graph=True)
        for name, gradient in zip(names[: len(leaves)], got, strict=True):
            expected = g[name + suffix] if name != "dadapter_bias" else g[name]
            torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_explicit_gradients_of_the_factored_core(case):
    g = arrays(case)
    C, R = g["W"][:, g["cols"]], g["W"][g["rows"]]
    x, dy = g["x"].reshape(-1, 48), g["dy"].reshape(-1, 40)
    dcore = (dy @ C).T @ (x @ R.T)
    dA, dB = reference.cabr_core_backward(dcore, g["A"], g["B"])
    torch.testing.assert_close(dA, g["dA_plain"], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(dB, g["dB_plain"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_update_and_selection(case):
    g = arrays(case)
    cols, rows = select(g["W"], 6, "lowest")
    assert cols.tolist() == g["cols"].tolist() and rows.tolist() == g["rows"].tolist()
    delta = reference.delta_weight(
        reference.cabr_core(g["A"], g["B"]), g["W"][:, cols], g["W"][rows], 1.0
    )
    torch.testing.assert_close(delta, g["delta_weight"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layer(case, dtype):
    g = {k: v if v.dtype == torch.int64 else v.to(dtype) for k, v in arrays(case).items()}
    linear = nn.Linear(48, 40, "bias" in g, dtype=dtype)
    linear.load_state_dict({"weight": g["W"]} | ({"bias": g["bias"]} if "bias" in g else {}))
    layer = SECURALinear.from_linear(
        linear, 6, m=10, basis="raw", norm="published", adapter_bias="adapter_bias" in g
    )
    # The published start came through a float32 SVD: it is the slice to 2e-7 only.
    torch.testing.assert_close(layer.A, g["A"], rtol=0, atol=1e-6)
    with torch.no_grad():
        layer.A.copy_(g["A"])
        layer.B.copy_(g["B"])
        if layer.adapter_bias is not None:
            layer.adapter_bias.copy_(g["adapter_bias"])
    x = g["x"].requires_grad_()
    y = layer(x)
    y.backward(g["dy"])
    tolerance = dict(rtol=1e-8, atol=1e-8) if dtype == torch.float64 else dict(rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(y, g["y"], **tolerance)
    torch.testing.assert_close(x.grad, g["dx"], **tolerance)
    torch.testing.assert_close(layer.A.grad, g["dA"], **tolerance)
    torch.testing.assert_close(layer.B.grad, g["dB"], **tolerance)
    if layer.adapter_bias is not None:
        torch.testing.assert_close(layer.adapter_bias.grad, g["dadapter_bias"], **tolerance)
