"""The PEFT method over layers that have no weight (GPTQ, AWQ, HQQ): float64 on the dequantised
weight is the truth; the layer's own forward pass runs; what would be wrong is refused.

The kinds without "minimal" are the packages' own layers, and are left out where those are not
installed.
"""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import packed_layers
from layer_cases import relative_error
from packed_layers import PACKED, matrix_of, packed
from peft_models import layers, logits, move, peft
from quantised import check_no_more_than_eager, weight_and_bias

GATE_FREE = dict(variant="secura", m=12)
GATED = GATE_FREE | dict(norm="calibrated")
WEIGHT = GATED | dict(norm_domain="weight")
FORMS = {
    "raw": dict(variant="curlora", basis="raw"),
    "orthonormal": GATE_FREE | dict(basis="orthonormal"),
    "svd": dict(variant="curlora", basis="svd"),
    "gated": GATED | dict(adapter_bias=True),
    "weight": WEIGHT,
}
# Each kind in the dtype that it is loaded in, and in another that it runs in.
DTYPES = [(k, d) for k in PACKED for d in (torch.bfloat16, torch.float32 if k == "hqq" else None)]
DTYPES = [(kind, dtype or torch.float16) for kind, dtype in DTYPES]


@pytest.fixture(autouse=True)
def gptqmodel_as_if_installed(monkeypatch):
    packed_layers.as_if_installed(monkeypatch)


def adapted(kind, dtype, seed=0, std=0.02, **settings):
    """A model of one packed layer of (64, 96) under an adapter."""
    weight, bias = weight_and_bias(seed=seed)
    model = nn.Sequential(packed(kind, weight, bias, dtype))
    model = peft(model, target_modules=["0"], r=8, **settings)
    return move(model, std=std), next(iter(layers(model).values()))


def bits_of(base):
    """All that a layer computes with, copied."""
    return {k: v.clone() for k, v in base.state_dict().items() if isinstance(v, torch.Tensor)}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name


@pytest.mark.parametrize("kind", PACKED)
def test_W_is_what_the_layer_multiplies_by(kind):
    weight, _ = weight_and_bias()
    base = packed(kind, weight)
    model = peft(nn.Sequential(base), target_modules=["0"], r=8)
    W = next(iter(layers(model).values())).base_matrix()
    if kind != "hqq":
        assert W.dtype == torch.float16 and torch.equal(W, matrix_of(weight))
    one = torch.eye(96, dtype=W.dtype)
    with model.disable_adapter():
        assert torch.equal(logits(model, one), W.T)
        assert torch.equal(logits(model, one), logits(base, one))
    assert 0.01 < relative_error(W, weight) < 0.15


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "dtype"), DTYPES, ids=str)
def test_error_is_no_more_than_eager_over_the_same_base(kind, dtype, form):
    """y, dx and every trained tensor's gradient, pooled over seeds."""

    def trials():
        for seed in range(12):
            torch.manual_seed(seed)
            model, layer = adapted(kind, dtype, seed, std=0.3, **FORMS[form])
            yield model, layer, layer.base_matrix, layer.get_base_layer().bias

    check_no_more_than_eager(trials(), dtype)


@pytest.mark.parametrize("kind", PACKED)
def test_change_is_that_over_a_plain_layer_of_the_same_weight(kind):
    """Of an ``nn.Linear`` with the dequantised weight, where C and R are slices."""
    model, layer = adapted(kind, torch.float32, std=0.3, **GATE_FREE)
    plain = nn.Linear(96, 64)
    with torch.no_grad():
        plain.weight.copy_(layer.base_matrix())
    plain = move(peft(nn.Sequential(plain), target_modules=["0"], r=8, **GATE_FREE), std=0.3)
    here, there = layer, next(iter(layers(plain).values()))
    for name in ("cols", "rows"):
        assert torch.equal(*(getattr(m.secura_adapter["default"], name) for m in (here, there)))
    x, changes = torch.randn(5, 96), []
    for one in (model, plain):
        with one.disable_adapter():
            y0 = logits(one, x)
        changes.append(logits(one, x) - y0)
    eps = torch.finfo(layer.base_matrix().dtype).eps  # C and R are kept in that dtype
    assert relative_error(*changes) < max(eps, 1e-5)
    changes = [m.get_delta_weight("default") for m in (here, there)]
    assert relative_error(*changes) < max(eps, 1e-5)


@pytest.mark.parametrize("kind", PACKED)
def test_several_adapters_switched_summed_and_in_one_batch(kind):
    model, layer = adapted(kind, torch.float32, std=0.3, **GATE_FREE)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    move(model, "other", seed=1)
    x = torch.randn(3, 96)
    with model.disable_adapter():
        y0 = logits(model, x)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model, x)
    assert torch.equal(y0, logits(layer.get_base_layer(), x))
    assert relative_error(alone["default"], alone["other"]) > 0.01
    model.base_model.set_adapter(["default", "other"])
    both = alone["default"] + alone["other"] - y0
    assert relative_error(logits(model, x), both) < 1e-5
    mixed = logits(model, x, adapter_names=["other", "__base__", "default"])
    expected = torch.stack([alone["other"][0], y0[1], alone["default"][2]])
    assert relative_error(mixed, expected) < 1e-5


@pytest.mark.parametrize("kind", PACKED)
def test_a_deep_copy_is_independent(kind):
    model, layer = adapted(kind, torch.float32, **GATED)
    x = torch.randn(4, 96)
    y = logits(model, x)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, x), y)
    copied = next(iter(layers(other).values()))
    assert torch.equal(copied.base_matrix(), layer.base_matrix())
    scales = copied.get_base_layer()
    (scales.meta["scale"] if kind == "hqq" else scales.scales).mul_(2)
    move(other, seed=3)
    assert relative_error(copied.base_matrix(), layer.base_matrix()) > 0.4
    assert not torch.equal(logits(other, x), y) and torch.equal(logits(model, x), y)


def test_dequantised_by_the_class_s_own_method():
    """Not by the compiled one that GPTQModel puts on the layer: in a deep copy of the layer it
    still dequantises the layer that was copied."""
    base = packed("minimal gptq", *weight_and_bias())
    base.dequantize_weight = lambda: pytest.fail("the compiled method was called")
    assert layers(peft(nn.Sequential(base), target_modules=["0"], r=8))


@pytest.mark.parametrize("kind", [k for k in PACKED if k != "hqq"])
@pytest.mark.parametrize("form", ["orthonormal", "weight"])
def test_merging_is_refused_before_anything_is_changed(kind, form):
    weight, bias = weight_and_bias()
    plain = nn.Linear(96, 64)
    model = nn.Sequential(plain, nn.Linear(64, 96), packed(kind, weight, bias))
    model = move(peft(model, target_modules=["0", "2"], r=8, **FORMS[form]))
    x = torch.randn(3, 96)
    y, W = logits(model, x), plain.weight.clone()
    packed_layer = list(layers(model).values())[1]
    before, base = bits_of(packed_layer.get_base_layer()), packed_layer.get_base_layer()
    for merge in (model.merge_adapter, model.merge_and_unload, packed_layer.merge):
        with pytest.raises(ValueError, match="save_as_lora"):
            merge()
    assert torch.equal(plain.weight, W) and torch.equal(logits(model, x), y)
    assert_same(bits_of(base), before)
    change = packed_layer.get_delta_weight("default")
    assert change.shape == (64, 96) and change.norm() > 0
    unloaded = model.unload()
    assert unloaded[2] is base and unloaded[0] is plain
    assert_same(bits_of(base), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hqq_merges_by_quantising_again_and_unmerges_every_bit(dtype):
    model, layer = adapted("hqq", dtype, std=0.05, **WEIGHT | dict(adapter_bias=True))
    base = layer.get_base_layer()
    x = torch.randn(5, 96).to(dtype)
    y, before, W, bias = logits(model, x), bits_of(base), layer.base_matrix(), base.bias.clone()
    change = layer.get_delta_weight("default")
    assert relative_error(W + change, W) > 0.005
    with pytest.warns(UserWarning, match="quantised the weight again"):
        model.merge_adapter(safe_merge=True)
    added = bias + layer.secura_adapter["default"].adapter_bias.detach()
    fresh = packed("hqq", (W.float() + change).to(W.dtype), added, dtype)
    assert layer.get_base_layer() is base
    assert torch.equal(base.dequantize(), fresh.dequantize())
    assert torch.equal(logits(model, x), logits(fresh, x))
    lost = (fresh.dequantize().float() - W.float() - change).norm() / change.norm()
    assert layer.requantisation_error == pytest.approx(float(lost), rel=1e-3)
    assert torch.equal(layer.base_matrix(), W)  # the one from before: C and R are its
    assert torch.equal(layer.get_delta_weight("default"), change)
    model.unmerge_adapter()
    assert_same(bits_of(base), before)
    assert torch.equal(logits(model, x), y) and layer.requantisation_error is None
    with pytest.warns(UserWarning):
        unloaded = model.merge_and_unload()
    assert unloaded[0] is base and torch.equal(logits(unloaded, x), logits(fresh, x))


def test_an_hqq_merge_that_cannot_be_changes_nothing(monkeypatch):
    model, layer = adapted("hqq", torch.float32, **GATE_FREE)
    base, x = layer.get_base_layer(), torch.randn(3, 96)
    y, before = logits(model, x), bits_of(base)

    def broken(*_):
        base.W_q = None
        raise RuntimeError("out of memory")

    monkeypatch.setattr(layer.quantization_backend, "set_base_weight", broken, raising=True)
    with pytest.raises(ValueError, match="cannot be quantised again: out of memory"):
        model.merge_adapter()
    assert_same(bits_of(base), before)
    assert torch.equal(logits(model, x), y) and not layer.merged


@pytest.mark.parametrize("form", [GATED, WEIGHT, GATE_FREE], ids=["output", "weight", "free"])
@pytest.mark.parametrize("kind", [k for k in PACKED if k != "hqq"])  # whose inputs have its dtype
def test_moved_to_another_dtype(kind, form):
    model, layer = adapted(kind, torch.float32, **form)
    x = torch.randn(3, 5, 96)
    y = logits(model, x)
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        assert layer.base_matrix().dtype == layer.secura_adapter["default"].C.dtype == dtype
        # The scales were rounded to bfloat16.
        assert relative_error(logits(model, x.to(dtype)), y) < 2e-2


@pytest.mark.parametrize("kind", PACKED)
def test_names_of_the_state(kind):
    model, layer = adapted(kind, torch.float32, **GATED)
    base = layer.get_base_layer()
    own = {f"base_model.model.0.base_layer.{name}" for name in base.state_dict()}
    adapter = {
        f"base_model.model.0.secura_adapter.default.{name}"
        for name in layer.secura_adapter["default"].state_dict()
    }
    assert set(model.state_dict()) == own | adapter
    assert {n for n, p in model.named_parameters() if p.requires_grad} <= adapter


def hqq(monkeypatch, name=None):
    core = pytest.importorskip("hqq.core.quantize")
    base = packed("hqq", *weight_and_bias())
    if name is not None:
        # What ``set_backend`` does; ATEN's own is missing on a machine without a GPU.
        forward = getattr(core.HQQLinear, core.HQQBackend[name].value)
        monkeypatch.setattr(core.HQQLinear, "forward", forward)
    return base


def hqq_without_bits(monkeypatch):
    core = pytest.importorskip("hqq.core.quantize")
    return core.HQQLinear(None, packed_layers.hqq_config(), device="cpu")


def hqq_subclass(monkeypatch):
    base = hqq(monkeypatch)
    base.__class__ = type("Own", (type(base),), {})
    return base


def gptq(**attributes):
    base = packed("minimal gptq", *weight_and_bias())
    vars(base).update(attributes)
    return base


REFUSED = {
    "a kernel's class": (
        lambda _: packed_layers.MarlinLinear(96, 64, True),
        r"MarlinLinear .* GPTQModel .* backend='torch'",
    ),
    "a subclass": (lambda _: type("Own", (packed_layers.TorchLinear,), {})(96, 64, True), "torch_"),
    "rotated": (lambda _: gptq(online_full_had=True), "rotates its input"),
    "EoRA": (lambda _: gptq(adapter=object()), "EoRA"),
    "HQQ, ATEN": (lambda m: hqq(m, "ATEN"), r"forward_aten_backprop.*HQQBackend\.PYTORCH"),
    "HQQ, int8": (lambda m: hqq(m, "ATEN_FORWARD_INT8"), "forward_aten_int8"),
    "HQQ, not quantised": (hqq_without_bits, "not yet quantised"),
    "HQQ, a subclass": (hqq_subclass, "subclass of HQQLinear"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_reason(make, words, monkeypatch):
    with pytest.raises(TypeError, match=f"cannot be adapted: it is .*|{words}") as refusal:
        peft(nn.Sequential(make(monkeypatch)), target_modules=["0"], r=8, **GATED)
    assert refusal.match(words) and refusal.match("target_modules matches a")


def test_hqq_without_a_backward_pass_of_its_own(monkeypatch):
    """``PYTORCH_FORWARD``: autograd's."""
    base = hqq(monkeypatch, "PYTORCH_FORWARD")
    model = peft(nn.Sequential(base), target_modules=["0"], r=8)
    x = torch.randn(3, 96, requires_grad=True)
    model(x).sum().backward()
    assert relative_error(x.grad[0], base.dequantize().sum(0)) < 1e-6


def test_a_class_that_nobody_knows():
    class Packed(nn.Module):
        pass

    with pytest.raises(TypeError, match="which SECURA cannot adapt"):
        peft(nn.Sequential(Packed()), target_modules=["0"], r=8)
