"""Quantised models as transformers loads them: training, files, several adapters, merging."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from layer_cases import relative_error
from peft import PeftModel, prepare_model_for_kbit_training
from peft_models import GATE_FREE, GATED, layers, logits, move, peft, runs_of_each, tokens
from quantised import KINDS, quantised, torchao_config
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

LOADED = ("nf4", "int8", "torchao int8", "torchao float8", "torchao nvfp4")
WEIGHT = GATED | dict(norm_domain="weight", adapter_bias=False)


def quantisation(kind: str):
    if kind.startswith("torchao"):
        return TorchAoConfig(torchao_config(kind))
    pytest.importorskip("bitsandbytes")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    # bitsandbytes runs layers on a CPU in eval mode for multiples of 32 and 64 only.
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def load(folder, kind=None):
    config = None if kind is None else quantisation(kind)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16
    ).eval()


@pytest.mark.parametrize(
    ("kind", "reentrant"), [("nf4", True), ("nf4", False), ("int8", False), ("torchao int8", True)]
)
def test_training_with_gradient_checkpointing(kind, reentrant, folder):
    model = load(folder, kind)
    ids = tokens(4, 12)
    model = peft(
        prepare_model_for_kbit_training(
            model, gradient_checkpointing_kwargs=dict(use_reentrant=reentrant)
        ),
        **GATED,
    )
    base = logits(model, ids, attention_mask=torch.ones_like(ids))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    losses = []
    for _ in range(4):
        model.train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.05, losses
    model.eval()
    assert not torch.equal(logits(model, ids), base)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)


@pytest.mark.parametrize("kind", LOADED)
def test_checkpointing_changes_no_gradient(kind, folder):
    ids, found = tokens(3, 8), []
    for checkpointing in (False, True):
        model = move(
            peft(
                prepare_model_for_kbit_training(
                    load(folder, kind), use_gradient_checkpointing=checkpointing
                ),
                **GATED,
            )
        ).train()
        model(ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(found[0][n], g) for n, g in found[1].items()) and found[1]


@pytest.mark.parametrize("kind", LOADED)
@pytest.mark.filterwarnings("ignore:merging")
def test_merge_and_unload(kind, folder):
    model = move(peft(load(folder, kind), **WEIGHT), std=0.5)
    ids = tokens()
    expected = logits(model, ids)
    model.merge_adapter(safe_merge=True)
    errors = [layer.requantisation_error for layer in layers(model).values()]
    assert all(0 < e < 1 for e in errors), errors
    merged = logits(model, ids)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), expected)
    unloaded = model.merge_and_unload(safe_merge=True)
    assert torch.equal(logits(unloaded, ids), merged)
    assert not layers(unloaded)
    assert relative_error(merged, expected) < 0.2


@pytest.mark.parametrize(("save_projection", "low_cpu_mem_usage"), [(True, False), (False, True)])
@pytest.mark.parametrize("kind", LOADED)
def test_file_on_the_same_base(kind, save_projection, low_cpu_mem_usage, folder, tmp_path):
    model = move(
        peft(load(folder, kind), save_projection=save_projection, basis="orthonormal", **GATED)
    )
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        load(folder, kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    assert all(layer.secura_adapter["default"].C is not None for layer in layers(again).values())


@pytest.mark.parametrize(
    ("first", "second"), [("nf4", None), (None, "nf4"), ("int8", "nf4"), ("torchao int8", None)]
)
def test_file_on_another_base(first, second, folder, tmp_path):
    """With its C and R an adapter changes every base by the same delta_W; without, none."""
    model = move(peft(load(folder, first), **GATE_FREE))
    model.save_pretrained(tmp_path / "with")
    again = PeftModel.from_pretrained(load(folder, second), tmp_path / "with").eval()
    for name, layer in layers(again).items():
        before = layers(model)[name]
        C, R = before.secura_adapter["default"].untied_C_and_R(before.base_matrix())
        adapter = layer.secura_adapter["default"]
        assert torch.equal(adapter.C, C.to(adapter.C.dtype))
        assert torch.equal(adapter.R, R.to(adapter.R.dtype))
        assert not torch.equal(adapter.C, layer.base_matrix()[:, adapter.cols])
        assert (
            relative_error(layer.get_delta_weight("default"), before.get_delta_weight("default"))
            < 5e-3
        )
    model = peft(load(folder, first), save_projection=False, **GATE_FREE)
    model.save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="another base"):
        PeftModel.from_pretrained(load(folder, second), tmp_path / "without")


@pytest.mark.parametrize("form", [GATED, WEIGHT], ids=["output", "weight"])
@pytest.mark.parametrize("kind", LOADED)
def test_each_sample_with_its_own_adapter(kind, form, folder):
    model = move(peft(load(folder, kind), **form))
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    move(model, "other", seed=5)
    ids, names = tokens(3), ["default", "__base__", "other"]
    mixed = logits(model, ids, adapter_names=names)
    single = runs_of_each(model, ids, names)
    for i, name in enumerate(names):
        # In int8 an outlier of one sample is kept in float for the whole batch, or not.
        assert relative_error(mixed[i], single[i][i]) < 2e-2, name
    assert relative_error(mixed[0], single[-1][0]) > 2e-2


@pytest.mark.parametrize("form", [GATED, WEIGHT, GATE_FREE], ids=["output", "weight", "free"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes_than_the_bases(kind, form):
    """x in another dtype than W, a model moved to bfloat16, and autocast."""
    torch.manual_seed(0)
    W, bias = torch.randn(64, 96) / 10, torch.randn(64)
    model = move(peft(nn.Sequential(quantised(kind, W, bias)), target_modules=["0"], **form))
    x = torch.randn(3, 5, 96)
    y = logits(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        under = logits(model, x)
    assert relative_error(under, y) < 2e-2
    model.to(torch.bfloat16)
    if kind != "torchao float8":  # whose own product then mixes dtypes
        assert relative_error(logits(model, x.bfloat16()), y) < 2e-2
