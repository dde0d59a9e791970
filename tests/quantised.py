"""Quantised linear layers by name, for the tests of the PEFT method over them."""

import pytest
import torch
from layer_cases import relative_error
from torch import Tensor, nn

from secura_kernels.backends import reference
from secura_kernels.backends.reference.gate import decode, encode, inverse_gate

BNB = ("nf4", "nf4 double", "int8")
TORCHAO = ("torchao int8", "torchao float8", "torchao int4", "torchao nvfp4")
KINDS = BNB + TORCHAO


def torchao_config(kind: str):
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )

    return {
        "torchao nvfp4": lambda: NVFP4WeightOnlyConfig(),
        "torchao int8": lambda: Int8WeightOnlyConfig(),
        "torchao float8": lambda: Float8WeightOnlyConfig(),
        "torchao int4": lambda: IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=PerGroup(32)
        ),
        "torchao int8 dynamic": lambda: Int8DynamicActivationInt8WeightConfig(),
    }[kind]()


def bnb_layer(kind: str, N: int, K: int, bias: bool = True, dtype: torch.dtype = torch.float32):
    """One that has not been quantised yet."""
    bnb = pytest.importorskip("bitsandbytes")
    if kind == "int8":
        return bnb.nn.Linear8bitLt(K, N, bias=bias, has_fp16_weights=False)
    return bnb.nn.Linear4bit(
        K,
        N,
        bias=bias,
        quant_type="nf4",
        compute_dtype=dtype,
        compress_statistics=kind == "nf4 double",
    )


def quantised(kind: str, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """A layer of this W (N, K), quantised."""
    N, K = weight.shape
    layer = nn.Linear(K, N, bias=bias is not None, dtype=weight.dtype).requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    if kind in BNB:
        plain, layer = layer, bnb_layer(kind, N, K, bias is not None, weight.dtype).to(weight.dtype)
        layer.load_state_dict(plain.state_dict())
        layer.support_avx512bf16_for_cpu = False  # see ``peft/quantised.py``
        return layer.to("cpu").requires_grad_(False)
    config = torchao_config(kind)
    from torchao import quantize_

    quantize_(layer, config)
    return layer


def dequantised(layer: nn.Module) -> Tensor:
    """W (N, K) of a layer that has not run yet."""
    weight = layer.weight
    if type(weight).__name__ == "Params4bit":
        import bitsandbytes as bnb

        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).clone()
    if type(weight).__name__ == "Int8Params":
        import bitsandbytes as bnb

        return bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return weight.dequantize().detach().clone()


def weight_and_bias(N=64, K=96, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        (torch.randn(N, K, generator=generator) / K**0.5).to(dtype),
        torch.randn(N, generator=generator).to(dtype),
    )


def leaves_of(adapter, dtype=None):
    return {
        name: p.detach().to(dtype or p.dtype).requires_grad_()
        for name, p in adapter.named_parameters()
    }


def check_no_more_than_eager(trials, dtype):
    """y, dx and every trained tensor's gradient of layers over quantised bases against float64,
    pooled.

    Args:
        trials: for each its model, its layer, what gives W (N, K) of the base, and the base's bias.
    """
    pairs = {}
    for model, layer, matrix, bias in trials:
        model.train()
        adapter, base = layer.secura_adapter["default"], layer.get_base_layer()
        C, R, W = adapter.C, adapter.R, matrix()
        if adapter.basis == "raw":
            assert torch.equal(C, W[:, adapter.cols]) and torch.equal(R, W[adapter.rows])
        x = torch.randn(2, 60, 96).to(dtype).requires_grad_()
        dy = torch.randn(2, 60, 64).to(dtype)
        base(x)  # in bfloat16 AWQ's scales are rounded to it in the first forward pass
        W = matrix()

        def gradients(y, x, leaves, dy=dy):
            return y, *torch.autograd.grad(y, [x, *leaves.values()], dy.to(y.dtype))

        ours = gradients(model(x), x, dict(adapter.named_parameters()))
        assert ours[0].dtype == dtype
        leaves, z = leaves_of(adapter), x.detach().requires_grad_()
        eager = gradients(formula(adapter, leaves, z, W, bias, C, R, base), z, leaves)
        leaves, z = leaves_of(adapter, torch.float64), x.detach().double().requires_grad_()
        true = gradients(
            formula(adapter, leaves, z, W.double(), bias.double(), C.double(), R.double()),
            z,
            leaves,
        )
        for name, *found in zip(("y", "x", *leaves), ours, eager, true, strict=True):
            pairs.setdefault(name, []).append(
                [relative_error(value, found[-1]) for value in found[:2]]
            )
    assert pairs
    for name, found in pairs.items():
        mine, plain = torch.tensor(found).square().mean(0).sqrt().tolist()
        assert mine <= plain + 1e-6, f"{name}: {mine:.3e}, eager {plain:.3e}"
        assert plain < (1e-5 if dtype == torch.float32 else 3e-2), name  # the base's own gradient


def formula(adapter, leaves, x, W, bias, C, R, base=None):
    """The method as it is written, over ``base(x)`` where given; y and gradients follow in W's
    dtype in the weight domain, else in x's."""
    core = leaves["U"] if "U" in leaves else reference.cabr_core(leaves["A"], leaves["B"])
    if adapter.fold_c is not None:
        core = adapter.fold_c.to(core.dtype) @ core @ adapter.fold_r.to(core.dtype)
    norm, adapter_bias = adapter.norm, leaves.get("adapter_bias")
    if base is None or (norm is not None and norm.domain == "weight"):
        return reference.cur_linear(
            x.to(W.dtype),
            W,
            bias.to(W.dtype),
            core,
            C.to(W.dtype),
            R.to(W.dtype),
            norm=norm,
            adapter_bias=adapter_bias,
        ).to(x.dtype)
    y0 = base(x)
    delta = (x @ R.to(x.dtype).T) @ core.to(x.dtype).T @ C.to(x.dtype).T
    if adapter_bias is not None:
        delta = delta + adapter_bias.to(x.dtype)
    if norm is None:
        return y0 + delta
    b, d = y0.float(), delta.float()
    s = inverse_gate(b, d, norm, None).detach()
    saved = decode(encode(s, norm, x.dtype), norm, torch.float32)  # bfloat16: in 8 bits
    out = norm.base_weight * b + d
    return (out * saved + (out * (s - saved)).detach()).to(x.dtype)
