"""Bases that compute in a lower precision than they keep their weight in, and bases whose form is
not known: PEFT's method over a linear layer's own forward pass, or one clear error."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from layer_cases import relative_error
from peft_models import layers, move, peft

from secura_kernels.backends import reference

FORMS = {
    "curlora": dict(variant="curlora"),
    "secura": dict(variant="secura", m=12),
    "orthonormal": dict(variant="curlora", basis="orthonormal"),
}


def float8_training(model: nn.Module, recipe: str) -> nn.Module:
    """Converted by torchao; its float8 products are emulated where there is no such GPU."""
    float8 = pytest.importorskip("torchao.float8")
    config = float8.Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(config, "emulate", True)  # frozen, and no recipe has it
    return float8.convert_to_float8_training(model, config=config)


@pytest.mark.parametrize("first", ["converted", "adapted"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_float8_training_keeps_its_own_product(recipe, form, first):
    """y is the float8 layer's own output plus the change, and dx its own input gradient plus the
    change's, whichever came first; pooled over seeds, no further from float64 over the same base
    than eager PyTorch."""
    pairs = {}
    for seed in range(3):
        torch.manual_seed(seed)
        plain = nn.Sequential(nn.Linear(96, 64)).bfloat16().requires_grad_(False)
        weight = plain[0].weight.detach().clone()
        if first == "converted":
            float8_training(plain, recipe)
        model = move(peft(plain, target_modules=["0"], r=8, **FORMS[form]), std=0.3).train()
        if first == "adapted":
            float8_training(model, recipe)
        (layer,) = layers(model).values()
        base, adapter = layer.get_base_layer(), layer.secura_adapter["default"]
        assert type(base).__name__ == "Float8Linear" and torch.equal(base.weight, weight)
        x, dy = torch.randn(48, 96).bfloat16(), torch.randn(48, 64).bfloat16()
        z = x.clone().requires_grad_()
        y = model(z)
        trained = dict(adapter.named_parameters())
        ours = y, *torch.autograd.grad(y, [z, *trained.values()], dy)
        eager = change(layer, adapter, x, dy, torch.bfloat16)
        truth = change(layer, adapter, x, dy, torch.float64)
        z = x.clone().requires_grad_()
        y0 = base(z)
        (dx0,) = torch.autograd.grad(y0, z, dy)
        for found in (eager, truth):
            found[0], found[1] = found[0] + y0, found[1] + dx0
        for name, mine, other, true in zip(("y", "x", *trained), ours, eager, truth, strict=True):
            errors = [relative_error(mine, true), relative_error(other, true)]
            pairs.setdefault(name, []).append(errors)
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))
    for name, found in pairs.items():
        mine, plain = torch.tensor(found).square().mean(0).sqrt().tolist()
        assert mine <= plain + 1e-6 and plain < 3e-2, f"{name}: {mine:.3e}, eager {plain:.3e}"


def change(layer, adapter, x, dy, dtype):
    """The change of a layer in one dtype, and the gradients of x and of what is trained."""
    z = x.to(dtype).requires_grad_()
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {n: p.detach().to(kept).requires_grad_() for n, p in adapter.named_parameters()}
    core = leaves["U"] if "U" in leaves else reference.cabr_core(leaves["A"], leaves["B"])
    if adapter.fold_c is not None:
        core = adapter.fold_c.to(core.dtype) @ core @ adapter.fold_r.to(core.dtype)
    C, R = (matrix.to(dtype) for matrix in layer.C_and_R(adapter))
    out = adapter.alpha * (z @ R.T) @ core.to(dtype).T @ C.T
    if "adapter_bias" in leaves:
        out = out + leaves["adapter_bias"].to(dtype)
    return [out, *torch.autograd.grad(out, [z, *leaves.values()], dy.to(dtype))]


def fine_grained_float8():
    from transformers.integrations.finegrained_fp8 import FP8Linear

    return FP8Linear(128, 128, block_size=(128, 128))


def packed():
    """As compressed-tensors leaves an nn.Linear: its class, and no weight."""
    layer = nn.Linear(32, 32)
    del layer.weight
    layer.register_parameter("weight_scale", nn.Parameter(torch.ones(32, 1), requires_grad=False))
    packed = torch.zeros(32, 4, dtype=torch.int32)
    layer.register_parameter("weight_packed", nn.Parameter(packed, requires_grad=False))
    return layer


class OwnLinear(nn.Module):
    """A quantised layer of a library that nobody here has heard of."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(32, 32, dtype=torch.int8))

    def forward(self, x):
        return x @ self.dequantize().T

    def dequantize(self):
        return self.qweight.float()


UNKNOWN = {
    "fine-grained float8": (fine_grained_float8, r"float8_e4m3fn \(it keeps weight_scale_inv\)"),
    "packed": (packed, r"NoneType \(it keeps weight_packed, weight_scale\).*run_compressed=False"),
    "own class": (OwnLinear, "OwnLinear, which SECURA cannot adapt"),
}


@pytest.mark.parametrize(("make", "words"), UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_form_is_refused(make, words):
    model = nn.Sequential(make())
    with pytest.raises(TypeError, match=words):
        peft(model, target_modules=["0"], r=8, variant="curlora")
    assert not layers(model)


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_torchaos_mx_weights_are_refused(kind):
    """torchao 0.18 has no product for them without quantised activations."""
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    layer = nn.Linear(64, 64)
    dtype = torch.float8_e4m3fn if kind == "fp8" else torch.float4_e2m1fn_x2
    weight = MXTensor.to_mx(layer.weight.detach(), dtype, 32)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(TypeError, match="MXTensor, whose input gradient has not been checked"):
        peft(nn.Sequential(layer), target_modules=["0"], r=8, variant="curlora")
    with pytest.raises(AssertionError, match="weight-only"):
        layer(torch.randn(2, 64))
