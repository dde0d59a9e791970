"""Training a PEFT model: dtypes, autocast, checkpointing, torch.compile, hotswap, the Trainer."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft_models import (
    CURLORA,
    GATED,
    SECURA,
    assert_same_state,
    layers,
    llama,
    logits,
    mlp,
    move,
    peft,
    state,
    tokens,
)
from transformers import Trainer, TrainingArguments

from secura_kernels.peft import SecuraConfig, hotswap_adapter

FORMS = [GATED, CURLORA, SECURA | dict(norm="figure")]


def gradients(model, x=None):
    """Loss and gradients of one training step's backward pass."""
    model.train().zero_grad()
    x = tokens() if x is None else x
    loss = model(x, labels=x).loss
    loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in trained.values())
    return {"loss": loss.detach(), **trained}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


# Dtypes.


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("basis", ["raw", "orthonormal"])
def test_a_bfloat16_model_trains_in_float32_unless_told_otherwise(autocast, basis, tmp_path):
    config = SecuraConfig(
        target_modules=["q_proj", "down_proj"], **GATED | dict(r=8, m=None, basis=basis)
    )
    model = get_peft_model(llama(dtype=torch.bfloat16), config, autocast_adapter_dtype=autocast)
    move(model).save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(
        llama(dtype=torch.bfloat16),
        tmp_path,
        is_trainable=True,
        autocast_adapter_dtype=autocast,
        low_cpu_mem_usage=autocast,
    )
    for each in (model, read):
        gradients(each)
        for layer in layers(each).values():
            adapter = layer.secura_adapter["default"]
            assert {p.dtype for p in adapter.parameters()} == {
                torch.float32 if autocast else torch.bfloat16
            }
            assert adapter.C is None or adapter.C.dtype == adapter.R.dtype == torch.bfloat16
    assert torch.equal(logits(model.eval(), tokens()), logits(read.eval(), tokens()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_a_model_changes_its_dtype(dtype, settings):
    """As near to float64 as one that was built in it and given the same values, but for what the
    core's product and its folding are rounded by, the trained tensors being of that dtype too."""
    model, x = move(peft(mlp(), **settings)).to(dtype), torch.randn(5, 24).to(dtype)
    rival, truth = peft(mlp(dtype=dtype), **settings), peft(mlp().to(dtype).double(), **settings)
    for other in (rival, truth):
        for theirs, ours in zip(layers(other).values(), layers(model).values(), strict=True):
            theirs, ours = (layer.secura_adapter["default"] for layer in (theirs, ours))
            theirs.cols, theirs.rows = ours.cols, ours.rows
            with torch.no_grad():
                for parameter, value in zip(theirs.parameters(), ours.parameters(), strict=True):
                    parameter.copy_(value)
    truth = logits(truth, x.double())
    error, allowed = ((logits(m, x).double() - truth).norm() for m in (model, rival))
    assert error <= allowed + 2 * torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("settings", FORMS, ids=str)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast_training(settings, base_dtype):
    model = move(peft(llama(dtype=base_dtype), **settings), std=0.05)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model.train()(tokens(), labels=tokens()).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_frozen_adapter_runs_in_training_mode(tmp_path):
    """Importance decay hooks onto a gradient that a frozen adapter has not."""
    settings = GATED | dict(importance_decay=True)
    move(peft(llama(), **settings)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True).train()
    copy.deepcopy(model)(tokens())
    assert not model(tokens()).logits.requires_grad
    model.set_requires_grad("default")
    gradients(model)
    assert not any(
        m.secura_adapter["default"].importance.count.any() for m in layers(model).values()
    )  # each backward pass ends a count


# Memory savers.


@pytest.mark.parametrize(
    "settings",
    [*FORMS, GATED | dict(importance_decay=dict(ratio=0.0, edge=1.99, decay=0.5))],
    ids=str,
)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(settings, reentrant):
    model = move(peft(llama(), **settings))
    saver = copy.deepcopy(model)
    saver.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    saver.enable_input_require_grads()
    for _ in range(2):  # the second runs with the decay factors of the first
        results = []
        for each in (model, saver):
            torch.manual_seed(3)
            results.append(gradients(each))
        assert_equal(*results)
    if "importance_decay" in settings:
        for ours, theirs in zip(layers(model).values(), layers(saver).values(), strict=True):
            factors = [m.secura_adapter["default"].importance.factor for m in (ours, theirs)]
            assert torch.equal(*factors) and (factors[0] < 1).any()


def test_prepare_model_for_kbit_training_is_harmless():
    expected = gradients(move(peft(llama(), **GATED)))
    prepared = prepare_model_for_kbit_training(llama(), use_gradient_checkpointing=False)
    assert_equal(gradients(move(peft(prepared, **GATED))), expected)


# torch.compile and hotswap.


@pytest.fixture
def compiling():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "settings",
    [
        GATED | dict(importance_decay=True),
        SECURA | dict(norm="figure"),
        CURLORA | dict(basis="orthonormal", target_modules=["0"]),
    ],
    ids=str,
)
def test_compiled_without_a_graph_break(settings, compiling):
    """Two training steps' forward and backward passes, to the bit."""
    model = move(peft(mlp(), **settings)).train()
    twin, x = copy.deepcopy(model), torch.randn(3, 24)
    run = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        results = []
        for module, forward in ((model, model), (twin, run)):
            torch.manual_seed(3)
            module.zero_grad()
            y = forward(x)
            (y - 1).square().mean().backward()
            results.append([y, *(p.grad for p in module.parameters() if p.requires_grad)])
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    "build, settings",
    [
        (llama, GATED | dict(target_modules=["q_proj"], layers_to_transform=[0])),
        (mlp, CURLORA | dict(basis="orthonormal")),
        (mlp, GATED | dict(save_projection=False)),
    ],
)
def test_hotswap_compiles_nothing_again(build, settings, tmp_path, compiling):
    x, model = tokens() if build is llama else torch.randn(3, 24), peft(build(), **settings)
    expected = []
    for seed in range(3):
        move(model, seed=seed)
        model.save_pretrained(tmp_path / str(seed))
        expected.append(logits(model, x))
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    for seed in (0, 1, 2, 0):
        hotswap_adapter(model, tmp_path / str(seed))
        assert torch.equal(logits(run, x), expected[seed])
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_hotswap_refuses_what_does_not_fit(tmp_path):
    model = move(peft(llama(), **GATED))
    model.save_pretrained(tmp_path / "right")
    before = state(model)
    for i, other in enumerate(
        (dict(r=3), dict(norm=None), dict(alpha=2.0), dict(m=8), dict(adapter_bias=False))
    ):
        peft(llama(), **GATED | other).save_pretrained(tmp_path / str(i))
        with pytest.raises(ValueError, match=f"{next(iter(other))}=.* is not allowed"):
            hotswap_adapter(model, tmp_path / str(i))
    peft(llama(), target_modules=["q_proj"], **GATED).save_pretrained(tmp_path / "less")
    with pytest.raises(ValueError, match="v_proj': the state has no A"):
        hotswap_adapter(model, tmp_path / "less")
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "lora"
    )
    with pytest.raises(ValueError, match="a folder with a SECURA adapter"):
        hotswap_adapter(model, tmp_path / "lora")
    with pytest.raises(ValueError, match="adapter_name='other' is not allowed"):
        hotswap_adapter(model, tmp_path / "right", "other")
    merged = peft(llama(), **GATED)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged: call unmerge_adapter"):
        hotswap_adapter(merged, tmp_path / "right")
    assert_same_state(model, before)


# The Trainer.


def run_trainer(folder, settings, steps, resume=None):
    torch.manual_seed(0)
    model = peft(llama(), **settings)
    data = [dict(input_ids=row, labels=row) for row in tokens(12)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        seed=5,
        disable_tqdm=True,
        logging_steps=100,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        GATED | dict(importance_decay=dict(ratio=0.0, edge=1.999, decay=0.5)),
        SECURA | dict(norm="figure", modules_to_save=["lm_head"]),
    ],
    ids=str,
)
def test_a_resumed_run_equals_an_uninterrupted_one(settings, tmp_path):
    whole = run_trainer(tmp_path / "whole", settings, 5)
    run_trainer(tmp_path / "parts", settings, 3)
    resumed = run_trainer(tmp_path / "parts", settings, 5, tmp_path / "parts" / "checkpoint-3")
    assert_same_state(resumed, state(whole))
    if "importance_decay" in settings:
        assert any(
            (layer.secura_adapter["default"].importance.factor < 1).any()
            for layer in layers(whole).values()
        )
    untrained = peft(llama(), **settings).state_dict()
    assert any(not torch.equal(v, untrained[k]) for k, v in whole.state_dict().items())
