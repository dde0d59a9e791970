"""The divergence from the base as a loss beside the task's."""

import copy

import pytest
import torch
from retention_models import TOKENS, llama
from test_budget import TASK, TEXT, adapted, move

pytest.importorskip("peft", reason="some of the models are PEFT's")
from peft import LoraConfig, get_peft_model

from secura_kernels import CURLoRALinear, SECURALinear
from secura_kernels.train.adapted import without_adapters
from secura_kernels.train.kl_loss import BaseKL
from secura_kernels.train.retention import base_kl

WHOLE = [dict(input_ids=TOKENS)]


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("how", ["peft", SECURALinear, CURLoRALinear])
def test_it_is_the_divergence_that_is_measured(how):
    model, _ = adapted(how=how)
    keep = BaseKL(model, WHOLE, weight=3.0, rows=len(TOKENS))
    loss = keep()
    loss.backward()
    # At the base the divergence is at its least.
    assert abs(loss.item()) < 1e-6 and all(
        p.grad.abs().max() < 1e-5 for p in trained(model).values()
    )
    move(model, 1.0)
    assert keep().item() == pytest.approx(3.0 * base_kl(model, WHOLE), rel=1e-5)


def test_the_gradient_is_that_of_the_formula_and_the_cores_alone():
    model, base = adapted(how=SECURALinear)
    model, base = model.double(), base.double().log_softmax(-1)
    move(model, 1.0)
    with torch.no_grad(), without_adapters(model):
        base = model(TOKENS).logits.log_softmax(-1)
    parameters = trained(model)
    moved = model(TOKENS).logits.log_softmax(-1)
    formula = (base.exp() * (base - moved)).sum() / TOKENS.numel()
    expected = torch.autograd.grad(formula, list(parameters.values()))
    BaseKL(model, WHOLE, weight=1.0, rows=len(TOKENS))().backward()
    for (name, parameter), grad in zip(parameters.items(), expected, strict=True):
        # The loss is in float32, as the measure is.
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6, msg=name)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_rows_are_drawn_anew_and_alike_for_a_seed():
    model, _ = adapted()
    move(model, 1.0)
    first, again, other = (BaseKL(model, TEXT, rows=2, seed=seed) for seed in (0, 0, 1))
    draws = [[keep().item() for _ in range(6)] for keep in (first, again, other)]
    assert draws[0] == draws[1] != draws[2] and len(set(draws[0])) > 2


def test_padding_does_not_count_and_labels_are_left_out():
    model, _ = adapted()
    move(model, 1.0)
    padded = torch.nn.functional.pad(TOKENS, (0, 3))
    mask = torch.nn.functional.pad(torch.ones_like(TOKENS), (0, 3))
    batch = dict(input_ids=padded, attention_mask=mask, labels=padded)
    plain, masked = (BaseKL(model, [b], rows=len(TOKENS))() for b in (WHOLE[0], batch))
    assert masked.item() == pytest.approx(plain.item(), rel=1e-4)


def test_without_text_the_base_writes_it(monkeypatch):
    model, _ = adapted()
    texts = []
    for std in (0.0, 30.0):  # what adapters have learned is not in it
        move(model, std)
        texts.append(BaseKL(model, tokens=64, progress=False).batches)
    for batch, again in zip(*texts, strict=True):
        assert torch.equal(batch["input_ids"], again["input_ids"])


@pytest.mark.parametrize("adapter", ["natural", "LoRA"])
def test_it_holds_a_model_back(adapter):
    ends = {}
    start, _ = adapted("natural")
    if adapter == "LoRA":
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        start = get_peft_model(llama(initializer_range=0.3), config).eval()
    for weight in (0.0, 30.0):
        model = copy.deepcopy(start)
        keep = BaseKL(model, TEXT, weight=weight, rows=4)
        modes = [module.training for module in model.train().modules()]
        optimizer = torch.optim.AdamW(trained(model).values(), lr=3e-2)
        for _ in range(10):
            (model(**TASK[0]).loss + keep()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert [module.training for module in model.modules()] == modes
        ends[weight] = base_kl(model, TEXT)
    assert 0 < ends[30.0] < 0.5 * ends[0.0]


def test_bad_arguments_are_refused():
    model, _ = adapted()
    for settings, said in (
        (dict(weight=-1.0), "weight=-1.0"),
        (dict(rows=0), "rows=0"),
        (dict(seed=-1), "seed=-1"),
    ):
        with pytest.raises(ValueError, match=said):
            BaseKL(model, TEXT, **settings)
    for general, said in (
        ([], "general="),
        ([TOKENS], r"general\[0\]='Tensor'"),
        ([*TEXT, dict(labels=TOKENS)], r"general\[2\]"),
        ([dict(input_ids=TOKENS, attention_mask=TOKENS[:2])], r"general\[0\]"),
        ([dict(input_ids=TOKENS[:0])], r"general\[0\]=0"),
    ):
        with pytest.raises(ValueError, match=said):
            BaseKL(model, general)
    with pytest.raises(ValueError, match="adapted layers"):
        BaseKL(llama(), TEXT)
    with pytest.raises(ValueError, match="logits"):
        BaseKL(get_peft_model(llama().model, LoraConfig(target_modules=["q_proj"])), TEXT)()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="is merged"):
        BaseKL(model, TEXT)
