"""Adapter files of the PEFT method: what they hold, every way to load them, and what is refused."""

import functools

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.utils import set_peft_model_state_dict
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from secura_kernels.peft import SecuraConfig, hotswap_adapter

FILE = "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.secura_adapter."
ORTHONORMAL = GATED | dict(basis="orthonormal")
FORMS = [
    GATED,
    GATE_FREE,
    CURLORA,
    ORTHONORMAL,
    SECURA | dict(norm="figure"),
    GATED | dict(importance_decay=True),
    GATED | dict(save_projection=False),
    ORTHONORMAL | dict(save_projection=False),
    CURLORA | dict(basis="orthonormal"),
    CURLORA | dict(basis="svd"),
    GATED | dict(basis="svd", save_projection=False),
]


def staged(model, kind):
    for layer in layers(model).values():
        getattr(layer, kind)()
    return move(model, seed=5)


@pytest.mark.parametrize(
    "settings, stage",
    [
        (settings, stage)
        for settings in FORMS
        for stage in (None, "stage_m1", "stage_m2")
        if (settings.get("norm"), stage) != ("figure", "stage_m1")
    ],
    ids=str,
)  # which is refused
def test_a_file_brings_an_adapter_back_to_the_bit(settings, stage, tmp_path):
    x, model = tokens(), move(peft(llama(), **settings))
    if stage is not None:
        staged(model, stage)
    if "importance_decay" in settings:
        for layer in layers(model).values():
            layer.secura_adapter["default"].importance.factor[::2] = 0.5
    expected = logits(model, x)
    model.save_pretrained(tmp_path)
    held = {k.split("secura_adapter.")[1] for k in load_file(tmp_path / FILE)}
    sides = {"C", "R"} if settings.get("save_projection", True) else set()
    if not settings.get("save_projection", True):
        assert not {"C", "R"} & held or settings.get("basis") in ("orthonormal", "svd")
    assert {"cols", "rows", "fingerprint", "checksum"} | sides <= held
    assert not {"fold_c", "default"} & held
    for low in (False, True):
        read = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(logits(read, x), expected)
        adapter = layers(read).popitem()[1].secura_adapter["default"]
        tied = not (settings.get("basis") and adapter.fold_c is None)
        assert (adapter.C is None) == tied  # the base's own columns and rows are not stored twice
        assert not any(p.requires_grad for p in read.parameters())
    read = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in read.parameters())


def test_auto_class(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = llama().from_pretrained(tmp_path / "base").eval()
    model = move(peft(base, task_type="CAUSAL_LM", **GATED))
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path / "adapter")
    read = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(read, tokens()), expected)


@pytest.mark.parametrize(
    "settings", [GATED, CURLORA, ORTHONORMAL, GATED | dict(importance_decay=True)], ids=str
)
def test_transformers_own_methods(settings, tmp_path):
    x, model = tokens(), llama()
    model.add_adapter(SecuraConfig(target_modules=["q_proj"], **settings), "task")
    expected = logits(move(model, "task"), x)
    model.save_pretrained(tmp_path)
    read = llama()
    plain = logits(read, x)
    info = read.load_adapter(tmp_path, adapter_name="other")
    assert not info.unexpected_keys and not info.missing_keys
    assert torch.equal(logits(read, x), expected)
    adapter = layers(read).popitem()[1].secura_adapter["other"]
    assert adapter.C is None  # those of the file are the base's own
    assert not {"fingerprint", "checksum"} & set(adapter.state_dict())  # looked at, and given up
    read.disable_adapters()
    assert torch.equal(logits(read, x), plain)
    read.enable_adapters()
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path), x), expected)
    read.delete_adapter("other")
    assert torch.equal(logits(read, x), plain)


@pytest.mark.parametrize("kind", ["m1", "m2"])
@pytest.mark.parametrize("settings", [GATED, CURLORA], ids=str)
def test_transformers_loading_of_stages_and_of_another_base(settings, kind, tmp_path):
    x, model = tokens(), move(peft(llama(), **settings))
    for layer in layers(model).values():
        getattr(layer, f"stage_{kind}")()
    expected = logits(move(model, seed=5), x)
    model.save_pretrained(tmp_path)
    read = llama()
    assert not read.load_adapter(tmp_path).unexpected_keys
    assert torch.equal(logits(read, x), expected)
    refused = llama(seed=7)
    refused.load_adapter(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match="it was trained on another base"):
            logits(refused, x)
    other = [llama(seed=7) for _ in range(2)]
    forced = SecuraConfig.from_pretrained(tmp_path, force=True)
    other[0].load_adapter(tmp_path, peft_config=forced)
    loaded = PeftModel.from_pretrained(other[1], tmp_path, force=True)
    assert torch.equal(logits(other[0], x), logits(loaded, x))
    again = get_peft_model(llama(), SecuraConfig.from_pretrained(tmp_path)).eval()  # not loaded
    assert torch.equal(logits(again, x), logits(llama(), x))


def test_transformers_loading_derives_from_the_files_indices(tmp_path):
    """A file's columns may be others than the settings choose on this base."""
    x, model = tokens(), move(peft(llama(), **ORTHONORMAL))
    for layer in layers(model).values():
        adapter = layer.secura_adapter["default"]
        adapter.cols = adapter.cols.flip(0)
        adapter.derive(layer.base_matrix())
    expected = logits(model, x)
    model.save_pretrained(tmp_path)
    read = llama()
    read.load_adapter(tmp_path)
    assert torch.equal(logits(read, x), expected)


def test_state_dict_functions_and_several_names():
    """Adapters may have the names of tensors."""
    x, model = tokens(), move(peft(llama(), **GATED))
    for i, name in enumerate(("A", "B", "cols")):
        model.add_adapter(name, SecuraConfig(target_modules=["q_proj", "v_proj"], **GATED))
        move(model, name, seed=i + 1)
    for name in ("default", "A", "B", "cols"):
        model.set_adapter(name)
        expected, saved = logits(model, x), get_peft_model_state_dict(model, adapter_name=name)
        fresh = peft(llama(), **GATED)
        set_peft_model_state_dict(fresh, saved)
        assert torch.equal(logits(fresh, x), expected)


def test_another_base(tmp_path):
    """Refused; where it is forced, C and R in the file keep the change the same."""
    x, other = torch.randn(3, 24, dtype=torch.float64), mlp(1, torch.float64)
    model = move(peft(mlp(dtype=torch.float64), **GATE_FREE))
    change = {n: m.get_delta_weight("default") for n, m in layers(model).items()}
    model.save_pretrained(tmp_path / "whole")
    model.peft_config["default"].save_projection = False
    model.save_pretrained(tmp_path / "small")
    for file in ("whole", "small"):
        unchanged = mlp(1, torch.float64)
        with pytest.raises(ValueError, match=r"layer '0': it was trained on another base.*force="):
            PeftModel.from_pretrained(unchanged, tmp_path / file)
        assert [type(m) for m in unchanged] == [type(m) for m in other]
    read = PeftModel.from_pretrained(other, tmp_path / "whole", force=True)
    assert not SecuraConfig.from_pretrained(tmp_path / "whole").force  # nothing saves it
    for name, layer in layers(read).items():
        torch.testing.assert_close(layer.get_delta_weight("default"), change[name])
    expected = logits(read, x)
    for projection in (True, False):  # neither file may lose the C and R of the first base
        read.peft_config["default"].save_projection = projection
        read.save_pretrained(tmp_path / str(projection))
        again = PeftModel.from_pretrained(mlp(1, torch.float64), tmp_path / str(projection))
        assert torch.equal(logits(again, x), expected)
    target = peft(mlp(1, torch.float64), **GATE_FREE)
    before = state(target)
    for load in (target.load_adapter, functools.partial(hotswap_adapter, target)):
        with pytest.raises(ValueError, match="layer '0': it was trained on another base"):
            load(tmp_path / "small", adapter_name="default")
        assert_same_state(target, before)
    hotswap_adapter(target, tmp_path / "small", force=True)
    again = PeftModel.from_pretrained(mlp(1, torch.float64), tmp_path / "small", force=True)
    assert torch.equal(logits(target, x), logits(again, x))


def test_a_base_that_was_quantised_since_is_no_other_one(tmp_path):
    """C and R in the file are for this: 4 bits leave a base similar. Without them it is refused."""
    model = move(peft(mlp(), **GATE_FREE))
    model.save_pretrained(tmp_path / "whole")
    model.peft_config["default"].save_projection = False
    model.save_pretrained(tmp_path / "small")

    def quantised():
        base = mlp()
        with torch.no_grad():
            for layer in base[::2]:
                step = layer.weight.abs().amax(1, keepdim=True) / 7
                layer.weight.copy_((layer.weight / step).round() * step)
        return base

    change = {n: m.get_delta_weight("default") for n, m in layers(model).items()}
    read = PeftModel.from_pretrained(quantised(), tmp_path / "whole")
    for name, layer in layers(read).items():
        torch.testing.assert_close(layer.get_delta_weight("default"), change[name])
    with pytest.raises(ValueError, match="another base"):
        PeftModel.from_pretrained(quantised(), tmp_path / "small")


def test_a_bfloat16_base_takes_a_float32_file(tmp_path):
    model = move(peft(llama(), **GATED))
    model.save_pretrained(tmp_path)
    adapter = layers(PeftModel.from_pretrained(llama(dtype=torch.bfloat16), tmp_path)).popitem()[1]
    adapter = adapter.secura_adapter["default"]
    assert adapter.A.dtype == torch.float32 and adapter.C is None  # equal in the coarser dtype


@pytest.mark.parametrize("settings", [GATED, GATE_FREE, CURLORA | dict(basis="orthonormal")])
def test_a_merged_model_saves_its_adapter_unmerged(settings, tmp_path):
    model = move(peft(llama(), **settings), std=0 if settings is GATED else 0.3)
    expected = get_peft_model_state_dict(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / FILE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in found)


def broken(tensors: dict, how: str) -> dict:
    key, tensors = {"half": "v_proj"}.get(how, Q0), dict(tensors)
    if how == "half":
        return {k: v for k, v in tensors.items() if key not in k}
    if how == "no B":
        del tensors[Q0 + "B"]
    elif how == "unknown tensor":
        tensors[Q0 + "D"] = torch.ones(2)
    elif how == "unknown layer":
        tensors[Q0.replace("q_proj", "k_proj") + "B"] = torch.ones(2)
    elif how == "shape":
        tensors[Q0 + "A"] = tensors[Q0 + "A"][:-1]
    elif how == "kind":
        tensors[Q0 + "cols"] = tensors[Q0 + "cols"].float()
    elif how == "range":
        tensors[Q0 + "rows"] = tensors[Q0 + "rows"] + 32
    elif how == "C alone":
        del tensors[Q0 + "R"]
    elif how == "neither":
        for name in ("C", "R", "fingerprint"):
            del tensors[Q0 + name]
    elif how == "NaN":
        tensors[Q0 + "B"][1, 2] = torch.nan
    elif how == "infinity":
        tensors[Q0 + "C"][0, 0] = torch.inf
    elif how == "other indices":
        tensors[Q0 + "cols"] = tensors[Q0 + "cols"].flip(0)
    elif how == "other core":
        tensors[Q0 + "B"] = tensors[Q0 + "B"] * 2
    elif how == "base weight":
        tensors[Q0.replace("secura_adapter", "base_layer") + "weight"] = torch.zeros(32, 32)
    elif how == "stranger":
        tensors["base_model.model.lm_tail.weight"] = torch.ones(2)
    elif how == "half a stage":
        tensors[Q0 + "A_long"] = tensors[Q0 + "A"].clone()
    elif how == "fingerprint":
        tensors[Q0 + "fingerprint"] = torch.ones(256, dtype=torch.int64)
    return tensors


@pytest.mark.parametrize(
    "how, message",
    [
        ("half", "v_proj': the state has no A"),
        ("no B", "q_proj': the state has no B"),
        ("unknown tensor", "unknown tensor 'D'"),
        ("unknown layer", "layers that are not adapted here"),
        ("shape", r"A.shape=\(5, 4\) is not allowed: it must be \(6, 4\)"),
        ("kind", "cols.dtype=torch.float32 is not allowed"),
        ("range", r"rows=\[\d+, \d+\] is not allowed: it must be indices from 0 to 31"),
        ("C alone", r"\['C'\] without \['R'\]"),
        ("neither", "neither C and R nor a fingerprint"),
        ("half a stage", r"\['A_long'\] without \['B_long'\]"),
        ("fingerprint", "another base"),
        (
            "NaN",
            "q_proj': B='a tensor with NaN or infinite values' is not allowed: it must be finite",
        ),
        ("infinity", "C='a tensor with NaN or infinite values'"),
        ("other indices", r"q_proj': its indices and cores are not .* saved together \(checksum\)"),
        ("other core", r"indices and cores are not those that were saved together"),
        ("base weight", r"layers that are not adapted here: .*q_proj.base_layer.weight"),
        ("stranger", r"layers that are not adapted here: .*lm_tail"),
    ],
)
def test_a_broken_file_is_refused_and_changes_nothing(how, message, tmp_path):
    model = move(peft(llama(), **GATED))
    model.save_pretrained(tmp_path)
    save_file(broken(load_file(tmp_path / FILE), how), tmp_path / FILE)
    target = move(peft(llama(), **GATED), seed=1)
    before = state(target)
    with pytest.raises(ValueError, match=message):
        target.load_adapter(tmp_path, "default")
    assert_same_state(target, before)
    for low in (False, True):
        base = llama()
        modules = list(base.modules())
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low)
        assert same_modules(base, modules)
        with pytest.raises(ValueError, match=message):
            target.load_adapter(tmp_path, "second")
        assert_same_state(target, before)
        assert list(target.peft_config) == ["default"]


def same_modules(model, before):
    after = list(model.modules())
    return len(after) == len(before) and all(a is b for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("kept", [0, 4, 20, -100])
def test_a_truncated_or_empty_file_is_named(kept, tmp_path):
    model = move(peft(llama(), **GATED))
    model.save_pretrained(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[:kept])
    before, base = state(model), llama()
    modules = list(base.modules())
    message = f"{tmp_path / FILE} is not a whole safetensors file"
    for load in (
        lambda: PeftModel.from_pretrained(base, tmp_path),
        lambda: model.load_adapter(tmp_path, "second"),
        lambda: hotswap_adapter(model, tmp_path),
    ):
        with pytest.raises(ValueError, match=message):
            load()
    # PEFT opens the file itself where it needs no configuration.
    with pytest.raises(SafetensorError):
        model.load_adapter(tmp_path, "default")
    assert_same_state(model, before)
    assert list(model.peft_config) == ["default"] and same_modules(base, modules)


def test_a_checksum_is_of_values_not_of_dtypes(tmp_path):
    """A bfloat16 adapter's file in float32 is the same; one that was rounded is another."""
    model = peft(llama(), **GATED)
    with torch.no_grad():
        for layer in layers(model).values():
            for parameter in layer.secura_adapter["default"].parameters():
                parameter.copy_(torch.randn_like(parameter).bfloat16())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    trained = [k for k in tensors if k.split(".")[-1] in ("A", "B", "adapter_bias")]
    save_file(tensors | {k: tensors[k].bfloat16() for k in trained}, tmp_path / FILE)
    read = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(read, tokens()), logits(model, tokens()))
    save_file(
        tensors | {k: tensors[k].to(torch.float8_e4m3fn).float() for k in trained}, tmp_path / FILE
    )
    with pytest.raises(ValueError, match="checksum"):
        PeftModel.from_pretrained(llama(), tmp_path)
    # Where tensors are changed on purpose the checksum is left out.
    save_file({k: v for k, v in tensors.items() if not k.endswith("checksum")}, tmp_path / FILE)
    PeftModel.from_pretrained(llama(), tmp_path)


def test_the_state_of_an_adapter_without_values_has_every_name():
    """As PEFT's ``inject_adapter_in_model(..., low_cpu_mem_usage=True)`` makes it."""
    filled, empty = (
        inject_adapter_in_model(
            SecuraConfig(target_modules=["q_proj"], **GATED), llama(), low_cpu_mem_usage=low
        )
        for low in (0, 1)
    )
    expected, found = map(get_peft_model_state_dict, (filled, empty))
    assert found.keys() == expected.keys()
    assert all(found[k].shape == expected[k].shape for k in found)


def test_embeddings_that_grew_travel_along(tmp_path):
    """PEFT saves them by itself, so they are no strangers."""
    model = llama()
    model.resize_token_embeddings(60)
    model = move(peft(model, **GATED))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    fresh = llama(1)
    fresh.resize_token_embeddings(60)
    fresh.load_state_dict(
        {k: v for k, v in model.get_base_model().state_dict().items() if "proj" in k}, strict=False
    )
    expected = model.get_input_embeddings().weight
    read = PeftModel.from_pretrained(fresh, tmp_path, force=True)
    assert torch.equal(read.get_input_embeddings().weight, expected)


def test_a_few_tensors_alone_leave_the_others():
    """As an average of trained weights is put back: C and R of another base stay."""
    model, other = (move(peft(llama(), **GATE_FREE)), peft(llama(1), **GATE_FREE))
    other.peft_config["default"].force = True
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    expected = logits(other, tokens())
    other.load_state_dict(
        {k: v for k, v in other.state_dict().items() if k.endswith(".B")}, strict=False
    )
    assert torch.equal(logits(other, tokens()), expected)


def test_modules_to_save_travel_along(tmp_path):
    model = move(peft(bert(), task_type="SEQ_CLS", target_modules=["query", "dense"], **GATED))
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path)
    assert "base_model.model.classifier.weight" in load_file(tmp_path / FILE)
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path), tokens()), expected)


def test_conv1d_and_another_name(tmp_path):
    model = move(peft(gpt2(), target_modules=["c_attn", "c_proj"], **CURLORA))
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(gpt2(), tmp_path, adapter_name="other")
    assert torch.equal(logits(read, tokens()), expected)
    read.load_adapter(tmp_path, "again")
    read.set_adapter("again")
    assert torch.equal(logits(read, tokens()), expected)
