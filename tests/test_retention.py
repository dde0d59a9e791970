"""How far a model moved: drift against dense float64, base loss by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from secura_kernels import CURLoRALinear, SECURALinear
from secura_kernels.train.drift import Drift, drift, gradient_norms
from secura_kernels.train.retention import base_loss

pytest.importorskip("transformers", reason="base losses are of its models")
from retention_models import HELD_OUT, TOKENS, VOCABULARY, llama
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D


def dense(delta, weight):
    """The definition, in float64."""
    delta, weight = delta.detach().double(), weight.detach().double()
    values = torch.linalg.svdvals(delta)
    return Drift(
        *(
            pytest.approx(float(x), rel=1e-9)
            for x in (delta.norm() / weight.norm(), values[0], values.sum())
        )
    )


def move(model, scale=0.1):
    """Random values in all that trains."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    "linear", [nn.Linear(24, 20), nn.Linear(20, 24), Conv1D(20, 24)], ids=["wide", "tall", "Conv1D"]
)
@pytest.mark.parametrize(
    "kind, settings",
    [
        (CURLoRALinear, dict(alpha=2.0)),  # raw, with duplicates among its columns and rows
        (CURLoRALinear, dict(basis="orthonormal")),
        (SECURALinear, dict(alpha=-0.5, norm="calibrated")),
        (SECURALinear, dict(basis="orthonormal")),
    ],
)
def test_drift_of_cur_layers_is_that_of_the_dense_change(linear, kind, settings):
    layer = move(kind.from_linear(copy.deepcopy(linear).double(), 6, **settings))
    assert drift(nn.Sequential(layer)) == {"0": dense(layer.delta_weight(), layer.base_matrix())}


def test_drift_of_bfloat16_weights_is_computed_in_float64():
    layer = move(CURLoRALinear.from_linear(nn.Linear(24, 20, dtype=torch.bfloat16), 6))
    C, core, R = (part.double() for part in layer.change_factors())
    # The 1e-6 of W's norm: rows are summed in float32.
    assert drift(layer)[""].relative == pytest.approx(
        float((C @ core @ R).norm() / layer.weight.double().norm()), rel=1e-6
    )
    assert drift(layer)[""].nuclear == pytest.approx(
        float(torch.linalg.svdvals(C @ core @ R).sum()), rel=1e-9
    )


def test_drift_counts_m2_stages():
    layer = move(CURLoRALinear.from_linear(nn.Linear(24, 20, bias=False, dtype=torch.float64), 4))
    layer.stage_m2()
    move(layer)
    change = layer(torch.eye(24, dtype=torch.float64)).T - layer.weight
    assert drift(layer)[""] == dense(change, layer.weight)


def test_drift_of_cur_layers_forms_no_dense_matrix():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            for tensor in out if isinstance(out, tuple | list) else [out]:
                self.numel = max(self.numel, getattr(tensor, "numel", int)())
            return out

    layer = move(SECURALinear.from_linear(nn.Linear(64, 48), 4, m=6, norm="calibrated"))
    with Largest() as largest:
        drift(layer)
    assert 4 * 64 <= largest.numel < 48 * 64 / 4


def test_drift_starts_at_zero_and_survives_what_is_not_finite():
    layer = CURLoRALinear.from_linear(nn.Linear(24, 20), 4)
    assert drift(layer) == {"": Drift(0.0, 0.0, 0.0)}
    layer.U.data[1, 2] = math.inf
    values = drift(layer)[""]
    assert all(math.isnan(x) for x in (values.relative, values.spectral, values.nuclear))


def test_drift_of_a_merged_layer_is_refused():
    layer = move(CURLoRALinear.from_linear(nn.Linear(24, 20), 4))
    layer.merge()
    with pytest.raises(RuntimeError, match="0 is merged: unmerge"):
        drift(nn.Sequential(layer))


def test_norm_of_a_large_float32_weight():
    layer = CURLoRALinear.from_linear(nn.Linear(4096, 2048), 1)
    layer.U.data.fill_(1.0)
    C, core, R = (part.double() for part in layer.change_factors())
    assert drift(layer)[""].relative == pytest.approx(
        float(C.norm() * core.abs().sum() * R.norm() / layer.weight.double().norm()), rel=1e-6
    )


def test_drift_of_lora_sums_the_active_adapters_that_a_layer_has():
    peft = pytest.importorskip("peft", reason="LoRA is PEFT's")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(24, 20), Conv1D(16, 20)),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0", "1"], init_lora_weights=False),
    )
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    model.double()
    first, second = model.base_model.model

    def change(layer, name):
        return layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.scaling[name]

    assert drift(model) == {
        "base_model.model.0": dense(
            change(first, "default") + change(first, "other"), first.base_layer.weight
        ),
        "base_model.model.1": dense(change(second, "default"), second.base_layer.weight),
    }
    model.base_model.set_adapter("other")
    assert list(drift(model)) == ["base_model.model.0"]
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"model\.0 is merged"):
        drift(model)


def test_drift_of_peft_cur_layers_sums_the_active_adapters():
    peft = pytest.importorskip("peft", reason="the layers are PEFT's")
    from secura_kernels.peft import SecuraConfig

    settings = dict(target_modules=["0"])
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(24, 20, dtype=torch.float64)),
        SecuraConfig(r=4, variant="curlora", alpha=2.0, **settings),
    )
    model.add_adapter("other", SecuraConfig(r=3, variant="secura", **settings))
    model.base_model.set_adapter(["default", "other"])
    move(model)
    layer = model.base_model.model[0]
    change = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    assert drift(model) == {"base_model.model.0": dense(change, layer.base_layer.weight)}


def test_drift_refuses_methods_that_multiply_the_weight():
    peft = pytest.importorskip("peft", reason="OFT is PEFT's")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), peft.OFTConfig(target_modules=["0"], oft_block_size=4)
    )
    with pytest.raises(ValueError, match=r"model\.0='Linear' is not allowed.*adds its change"):
        drift(model)


def test_gradient_norms():
    layer = SECURALinear.from_linear(nn.Linear(24, 20), 4, norm="calibrated")
    assert gradient_norms(layer) == {"total": 0.0}
    layer.A.grad = torch.full_like(layer.A, 2.0)
    layer.adapter_bias.grad = torch.ones_like(layer.adapter_bias)
    layer.weight.grad = torch.ones_like(layer.weight)  # frozen
    assert gradient_norms(layer) == pytest.approx(
        {
            "A": 2 * layer.A.numel() ** 0.5,
            "adapter_bias": 20**0.5,
            "total": (4 * layer.A.numel() + 20) ** 0.5,
        }
    )


def test_base_loss_weighs_label_tokens_and_restores_modes():
    model = llama(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    labels = TOKENS.clone()
    labels[1, 2:] = -100  # the first batch has 11 + 1 labels, the second 4 * 11, the third none
    batches = [{"input_ids": TOKENS[a:b], "labels": labels[a:b]} for a, b in ((0, 2), (2, 6))]
    batches.append({"input_ids": TOKENS[:1], "labels": torch.full((1, 12), -100)})
    loss = base_loss(model, batches)
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad():
        logits = model.eval()(TOKENS[:6]).logits[:, :-1].flatten(0, 1)
    assert loss == pytest.approx(float(F.cross_entropy(logits, labels[:6, 1:].flatten())), rel=1e-6)


def test_base_loss_weighs_samples_where_labels_are_not_tokens():
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=3,
        )
    ).eval()
    labels = torch.tensor([0, 1, 2, 2])
    loss = base_loss(
        model, [{"input_ids": TOKENS[a:b], "labels": labels[a:b]} for a, b in ((0, 3), (3, 4))]
    )
    with torch.no_grad():
        assert loss == pytest.approx(
            float(F.cross_entropy(model(TOKENS[:4]).logits, labels)), rel=1e-6
        )


def test_base_loss_of_bad_batches():
    model = llama().train()
    with pytest.raises(ValueError, match=r"batches\[1\]=\['input_ids'\].*labels"):
        base_loss(model, [HELD_OUT[0], {"input_ids": TOKENS}])
    assert model.training
    with pytest.raises(ValueError, match="labels in batches=0"):
        base_loss(model, [])
