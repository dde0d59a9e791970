"""Projections fused in transformers models with PEFT's adapters."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from secura_kernels import fuse_projections
from secura_kernels.peft import SecuraConfig

SMALL = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
MODELS = {
    "Llama": LlamaConfig(**SMALL),
    "Qwen2": Qwen2Config(**SMALL),
    "Mistral": MistralConfig(**SMALL),
    "Gemma": GemmaConfig(**SMALL, head_dim=8),
}


def peft_pair(name, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]).double()
    model = get_peft_model(model, SecuraConfig(r=4, **settings))
    model.enable_input_require_grads()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, copy.deepcopy(model)


def loss_and_gradients(model):
    tokens = torch.arange(24).view(2, 12)
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_models_same(fused, separate):
    (a, gradients), (b, expected) = loss_and_gradients(fused), loss_and_gradients(separate)
    assert torch.equal(a, b)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [{}, dict(variant="secura", norm="calibrated", m=6)], ids=str)
def test_models(name, settings, products):
    separate, fused = peft_pair(name, **settings)
    assert fuse_projections(fused) == 2  # q, k, v of two blocks
    assert_models_same(fused, separate)
    assert products == [3, 3]


def test_gpt_neox_has_them_in_one_already():
    config = GPTNeoXConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = get_peft_model(AutoModelForCausalLM.from_config(config), SecuraConfig(r=4))
    with pytest.raises(ValueError, match="no layers to fuse"):
        fuse_projections(model)


def test_q_and_v_alone(products):
    separate, fused = peft_pair("Llama", target_modules=["q_proj", "v_proj"])
    assert fuse_projections(fused) == 2
    assert_models_same(fused, separate)
    assert products == [2, 2]


def test_gradient_checkpointing_of_a_model(products):
    separate, fused = peft_pair("Llama")
    fuse_projections(fused)
    fused.gradient_checkpointing_enable()
    fused.train()
    assert_models_same(fused, separate)
    assert len(products) == 2


def test_peft_adapters_come_and_go(products, tmp_path):
    separate, fused = peft_pair("Llama")
    fuse_projections(fused)
    for model in (separate, fused):
        model.add_adapter("second", SecuraConfig(r=3))
        model.base_model.set_adapter(["default", "second"])
    assert_models_same(fused, separate)
    assert not products
    for model in (separate, fused):
        model.set_adapter("second")
    assert_models_same(fused, separate)
    assert len(products) == 2
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        for model in (separate, fused):
            model.eval()
        names = ["default", "second"]
        mixed = [m(input_ids=tokens, adapter_names=names).logits for m in (separate, fused)]
        assert torch.equal(*mixed)
        before = fused(input_ids=tokens).logits
        for model in (separate, fused):
            model.merge_adapter()
        assert torch.equal(*(m(input_ids=tokens).logits for m in (separate, fused)))
        for model in (separate, fused):
            model.unmerge_adapter()
        assert torch.equal(fused(input_ids=tokens).logits, before)
        with fused.disable_adapter(), separate.disable_adapter():
            assert torch.equal(*(m(input_ids=tokens).logits for m in (separate, fused)))
    assert_models_same(fused, separate)
    assert len(products) == 4
    fused.save_pretrained(tmp_path)
    whole = fused.merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float64)
    assert torch.equal(again(input_ids=tokens).logits, whole(input_ids=tokens).logits)
