"""The PEFT method: settings, which layers it takes, that they are the package's own layers, and
several adapters in one model."""

import copy
import json
import pickle

import pytest
import torch
from peft import PeftConfig, PeftType, get_peft_model
from peft_models import (
    CURLORA,
    GATE_FREE,
    GATED,
    SECURA,
    assert_same_state,
    bert,
    gpt2,
    layers,
    llama,
    logits,
    mlp,
    move,
    peft,
    state,
    t5,
    tokens,
)
from torch import nn

from secura_kernels import CURLoRALinear, ImportanceDecay, SECURALinear, SMagNorm
from secura_kernels.peft import SecuraConfig

# Settings.


@pytest.mark.parametrize(
    "name, value, others",
    [
        ("variant", "lora", {}),
        ("variant", None, {}),
        ("r", 0, {}),
        ("r", 4.0, {}),
        ("r", True, {}),
        ("m", 4, SECURA),
        ("m", 6, dict(variant="curlora", r=4)),
        ("alpha", float("nan"), {}),
        ("alpha", "1", {}),
        ("rank_pattern", ["q_proj"], {}),
        ("rank_pattern['q_proj']", -1, {}),
        ("selection", "random", {}),
        ("seed", -1, {}),
        ("basis", "qr", {}),
        ("norm", "calibrate", {}),
        ("norm", "auto", {}),
        ("norm", dict(steep=1), {}),
        ("scale", 0, {}),
        ("norm_domain", "input", GATED),
        ("norm_domain", "weight", GATE_FREE),
        ("a_init", "svd", SECURA),
        ("adapter_bias", "no", SECURA),
        ("adapter_bias", True, CURLORA),
        ("importance_decay", 0.9, GATED),
        ("importance_decay", dict(ration=0.9), GATED),
        ("decay", 2, GATED),
        ("importance_decay", {}, CURLORA),
        ("importance_decay", {}, GATE_FREE),
        ("impl", "numpy", {}),
        ("save_projection", "no", {}),
        ("layers_pattern", "layers", {}),
        ("layers_to_transform", 1, {}),
        ("layers_to_transform", 1, dict(target_modules=".*q_proj")),
    ],
    ids=lambda v: str(v)[:24],
)
def test_a_bad_setting_gives_one_error_that_names_it(name, value, others):
    given = {name: value}
    if name == "scale":
        given = dict(norm=dict(scale=value))
    elif name == "decay":
        given = dict(importance_decay=dict(decay=value))
    elif name.startswith("rank_pattern["):
        given = dict(rank_pattern=dict(q_proj=value))
    with pytest.raises(ValueError, match="is not allowed: it must be") as error:
        SecuraConfig(**others | given)
    assert str(error.value).startswith(f"{name}=")


def test_the_default_is_curlora_without_a_gate_on_all_linear_layers():
    config = SecuraConfig()
    assert (config.variant, config.norm, config.target_modules) == ("curlora", None, "all-linear")
    assert SecuraConfig(variant="secura").norm is None
    for kind in (CURLoRALinear, SECURALinear):
        assert kind.from_linear(nn.Linear(8, 8), 2).norm is None


def test_selection_and_bias_are_by_default_the_published_ones_of_each_variant():
    secura, curlora = SecuraConfig(variant="secura"), SecuraConfig(variant="curlora")
    assert (secura.selection, secura.adapter_bias) == ("lowest", True)
    assert (curlora.selection, curlora.adapter_bias) == ("inverted", False)
    assert secura.peft_type == PeftType.SECURA == "SECURA"
    assert copy.deepcopy(PeftType.SECURA) is pickle.loads(pickle.dumps(PeftType.SECURA))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        CURLORA,
        GATE_FREE,
        GATED,
        dict(
            variant="secura",
            norm=SMagNorm(ref="max", domain="weight", detach_gate=False),
            m=80,
            alpha=0.5,
        ),
        SECURA | dict(norm="published", importance_decay=True, basis="orthonormal", seed=3),
        GATED | dict(importance_decay=dict(ratio=0.5, edge=1.9, decay=0.5), norm_domain="weight"),
        SECURA
        | dict(
            target_modules=["a", "b"],
            exclude_modules="c.*",
            rank_pattern={"a": 3},
            r=8,
            modules_to_save=["d"],
            layers_to_transform=[1],
            layers_pattern="layers",
        ),
    ],
    ids=lambda s: ",".join(s),
)
def test_settings_pass_through_json(settings, tmp_path):
    config = SecuraConfig(**settings)
    config.save_pretrained(tmp_path)
    for read in (PeftConfig, SecuraConfig):
        assert read.from_pretrained(tmp_path) == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SECURA"


# Which layers.

LLAMA_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
USUAL = dict(target_modules=None)  # the model type's usual ones


@pytest.mark.parametrize(
    "build, settings, wanted",
    [
        (llama, {}, LLAMA_LINEAR),
        (llama, dict(target_modules="all-linear"), LLAMA_LINEAR),
        (llama, dict(exclude_modules=["v_proj"]), LLAMA_LINEAR - {"v_proj"}),
        (llama, USUAL, {"q_proj", "v_proj"}),
        (llama, dict(target_modules=["k_proj"]), {"k_proj"}),
        (llama, dict(target_modules=r".*\.1\..*up_proj"), {"layers.1.mlp.up_proj"}),
        (llama, USUAL | dict(exclude_modules=["v_proj"]), {"q_proj"}),
        (
            llama,
            USUAL | dict(layers_to_transform=1, layers_pattern="layers"),
            {"layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"},
        ),
        (gpt2, {}, {"c_attn", "c_proj", "c_fc"}),
        (gpt2, USUAL, {"c_attn"}),
        (t5, {}, {"q", "k", "v", "o", "wi", "wo"}),
        (t5, USUAL, {"q", "v"}),
        (bert, dict(task_type="SEQ_CLS"), {"query", "key", "value", "dense"}),
        (bert, USUAL, {"query", "value"}),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_which_layers_are_adapted(build, settings, wanted):
    model = get_peft_model(build(), SecuraConfig(r=4, **settings))
    found = [n.removeprefix("base_model.model.") for n in layers(model)]
    for suffix in wanted:
        assert any(n.endswith(suffix) for n in found), suffix
    assert all(n.endswith(tuple(wanted)) for n in found)


def test_rank_pattern():
    pattern = {"v_proj": 2, r"layers\.1\..*q_proj": 6}
    model = peft(llama(), rank_pattern=pattern, **GATED | dict(m=7))
    ranks = {n.split("layers.")[1]: m.secura_adapter["default"].r for n, m in layers(model).items()}
    assert ranks == {
        "0.self_attn.q_proj": 4,
        "0.self_attn.v_proj": 2,
        "1.self_attn.q_proj": 6,
        "1.self_attn.v_proj": 2,
    }


def test_what_cannot_be_adapted_is_refused_by_name():
    with pytest.raises(TypeError, match="target_modules matches a Embedding"):
        peft(llama(), target_modules=["embed_tokens"], **GATED)
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.self_attn.v_proj': r=20 is not"):
        peft(llama(), **GATED | dict(r=20, m=None))  # v_proj has 16 rows
    with pytest.raises(ValueError, match=r"layer '0': m=30 is not allowed.*K=24"):
        peft(mlp(), **GATED | dict(m=30))


@pytest.mark.parametrize(
    "settings",
    [
        GATED,
        GATE_FREE,
        CURLORA,
        GATED | dict(m=None),
        SECURA | dict(norm="published"),
        SECURA | dict(norm="figure"),
        GATED | dict(importance_decay=True),
        CURLORA | dict(norm="calibrated"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "build, dtype",
    [(llama, torch.float32), (llama, torch.bfloat16), (gpt2, torch.float32), (mlp, torch.float64)],
)
def test_an_untrained_adapter_is_the_base_to_the_bit(settings, build, dtype):
    base = build(dtype=dtype)
    x = torch.randn(3, 24, dtype=dtype) if build is mlp else tokens()
    expected = logits(base, x)
    targets = dict(target_modules=["c_attn", "c_proj"]) if build is gpt2 else {}
    assert torch.equal(logits(peft(base, **settings, **targets), x), expected)


@pytest.mark.parametrize(
    "settings",
    [
        GATED,
        GATE_FREE,
        CURLORA,
        GATED | dict(m=None),
        SECURA | dict(norm="published"),
        SECURA | dict(norm="figure"),
        GATED | dict(norm_domain="weight"),
        GATED | dict(adapter_bias=False, a_init="truncated_svd"),
        GATED | dict(m=9, alpha=0.7),
        SECURA | dict(norm=dict(detach_gate=False)),
        CURLORA | dict(basis="orthonormal"),
        GATED | dict(importance_decay=dict(ratio=0.0, edge=1.99, decay=0.5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
def test_a_layer_is_the_packages_own_layer_to_the_bit(settings, conv1d):
    """Outputs, gradients and importance decay over three steps."""
    base = gpt2().transformer.h[0].attn.c_attn if conv1d else nn.Linear(32, 24)
    model = peft(nn.Sequential(copy.deepcopy(base)), **settings | dict(target_modules=["0"]))
    (layer,) = layers(model).values()
    adapter = layer.secura_adapter["default"]
    config = model.peft_config["default"]
    kind, own = (
        SECURALinear,
        dict(m=config.m, a_init=config.a_init, adapter_bias=config.adapter_bias),
    )
    if config.variant == "curlora":
        kind, own = CURLoRALinear, {}
    decay = config.importance_decay
    rival = kind(
        copy.deepcopy(base),
        adapter.cols,
        adapter.rows,
        alpha=config.alpha,
        basis=config.basis,
        norm=config.norm_settings(),
        **own,
        importance_decay=None if decay is None else ImportanceDecay(**decay),
    )
    outputs = []
    for module in (model.train(), rival.train()):
        torch.manual_seed(1)
        trained = {n.split(".")[-1]: p for n, p in module.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=0.5)
        for _ in range(3):
            x = torch.randn(2, 5, 32, requires_grad=True)
            y = module(x)
            optimizer.zero_grad()
            (y - 1).square().mean().backward()
            outputs.append([y, x.grad, *(p.grad.clone() for _, p in sorted(trained.items()))])
            optimizer.step()
    for ours, theirs in zip(outputs[:3], outputs[3:], strict=True):
        assert len(ours) == len(theirs) > 2
        assert all(map(torch.equal, ours, theirs))
    if decay is not None:
        assert (rival.importance.factor < 1).any()


# Several adapters.


def test_switching_deleting_and_disabling():
    x, base = tokens(), llama()
    plain = logits(base, x)
    model = move(peft(base, **GATED))
    first = logits(model, x)
    model.add_adapter("second", SecuraConfig(target_modules=["q_proj", "up_proj"], **CURLORA))
    assert torch.equal(logits(model, x), first)
    grad = {n for n, p in model.named_parameters() if p.requires_grad}
    assert grad and all(".default." in n for n in grad)
    move(model, "second", seed=1)
    model.set_adapter("second")
    second = logits(model, x)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    with model.disable_adapter():
        assert torch.equal(logits(model, x), plain)
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model, x), second) and not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model, x), first)
    model.delete_adapter("default")
    assert model.active_adapters == ["second"] and torch.equal(logits(model, x), second)
    model.delete_adapter("second")
    assert torch.equal(logits(base, x), plain)
    assert all(not layer.secura_adapter and not layer.impl for layer in layers(model).values())


def test_two_adapters_without_a_gate_add_up():
    x, base = torch.randn(7, 24, dtype=torch.float64), mlp(dtype=torch.float64)
    expected = copy.deepcopy(base)
    model = move(peft(base, **GATE_FREE))
    model.add_adapter("second", SecuraConfig(target_modules=["0"], seed=1, **CURLORA))
    move(model, "second", seed=1)
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        for name, layer in layers(model).items():
            plain = expected.get_submodule(name.removeprefix("base_model.model."))
            for adapter in layer.secura_adapter:
                plain.weight += layer.get_delta_weight(adapter)
            bias = layer.secura_adapter["default"].adapter_bias
            plain.bias = nn.Parameter(bias + (0 if plain.bias is None else plain.bias))
    torch.testing.assert_close(logits(model, x), logits(expected, x))
    model.add_adapter("gated", SecuraConfig(target_modules=["0"], **GATED))
    before = state(model)
    model.base_model.set_adapter(["default", "gated"])
    with pytest.raises(ValueError, match=r"\['gated'\] have a gate"):
        model(x)
    with pytest.raises(ValueError, match=r"\['gated'\] have a gate"):
        model.merge_adapter()
    assert_same_state(model, before)


def test_status_and_counts():
    model = peft(llama(), **GATED)
    model.add_adapter("second", SecuraConfig(target_modules=["up_proj"], **CURLORA))
    status = model.get_model_status()
    assert status.adapter_model_type == "SecuraModel" and status.num_adapter_layers == 6
    assert status.peft_types == dict(default="SECURA", second="SECURA")
    assert status.available_adapters == ["default", "second"]
    assert status.requires_grad == dict(default=True, second=False)
    assert status.enabled and status.active_adapters == ["default"] and not status.merged_adapters
    q = next(s for s in model.get_layer_status() if s.name.endswith("0.self_attn.q_proj"))
    assert q.module_type == "secura.SecuraLinear" and q.available_adapters == ["default"]
    trained, _ = model.get_nb_trainable_parameters()
    assert trained == sum(2 * 4 * 6 + n for n in (32, 16)) * 2 == status.trainable_params


def test_seed_rule_and_rank_decide_the_indices():
    model = peft(llama(), variant="curlora", r=8)
    for name, settings in dict(same={}, seed=dict(seed=1), low=dict(selection="lowest")).items():
        model.add_adapter(
            name, SecuraConfig(variant="curlora", r=8, target_modules=["q_proj"], **settings)
        )
    adapters = layers(model)["base_model.model.model.layers.0.self_attn.q_proj"].secura_adapter
    assert torch.equal(adapters["default"].cols, adapters["same"].cols)
    assert not torch.equal(adapters["default"].cols, adapters["seed"].cols)
    assert not torch.equal(adapters["default"].cols, adapters["low"].cols)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_equal_and_independent(copied):
    model = move(peft(mlp(), importance_decay=True, **GATED))
    x = torch.randn(3, 24)
    model(x).sum().backward()
    twin, expected = copied(model), logits(model, x)
    assert torch.equal(logits(twin, x), expected)
    move(twin, seed=2)
    assert torch.equal(logits(model, x), expected) and not torch.equal(logits(twin, x), expected)
    for module in (model, twin):  # each one's own hooks choose its factors
        module.train()(x).sum().backward()
        assert all(
            not layer.secura_adapter["default"].importance.count.any()
            for layer in layers(module).values()
        )
