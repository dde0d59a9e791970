"""The KL divergence from the base: measured, predicted from the cores, and kept within a budget."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="the callbacks are transformers'")
from peft import get_peft_model
from retention_models import DATA, HELD_OUT, TOKENS, llama
from transformers import Trainer, TrainingArguments

from secura_kernels import CURLoRALinear, SECURALinear, calibrate
from secura_kernels.peft import SecuraConfig
from secura_kernels.train.adapted import without_adapters
from secura_kernels.train.callbacks import RetentionCallback
from secura_kernels.train.retention import base_kl, core_size

TARGETS = ["q_proj", "v_proj"]
TEXT = [dict(input_ids=TOKENS[:4]), dict(input_ids=TOKENS[4:])]
TASK = [dict(input_ids=TOKENS[:4].flip(1), labels=TOKENS[:4].flip(1))]


def adapted(basis="whitened", how="peft", **settings):
    """A calibrated model, and the loss and outputs of its base."""
    model = llama(initializer_range=0.3).eval()
    base = model(TOKENS).logits.detach()
    settings = dict(r=4, basis=basis) | settings
    if how == "peft":
        settings = dict(variant="secura", target_modules=TARGETS) | settings
        model = get_peft_model(model, SecuraConfig(**settings)).eval()
    else:
        model.requires_grad_(False)
        for name, linear in list(model.named_modules()):
            if name.endswith(tuple(TARGETS)):
                model.set_submodule(name, how.from_linear(linear, **settings))
    if basis in ("whitened", "natural"):
        calibrate(model, TEXT, TASK if basis == "natural" else None, progress=False)
    return model, base


@torch.no_grad()
def move(model, std):
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if hasattr(module, "core_parameter"):
            core = module.core_parameter()
            core.copy_(std * torch.randn(core.shape, generator=generator))


@pytest.mark.parametrize("how", ["peft", SECURALinear, CURLoRALinear])
def test_the_measured_divergence_is_that_of_the_formula(how):
    model, base = adapted(how=how)
    assert base_kl(model, TEXT) == 0
    move(model, 1.0)
    expected = (
        F.kl_div(
            model(TOKENS).logits.log_softmax(-1),
            base.log_softmax(-1),
            reduction="sum",
            log_target=True,
        )
        / TOKENS.numel()
    )
    assert base_kl(model, TEXT) == pytest.approx(float(expected), rel=1e-4) and expected > 1e-3
    with without_adapters(model):
        assert torch.equal(model(TOKENS).logits, base)
    padded = F.pad(TOKENS, (0, 3))
    mask = F.pad(torch.ones_like(TOKENS), (0, 3))
    both = base_kl(model, [dict(input_ids=padded, attention_mask=mask, labels=padded)])
    assert both == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(ValueError, match="at least one token"):
        base_kl(model, [])


def test_the_size_of_cores_is_in_nats():
    """The sum of ||V||^2 unit^2 / 2, of the core that earlier stages left too."""
    model, _ = adapted()
    move(model, 1.0)
    adapters = [
        a
        for m in model.modules()
        if hasattr(m, "secura_adapter")
        for a in m.secura_adapter.values()
    ]
    expected = sum(float((a.A.T @ a.B.T).square().sum() * a.unit**2 / 2) for a in adapters)
    assert core_size(model) == pytest.approx(expected, rel=1e-5)
    for module in model.modules():
        if hasattr(module, "secura_adapter"):
            module.stage_m2()
    assert core_size(model) == pytest.approx(expected, rel=1e-5)
    assert core_size(adapted("orthonormal")[0]) == 0


def trained(model, folder, callback, steps=30, **settings):
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            seed=0,
            per_device_train_batch_size=4,
            save_strategy="no",
            **dict(logging_steps=1, max_steps=steps, learning_rate=0.3) | settings,
        ),
        train_dataset=DATA,
    )
    callback.attach(trainer)
    trainer.train()
    return {
        name: {
            logs["step"]: logs[f"retention/{name}"]
            for logs in trainer.state.log_history
            if f"retention/{name}" in logs
        }
        for name in ("kl", "predicted_kl")
    }


@pytest.mark.parametrize("basis", ["whitened", "natural"])
def test_the_prediction_follows_the_divergence(basis, tmp_path):
    model, _ = adapted(basis)
    curves = trained(model, tmp_path, RetentionCallback(TEXT, every=10, budget=100.0))
    assert list(curves["predicted_kl"]) == list(range(31))
    assert list(curves["kl"]) == [0, 10, 20, 30]
    assert curves["kl"][30] == pytest.approx(base_kl(model, TEXT), rel=1e-6)
    assert curves["kl"][30] > 0.01
    for step in (10, 20, 30):
        ratio = curves["predicted_kl"][step] / curves["kl"][step]
        assert 0.5 < ratio < 2, (step, ratio)


@pytest.mark.parametrize("how", ["stop", "hold"])
@pytest.mark.parametrize("variant", ["secura", "curlora"])
def test_a_budget_is_kept(how, variant, tmp_path):
    limit = 0.02
    model, _ = adapted(variant=variant)
    callback = RetentionCallback(TEXT, every=5, budget=limit, at_budget=how)
    curves = trained(model, tmp_path, callback)
    last = max(curves["kl"])
    if how == "stop":
        assert f"step {last}: kl" in callback.stopped and "the budget 0.02" in callback.stopped
        assert last < 30 and curves["kl"][last] > limit
        assert all(curves["predicted_kl"][step] < 2 * limit for step in range(last))
        assert base_kl(model, TEXT) == pytest.approx(curves["kl"][last], rel=1e-6)
    else:
        assert callback.stopped is None and last == 30
        assert limit / 2 < base_kl(model, TEXT) < 1.5 * limit


def test_a_divergence_that_is_no_number_stops(tmp_path):
    model, _ = adapted()
    callback = RetentionCallback(TEXT, every=1, budget=1.0)
    curves = trained(model, tmp_path, callback, steps=3, learning_rate=math.inf)
    assert "kl nan nats" in callback.stopped and len(curves["kl"]) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(budget=0), "budget=0 is not allowed"),
        (dict(budget=1.0, at_budget="penalty"), "at_budget='penalty' is not allowed"),
        (
            dict(budget=1.0, batches=None),
            "budget=1.0 is not allowed: it must be None without batches",
        ),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        RetentionCallback(**dict(batches=TEXT) | change)


def test_a_budget_needs_a_calibrated_model(tmp_path):
    model, _ = adapted("orthonormal")
    with pytest.raises(ValueError, match=r"budget=1.0 is not allowed: .* calibrate"):
        trained(model, tmp_path, RetentionCallback(TEXT, budget=1.0))


def test_without_a_budget_batches_need_labels(tmp_path):
    model, _ = adapted()
    with pytest.raises(ValueError, match="a dict with a tensor of labels"):
        trained(model, tmp_path, RetentionCallback(TEXT))
    trained(model, tmp_path, RetentionCallback(HELD_OUT, budget=1.0), steps=1)


def test_a_merged_model_has_no_base():
    model, _ = adapted()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="merged"):
        base_kl(model, TEXT)
