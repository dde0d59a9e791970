"""The PEFT method over quantised bases (bitsandbytes, torchao): float64 on the dequantised weight
is the truth; whatever would be wrong is refused."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from layer_cases import relative_error
from peft_models import layers, logits, move, peft
from quantised import (
    KINDS,
    TORCHAO,
    bnb_layer,
    check_no_more_than_eager,
    dequantised,
    quantised,
    torchao_config,
    weight_and_bias,
)

GATE_FREE = dict(variant="secura", m=12)
GATED = GATE_FREE | dict(norm="calibrated")
WEIGHT = GATED | dict(norm_domain="weight")
FORMS = {
    "curlora": dict(variant="curlora"),
    "secura": GATED,
    "orthonormal": GATE_FREE | dict(basis="orthonormal"),
    "weight": WEIGHT,
    "svd": dict(variant="curlora", basis="svd"),
}
MERGEABLE = WEIGHT | dict(adapter_bias=True)


def base_model(kind, dtype=torch.float32, seed=0, requantisable=True):
    """A model of one quantised layer, and its W (N, K) and bias."""
    weight, bias = weight_and_bias(dtype=dtype, seed=seed)
    layer = quantised(kind, weight, bias)
    layer.support_avx512bf16_for_cpu = True  # as a new layer of 4 bits on such a CPU
    model = nn.Sequential(layer)
    if kind in TORCHAO and requantisable:  # as transformers leaves it
        model.hf_quantizer = SimpleNamespace(
            quantization_config=SimpleNamespace(
                get_apply_tensor_subclass=lambda: torchao_config(kind)
            )
        )
    return model, dequantised(layer), bias


def adapted(kind, dtype=torch.float32, seed=0, std=0.02, requantisable=True, **settings):
    base, W, bias = base_model(kind, dtype, seed, requantisable)
    model = peft(base, target_modules=["0"], r=8, **settings)
    return move(model, std=std), next(iter(layers(model).values())), W, bias


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_no_more_than_eager_over_the_same_base(dtype, form):
    """y, dx and every trained tensor's gradient, pooled over kinds and seeds, as the base's own
    product is most of the error in some; in training, in which nothing rounds x to int8."""

    def trials():
        for kind, seed in itertools.product(KINDS, range(3)):
            model, layer, W, bias = adapted(kind, dtype, seed, std=0.3, **FORMS[form])
            yield model, layer, lambda W=W: W, bias

    check_no_more_than_eager(trials(), dtype)


def everything(layer):
    """All that a base layer computes with, copied."""
    base = layer.get_base_layer()
    attributes = {k: v for k, v in vars(base.weight).items() if not isinstance(v, nn.Module)}
    return copy.deepcopy((dict(base.state_dict()), attributes)), type(base.weight)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor) and type(a).__module__.startswith("torchao"):
        return type(a) is type(b) and same(vars(a), vars(b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_quantises_again_and_unmerge_restores_every_bit(kind, dtype):
    model, layer, W, bias = adapted(kind, dtype, std=0.05, **MERGEABLE)
    x = torch.randn(5, 96).to(dtype)
    y = logits(model, x)
    # bitsandbytes' first forward pass moves statistics from the weight to the layer.
    base, before = logits(layer.get_base_layer(), x), everything(layer)
    change = layer.get_delta_weight("default")
    assert relative_error(W + change, W) > 0.005
    with pytest.warns(UserWarning, match="quantised the weight again"):
        model.merge_adapter(safe_merge=True)
    adapter_bias = layer.secura_adapter["default"].adapter_bias
    fresh = quantised(kind, (W.float() + change).to(W.dtype), (bias + adapter_bias).to(dtype))
    now = layer.quantization_backend.get_base_weight(layer.get_base_layer())
    W_again = dequantised(fresh)
    assert torch.equal(now, W_again)
    assert torch.equal(logits(model, x), logits(fresh.eval(), x))
    lost = torch.linalg.vector_norm(W_again.float() - W.float() - change)
    assert layer.requantisation_error == pytest.approx(
        float(lost / torch.linalg.vector_norm(change)), rel=1e-3
    )
    assert torch.equal(layer.get_delta_weight("default"), change)  # C and R are the first W's
    model.to("cpu")
    logits(model, x)
    model.unmerge_adapter()
    assert torch.equal(layer.base_matrix(), W)
    model.to("cpu")
    if kind.startswith("nf4"):
        assert layer.get_base_layer().quant_state is layer.get_base_layer().weight.quant_state
    assert torch.equal(logits(layer.get_base_layer(), x), base)
    assert same(everything(layer), before)
    assert torch.equal(logits(model, x), y) and layer.requantisation_error is None


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_merge_one_after_the_other_as_at_once(kind):
    model, layer, _, _ = adapted(kind, variant="curlora")
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    move(model, "other", seed=1)
    with pytest.warns(UserWarning):
        model.merge_adapter(["default", "other"])
    at_once = layer.quantization_backend.get_base_weight(layer.get_base_layer()).clone()
    model.unmerge_adapter()
    with pytest.warns(UserWarning):
        model.merge_adapter(["default"])
        model.merge_adapter(["other"])
    assert torch.equal(layer.quantization_backend.get_base_weight(layer.get_base_layer()), at_once)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_that_cannot_be_changes_nothing(kind, monkeypatch):
    model, layer, _, _ = adapted(kind, requantisable=False, **MERGEABLE)
    x = torch.randn(3, 96)
    y, before = logits(model, x), everything(layer)
    with torch.no_grad():
        layer.secura_adapter["default"].B[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert same(everything(layer), before) and not layer.merged
    if kind in TORCHAO:
        move(model)
        with torch.no_grad():
            layer.secura_adapter["default"].B.nan_to_num_()
        y = logits(model, x)
        with pytest.raises(ValueError, match="TorchAoConfig"):
            model.merge_adapter()
        assert same(everything(layer), before) and not layer.merged
        assert torch.equal(logits(model, x), y)


@pytest.mark.parametrize("wrong", ["torchao float8", "by name"])
def test_torchao_config_that_is_not_the_layers_own(wrong):
    model, layer, _, _ = adapted("torchao int8", **MERGEABLE)
    from torchao.quantization import FqnToConfig

    config = torchao_config("torchao int8" if wrong == "by name" else wrong)
    layer.quantization_backend.get_apply_tensor_subclass = lambda: (
        FqnToConfig({"elsewhere": config}) if wrong == "by name" else config
    )
    before = everything(layer)
    with pytest.raises(ValueError, match="cannot be quantised again"):
        model.merge_adapter()
    assert same(everything(layer), before) and not layer.merged


@pytest.mark.parametrize("kind", ["nf4", "nf4 double"])
def test_evaluation_on_a_cpu_leaves_the_weight_as_it_was(kind):
    """bitsandbytes repacks a 4-bit weight there, after which it dequantises to other values."""
    model, layer, W, bias = adapted(kind, **MERGEABLE)
    x = torch.randn(4, 96)
    for _ in range(2):
        with model.disable_adapter():
            assert relative_error(logits(model, x), x @ W.T + bias) < 1e-6
        logits(model, x)
    assert torch.equal(layer.base_matrix(), W)
    model.train()
    assert model(x.requires_grad_()).requires_grad
    base, _, _ = base_model(kind)
    base[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(TypeError, match="freshly loaded"):
        peft(base, target_modules=["0"], r=8, **GATED)


def float8_weight():
    layer = nn.Linear(32, 32)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def nf4_tensor():
    pytest.importorskip("torchao")
    from torchao.quantization import NF4Tensor

    layer = nn.Linear(64, 64)
    layer.weight = nn.Parameter(
        NF4Tensor.from_tensor(layer.weight.detach(), 64, 64), requires_grad=False
    )
    return layer


def with_fp16_weights():
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.Linear8bitLt(32, 32).to("cpu")


def sharded_by_fsdp2():
    layer = quantised("nf4", torch.randn(32, 32))
    layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    return layer


REFUSED = {
    "int8 dynamic": (
        lambda: quantised("torchao int8 dynamic", torch.randn(32, 32)),
        "Int8WeightOnlyConfig",
    ),
    "4 bits, not quantised": (lambda: bnb_layer("nf4", 32, 32), "not been quantised yet"),
    "8 bits, not quantised": (lambda: bnb_layer("int8", 32, 32), "not yet quantised"),
    "8 bits, float weight": (with_fp16_weights, "has_fp16_weights"),
    "4 bits, sharded": (sharded_by_fsdp2, "FSDP2"),
    "float8 dtype": (float8_weight, "float8_e4m3fn"),
    "unknown wrapper": (nf4_tensor, "NF4Tensor"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_reason(make, words):
    with pytest.raises(TypeError, match=words):
        peft(nn.Sequential(make()), target_modules=["0"], r=8, **GATED)


@pytest.mark.parametrize("name", ["aqlm", "eetq", "inc", "te"])
def test_other_backends_of_peft_are_refused(name, monkeypatch):
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend

    from secura_kernels.peft import quantised as ours

    backend = ForwardOnlyQuantizationBackend(name)
    monkeypatch.setattr(ours, "resolve_quantization_backend", lambda *_, **__: backend)
    with pytest.raises(TypeError, match=f"{name}, which cannot be dequantised.* bitsandbytes"):
        peft(nn.Sequential(nn.Linear(16, 16)), target_modules=["0"], r=8, **GATED)
