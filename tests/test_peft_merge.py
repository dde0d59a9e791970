"""Merging and stages of the PEFT method, and adapters saved as LoRA."""

import copy
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel
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
    tokens,
)
from torch import nn

from secura_kernels import CURLoRALinear, SECURALinear
from secura_kernels.bases import BASES
from secura_kernels.peft import SecuraConfig, save_as_lora

MERGEABLE = [
    GATE_FREE,
    CURLORA,
    SECURA | dict(norm="figure"),
    CURLORA | dict(basis="orthonormal"),
    GATED | dict(norm_domain="weight", importance_decay=True),
]
X = torch.linspace(-1, 1, 7 * 24, dtype=torch.float64).sin().view(7, 24)
NO_BIAS = dict(adapter_bias=False)


def stage(model, kind):
    for layer in layers(model).values():
        getattr(layer, kind)()


@pytest.mark.parametrize("settings", MERGEABLE, ids=str)
@pytest.mark.parametrize("staged", [False, True])
def test_merging_keeps_the_outputs_and_unmerging_the_bits(settings, staged):
    model = move(peft(mlp(dtype=torch.float64), **settings))
    if staged:
        stage(model, "stage_m2")
        move(model, seed=1)
    before, expected = state(model), logits(model, X)
    with pytest.warns(UserWarning) if settings is GATE_FREE else nullcontext():
        model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    torch.testing.assert_close(logits(model, X), expected)
    model.unmerge_adapter()
    assert_same_state(model, before)
    assert torch.equal(logits(model, X), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, X), logits(mlp(dtype=torch.float64), X))
    plain = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(plain, X), expected)
    assert [type(m) for m in plain] == [type(m) for m in mlp()]


@pytest.mark.parametrize(
    "build, targets", [(llama, ["q_proj", "down_proj"]), (gpt2, ["c_attn", "c_proj"])]
)
def test_merging_in_float32_is_as_near_to_float64_as_the_layer(build, targets):
    """Off from float64 by at most twice what the unmerged model is off, of which one is W's own
    rounding."""
    x, results = tokens(), {}
    for dtype in (torch.float32, torch.float64):
        model = move(peft(build(dtype=dtype), target_modules=targets, norm="figure", **SECURA))
        results[dtype] = logits(model, x).double(), logits(model.merge_and_unload(), x).double()
    truth = results[torch.float64][0]
    unmerged, merged = ((y - truth).norm() for y in results[torch.float32])
    rounding = torch.finfo(torch.float32).eps * truth.norm()
    assert merged <= 2 * (unmerged + rounding)


def test_adapters_merged_one_after_the_other_equal_those_merged_together():
    """C and R of the second are columns and rows of the first W, not of the merged one."""
    merged = []
    for names in ([["default", "second"]], [["default"], ["second"]], [["second"], ["default"]]):
        model = move(peft(mlp(dtype=torch.float64), **GATE_FREE))
        model.add_adapter("second", SecuraConfig(target_modules=["0", "2"], **CURLORA))
        move(model, "second", seed=1)
        model.base_model.set_adapter(["default", "second"])
        expected = logits(model, X)
        for group in names:
            model.merge_adapter(group)
        torch.testing.assert_close(logits(model, X), expected)
        merged.append(model)
    model.unmerge_adapter()
    assert torch.equal(logits(model, X), expected)


@pytest.mark.parametrize("settings", [CURLORA, CURLORA | dict(save_projection=False)], ids=str)
def test_adapters_loaded_and_added_while_one_is_merged(settings, tmp_path):
    """W is the one from before: for the fingerprint, for C and R, for the choice of columns."""
    model, rival = (move(peft(mlp(dtype=torch.float64), **settings)) for _ in range(2))
    model.save_pretrained(tmp_path)
    expected = logits(model, X)
    model.merge_adapter()
    model.load_adapter(tmp_path, "default")
    assert all(m.merged and m.secura_adapter["default"].C is None for m in layers(model).values())
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("low", SecuraConfig(target_modules=["0", "2"], **GATED))
    assert torch.equal(logits(model, X), expected)
    rival.add_adapter("low", SecuraConfig(target_modules=["0", "2"], **GATED))
    for name in ("default", "low"):
        for ours, theirs in zip(layers(model).values(), layers(rival).values(), strict=True):
            for key in ("cols", "rows"):
                assert torch.equal(*(getattr(m.secura_adapter[name], key) for m in (ours, theirs)))


@pytest.mark.parametrize("basis", BASES)
def test_unmerging_in_another_dtype(basis):
    model, other = (move(peft(mlp(), **GATE_FREE, basis=basis)) for _ in range(2))
    model.merge_adapter()
    model.to(torch.float64).unmerge_adapter()
    assert_same_state(model, state(other.to(torch.float64)))
    assert torch.equal(logits(model, X), logits(other, X))


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_gate_on_outputs_is_refused_before_anything_changes(call):
    model = move(peft(llama(), **GATED))
    before, kinds = state(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"its gate acts on outputs.*stage_m1.*norm_domain"):
        getattr(model, call)()
    assert_same_state(model, before)
    assert kinds == [type(m) for m in model.modules()]
    assert not model.base_model.supports_lora_conversion()
    assert not peft(llama(), **GATE_FREE).base_model.supports_lora_conversion()  # a bias
    assert peft(llama(), **CURLORA).base_model.supports_lora_conversion()


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_finds_nan_before_anything_changes(call):
    model = move(peft(mlp(), **GATE_FREE))
    before = layers(model)
    last = list(before.values())[-1]
    with torch.no_grad():
        last.secura_adapter["default"].adapter_bias[0] = torch.nan
    weights = {n: m.get_base_layer().weight for n, m in before.items()}
    with pytest.raises(ValueError, match=r"not finite.*'default'.*nothing was changed"):
        getattr(model, call)(safe_merge=True)
    assert layers(model) == before
    assert all(m.get_base_layer().weight is weights[n] and not m.merged for n, m in before.items())


def test_unload_gives_the_base_back():
    base = llama()
    expected = logits(base, tokens())
    plain = move(peft(base, **GATED)).unload()
    assert plain is base and not layers(base)
    assert torch.equal(logits(plain, tokens()), expected)


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
        GATED | NO_BIAS,
        CURLORA | dict(basis="orthonormal"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["stage_m1", "stage_m2"])
def test_stages_equal_the_layers_own_and_leave_the_base_alone(settings, kind):
    """Three stages; the layer of the package changes its W in M1, or holds another beside it."""
    base = nn.Linear(24, 20, dtype=torch.float64)
    model = peft(nn.Sequential(copy.deepcopy(base)), **settings | dict(target_modules=["0"]))
    (layer,) = layers(model).values()
    adapter, config = layer.secura_adapter["default"], model.peft_config["default"]
    if kind == "stage_m1" and config.norm and config.norm_settings().domain == "weight":
        with pytest.raises(RuntimeError, match="W_eff is no delta_W; stage_m2 is possible"):
            stage(model, kind)
        return
    common = dict(basis=config.basis, norm=config.norm_settings())
    if config.variant == "secura":
        rival = SECURALinear(
            base,
            adapter.cols,
            adapter.rows,
            m=adapter.m,
            adapter_bias=config.adapter_bias,
            **common,
        )
    else:
        rival = CURLoRALinear(base, adapter.cols, adapter.rows, **common)
    weight = base.weight.clone()
    for seed in range(3):
        move(model, seed=seed, std=0.1)
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                rival.get_parameter(name).copy_(parameter)
        torch.testing.assert_close(layer(X), rival(X))
        stage(model, kind)
        getattr(rival, kind)()
        torch.testing.assert_close(layer(X), rival(X))
    assert torch.equal(layer.get_base_layer().weight, weight)
    if config.variant == "secura":
        other = dict(stage_m1="stage_m2", stage_m2="stage_m1")[kind]
        with pytest.raises(RuntimeError, match=f"{other} after {kind}|stage_m1 is not possible"):
            stage(model, other)


def test_a_gated_adapter_without_a_bias_merges_after_m1():
    model = move(peft(mlp(dtype=torch.float64), **GATED | NO_BIAS))
    stage(model, "stage_m1")
    expected = logits(model, X)
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain, X), expected)
    assert not torch.equal(plain[0].weight, mlp(dtype=torch.float64)[0].weight)


# As LoRA.


@pytest.mark.parametrize(
    "settings",
    [
        GATE_FREE,
        CURLORA,
        CURLORA | dict(basis="orthonormal", alpha=0.5),
        GATE_FREE | NO_BIAS | dict(rank_pattern={"0": 2, "1.0": 5}),
        CURLORA | dict(rank_pattern={r"1\.0": 3}, target_modules=["0"]),
        GATE_FREE | dict(modules_to_save=["2"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("staged", [None, "stage_m1", "stage_m2"])
def test_saved_as_lora_the_outputs_are_equal(settings, staged, tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(24, 20), nn.Sequential(nn.Linear(20, 28, bias=False)), nn.Linear(28, 5)
        )

    model = move(peft(base(), **dict(target_modules=["0", "1.0"]) | settings))
    if "modules_to_save" in settings:
        with torch.no_grad():
            model.base_model.model[2].modules_to_save["default"].weight.normal_()
    if staged:
        stage(model, staged)
        move(model, seed=1)
    save_as_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(base(), tmp_path)
    assert isinstance(lora.peft_config["default"], LoraConfig)
    # The file is float32, as the model: in float64 both compute with the same rounded tensors.
    ours, theirs = logits(model.double(), X), logits(lora.double(), X)
    assert (ours - theirs).norm() <= 8 * torch.finfo(torch.float32).eps * ours.norm()
    assert (ours - logits(base().double(), X)).norm() > 0.01 * ours.norm()


@pytest.mark.parametrize("targets", [["a", "b", "c.b"], "a|b"])
def test_saved_as_lora_a_name_is_never_the_end_of_another(targets, tmp_path):
    def base():
        torch.manual_seed(0)
        c = nn.Sequential(OrderedDict(b=nn.Linear(20, 20)))
        return nn.Sequential(OrderedDict(a=nn.Linear(24, 20), b=nn.Linear(20, 20), c=c))

    model = move(
        peft(base(), target_modules=targets, variant="curlora", r=4, rank_pattern={"^b": 6})
    )
    save_as_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(base(), tmp_path)
    assert lora.targeted_module_names == list(dict.fromkeys(model.targeted_module_names))
    ours, theirs = logits(model.double(), X), logits(lora.double(), X)
    assert (ours - theirs).norm() <= 8 * torch.finfo(torch.float32).eps * ours.norm()


@pytest.mark.parametrize(
    "build, settings",
    [
        (gpt2, GATE_FREE | dict(target_modules=["c_attn", "c_proj"])),
        (bert, CURLORA | dict(target_modules=["query", "value"], task_type="SEQ_CLS")),
        (llama, CURLORA | dict(rank_pattern={"v_proj": 6})),
    ],
)
def test_models_saved_as_lora(build, settings, tmp_path):
    model = move(peft(build(), **settings))
    save_as_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(build(), tmp_path)
    ours, theirs = (logits(m.double(), tokens()) for m in (model, lora))
    assert (ours - theirs).norm() <= 8 * torch.finfo(torch.float32).eps * ours.norm()


def test_what_no_lora_equals_is_refused(tmp_path):
    for settings in (GATED, SECURA | dict(norm="figure")):
        with pytest.raises(ValueError, match="cannot be saved as a LoRA: has a gate"):
            save_as_lora(move(peft(mlp(), **settings)), tmp_path / "x")
    with pytest.raises(ValueError, match="adapter_name='other' is not allowed"):
        save_as_lora(peft(mlp(), **GATE_FREE), tmp_path / "x", "other")
    assert not (tmp_path / "x").exists()
