"""PSOFT and TinyLoRA adapters of PEFT's as CURLoRA adapters: equal, trainable, or refused."""

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PsoftConfig,
    TinyLoraConfig,
    get_peft_model,
)
from peft_models import bert, gpt2, layers, llama, logits, tokens
from torch import nn

from secura_kernels.nn import factors
from secura_kernels.peft import SecuraConfig, from_peft

QV = ["q_proj", "v_proj"]
PSOFT = {
    "psoft": dict(r=4, psoft_alpha=8),
    "free": dict(r=4, psoft_alpha=4, psoft_orth=False, psoft_mag_a=False),
    "pissa": dict(r=4, ab_svd_init="pissa_init", psoft_mag_b=False),
    "neumann": dict(r=4, use_cayley_neumann=True),
    "randomised": dict(r=4, psoft_svd="lowrank", psoft_svd_lowrank_niter=4),
}
FORMS = {name: PsoftConfig(target_modules=QV, **form) for name, form in PSOFT.items()} | {
    "tinylora": TinyLoraConfig(r=3, u=5, target_modules=QV),
    "tied": TinyLoraConfig(r=3, u=5, target_modules=QV, weight_tying=1.0, save_projection=False),
}


def moved(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * noise.to(parameter.dtype))
    return model.eval()


def saved(config, path, base=llama, **settings) -> None:
    moved(get_peft_model(base(), config)).save_pretrained(path)


def changes(model: PeftModel) -> dict[str, torch.Tensor]:
    """delta_W of each layer by its name in the base model, as its method merges it."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("form", FORMS)
def test_a_loaded_adapter_becomes_one_of_ours(form, tmp_path, monkeypatch):
    """Without an SVD of our own; saved and loaded again, merged, and trained."""
    saved(FORMS[form], tmp_path / "theirs")
    x = tokens()
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "theirs")
    expected, deltas = logits(theirs, x), changes(theirs)
    assert float((expected - logits(llama(), x)).norm()) > 0.1
    monkeypatch.setattr(factors, "svd_sides", None)
    ours = from_peft(theirs)
    assert isinstance(ours.peft_config["default"], SecuraConfig) and not ours.training
    assert not any(p.requires_grad for p in ours.parameters())
    torch.testing.assert_close(logits(ours, x), expected, rtol=1e-4, atol=1e-5)
    found = changes(ours)
    assert found.keys() == deltas.keys() and len(found) == 4
    for name, delta in found.items():
        torch.testing.assert_close(delta, deltas[name])
    for layer in layers(ours).values():
        adapter = layer.secura_adapter["default"]
        for side in (adapter.C, adapter.R):  # as of the svd basis, for the learning rate
            torch.testing.assert_close(side.norm() ** 2, torch.tensor(float(adapter.r)))
    plain = logits(ours, x)
    ours.save_pretrained(tmp_path / "ours")
    for low in (False, True):
        read = PeftModel.from_pretrained(
            llama(), tmp_path / "ours", low_cpu_mem_usage=low, is_trainable=True
        )
        assert torch.equal(logits(read, x), plain)
    read(x, labels=x).loss.backward()
    gradients = {n for n, p in read.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(gradients) == 4 and all(n.endswith("default.U") for n in gradients)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(logits(merged, x), plain, rtol=1e-4, atol=1e-5)


def test_merged_weights_are_equal_to_rounding_in_float64():
    """TinyLoRA alone: PEFT's PSOFT takes no float64 weight."""
    theirs = moved(get_peft_model(llama(dtype=torch.float64), FORMS["tinylora"]))
    deltas = changes(theirs)
    for name, delta in changes(from_peft(theirs)).items():
        torch.testing.assert_close(delta, deltas[name], rtol=0, atol=1e-15)


@pytest.mark.parametrize("form", ["psoft", "tinylora"])
def test_a_bfloat16_base(form):
    """C and R are rounded to bfloat16: the change is off by no more than a few roundings of it."""
    theirs = moved(get_peft_model(llama(dtype=torch.bfloat16), FORMS[form]))
    deltas = changes(theirs)
    for name, delta in changes(from_peft(theirs)).items():
        off = (delta.float() - deltas[name].float()).norm()
        assert off <= 2 * torch.finfo(torch.bfloat16).eps * deltas[name].float().norm(), name


def test_conv1d_ranks_and_another_name(tmp_path):
    """TinyLoRA takes as many directions as a layer has."""
    config = TinyLoraConfig(r=40, u=3, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
    base = gpt2()
    base.transformer.h[0].attn.c_attn = nn.Linear(32, 96).requires_grad_(False)
    theirs = moved(get_peft_model(base, config, adapter_name="task"))
    expected = logits(theirs, tokens())
    ours = from_peft(theirs, "task")
    torch.testing.assert_close(logits(ours, tokens()), expected, rtol=1e-4, atol=1e-5)
    assert {layer.secura_adapter["task"].r for layer in layers(ours).values()} == {32}
    assert all(p.requires_grad for n, p in ours.named_parameters() if n.endswith(".U"))


def test_layers_of_other_ranks():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide = nn.Linear(24, 3), nn.Linear(24, 20)

        def forward(self, x):
            return self.narrow(x).sum(-1) + self.wide(x).sum(-1)

    theirs = get_peft_model(Two(), TinyLoraConfig(r=4, u=3, target_modules=["narrow", "wide"]))
    x = torch.randn(5, 24)
    expected = moved(theirs)(x).detach()
    ours = from_peft(theirs)
    torch.testing.assert_close(ours(x), expected)
    ranks = {n.split(".")[-1]: m.secura_adapter["default"].r for n, m in layers(ours).items()}
    assert ranks == {"narrow": 3, "wide": 4}


def test_modules_to_save_travel_along(tmp_path):
    config = PsoftConfig(
        r=4, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    theirs = moved(get_peft_model(bert(), config))
    expected, untouched = logits(theirs, tokens()), logits(bert(), tokens())
    ours = from_peft(theirs)
    torch.testing.assert_close(logits(ours, tokens()), expected, rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(bert(), tmp_path)
    torch.testing.assert_close(logits(read, tokens()), expected, rtol=1e-4, atol=1e-5)
    with ours.disable_adapter():
        assert torch.equal(logits(ours, tokens()), untouched)


def two_adapters(model):
    model.add_adapter("b", FORMS["psoft"])


@pytest.mark.parametrize(
    ("config", "prepare", "message"),
    [
        (LoraConfig(target_modules=QV), None, "of PEFT's method LORA, and only those of"),
        (SecuraConfig(r=4, target_modules=QV), None, "of PEFT's method SECURA"),
        (FORMS["psoft"], two_adapters, r"the model has \['b'\] beside it: delete_adapter"),
        (FORMS["psoft"], lambda m: m.merge_adapter(), r"it is merged: call unmerge_adapter\(\)"),
        (
            TinyLoraConfig(target_modules=["q_proj"], bias="all"),
            None,
            "it trains biases beside its layers",
        ),
        (
            TinyLoraConfig(target_modules=["q_proj", "embed_tokens"]),
            None,
            "it is an embedding: only linear layers can be converted",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused_and_changes_nothing(config, prepare, message):
    model = moved(get_peft_model(llama(), config))
    if prepare is not None:
        prepare(model)
    modules = dict(model.named_modules())
    expected = logits(model, tokens())
    with pytest.raises(ValueError, match=message):
        from_peft(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model, tokens()), expected)


def test_an_error_on_the_way_changes_nothing(monkeypatch):
    model = moved(get_peft_model(llama(), FORMS["psoft"]))
    modules, expected = dict(model.named_modules()), logits(model, tokens())

    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("secura_kernels.peft.conversion._fill", fails)
    with pytest.raises(KeyboardInterrupt):
        from_peft(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model, tokens()), expected)
    assert model.peft_config["default"].peft_type == "PSOFT"


def test_other_arguments():
    with pytest.raises(TypeError, match="model is a LlamaForCausalLM: it must be a PeftModel"):
        from_peft(llama())
    with pytest.raises(ValueError, match=r"adapter_name='a' is not allowed: .* \['default'\]"):
        from_peft(get_peft_model(llama(), FORMS["psoft"]), "a")
