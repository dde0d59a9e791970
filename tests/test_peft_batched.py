"""Batches in which every sample has its own adapter: each equals its single run."""

import pytest
import torch
from peft_models import (
    CURLORA,
    GATE_FREE,
    GATED,
    SECURA,
    bert,
    gpt2,
    layers,
    llama,
    logits,
    mlp,
    move,
    peft,
    t5,
    tokens,
)
from transformers import GenerationConfig

from secura_kernels.peft import SecuraConfig, batched

BASE = "__base__"
NAMES = ["default", BASE, "second", "default", "third", "second"]
DOUBLE = torch.float64


def several(model, *settings, targets=None):
    """Adapters default, second, third, ... with values of their own; the base in eval mode."""
    names = ["default", "second", "third", "fourth"]
    targets = {} if targets is None else dict(target_modules=targets)
    model = peft(model, **settings[0] | targets)
    for name, more in zip(names[1:], settings[1:], strict=False):
        config = dict(target_modules=model.peft_config["default"].target_modules) | more
        model.add_adapter(name, SecuraConfig(**config))
    for i, name in enumerate(model.peft_config):
        move(model, name, seed=i)
    return model.eval()


def single_runs(model, inputs, names):
    """Row by row, with one active adapter."""
    rows = []
    for i, name in enumerate(names):
        if name == BASE:
            with model.disable_adapter():
                rows.append(logits(model, inputs[i : i + 1]))
        else:
            model.set_adapter(name)
            rows.append(logits(model, inputs[i : i + 1]))
    return torch.cat(rows)


def check(model, inputs, names):
    mixed_rows = logits(model, inputs, adapter_names=names)
    expected = single_runs(model, inputs, names)
    torch.testing.assert_close(mixed_rows, expected)
    assert len({tuple(row.flatten().tolist()) for row in expected}) > 1
    if BASE in names and inputs.is_floating_point():  # of the same batch: to the bit
        i = names.index(BASE)
        with model.disable_adapter():
            assert torch.equal(mixed_rows[i], logits(model, inputs)[i])


@pytest.mark.parametrize(
    "settings",
    [
        (GATED,) * 3,
        (GATE_FREE,) * 3,
        (CURLORA,) * 3,
        (CURLORA, CURLORA | dict(seed=1), CURLORA),
        (GATED, CURLORA, GATE_FREE),
        (SECURA | dict(norm="published"),) * 3,
        (SECURA | dict(norm=dict(ref="max")),) * 3,
        (SECURA | dict(norm="figure"),) * 3,
        (GATED | dict(m=None),) * 3,
        (GATED | dict(importance_decay=True),) * 3,
        (GATED, GATED | dict(alpha=0.5), GATED | dict(adapter_bias=False)),
        (GATED, GATED | dict(target_modules=["0"]), GATE_FREE | dict(target_modules=["2"])),
    ],
    ids=lambda s: "+".join(map(str, s)) if len(set(map(str, s))) > 1 else f"3 {s[0]}",
)
def test_each_sample_equals_its_single_run(settings):
    model = several(mlp(dtype=DOUBLE), *settings)
    if "importance_decay" in settings[0]:
        for layer in layers(model).values():
            layer.secura_adapter["second"].importance.factor[::2] = 0.5
    check(model, torch.randn(6, 24, dtype=DOUBLE), NAMES)
    check(model, torch.randn(4, 24, dtype=DOUBLE), ["third", BASE, "second", "third"])


@pytest.mark.parametrize(
    "settings", [GATED, GATE_FREE, CURLORA, GATED | dict(norm_domain="weight")], ids=str
)
@pytest.mark.parametrize("stage", ["stage_m1", "stage_m2"])
def test_after_stages(settings, stage):
    if "norm_domain" in settings and stage == "stage_m1":
        pytest.skip("refused: W_eff is no delta_W")
    model = several(mlp(dtype=DOUBLE), *[settings] * 3)
    model.set_adapter("second")
    for layer in layers(model).values():
        getattr(layer, stage)()
    move(model, "second", seed=9)
    check(model, torch.randn(6, 24, dtype=DOUBLE), NAMES)


@pytest.mark.parametrize(
    "build, targets",
    [
        (llama, ["q_proj", "v_proj", "down_proj"]),
        (gpt2, ["c_attn", "c_proj"]),
        (bert, ["query", "dense"]),
    ],
)
def test_models(build, targets):
    model = several(build(dtype=DOUBLE), GATED, CURLORA, GATE_FREE, targets=targets)
    check(model, tokens(6), NAMES)


def test_modules_to_save_follow_their_sample():
    head = dict(task_type="SEQ_CLS", target_modules=["query"])
    model = several(bert(dtype=DOUBLE), GATED | head, GATED | head, CURLORA | head)
    saved = model.base_model.model.classifier.modules_to_save
    with torch.no_grad():
        for name in saved:
            saved[name].weight.normal_()
    check(model, tokens(6), NAMES)


@pytest.mark.parametrize(
    "build, targets, more",
    [
        (llama, ["q_proj", "v_proj"], dict(num_beams=3)),
        (llama, ["q_proj", "v_proj"], dict(num_beams=3, num_return_sequences=2)),
        (
            llama,
            ["q_proj", "v_proj"],
            dict(
                generation_config=GenerationConfig(
                    num_beams=2, max_new_tokens=4, pad_token_id=0, eos_token_id=2
                )
            ),
        ),
        (llama, ["q_proj"], {}),
        (t5, ["q", "v", "wo"], dict(num_beams=3)),
        (t5, ["q", "v"], {}),
    ],
)
def test_generation_with_beams(build, targets, more):
    model = several(build(dtype=DOUBLE), GATED, CURLORA, targets=targets)
    inputs, names = tokens(3), ["second", BASE, "default"]
    wanted = dict(do_sample=False, **more)
    if "generation_config" not in more:
        wanted["max_new_tokens"] = 4
    together = model.generate(input_ids=inputs, adapter_names=names, **wanted)
    copies = len(together) // 3
    for i, name in enumerate(names):
        if name == BASE:
            with model.disable_adapter():
                alone = model.generate(input_ids=inputs[i : i + 1], **wanted)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=inputs[i : i + 1], **wanted)
        rows = together[i * copies : (i + 1) * copies]
        assert torch.equal(rows[:, : alone.shape[1]], alone)
        assert not (rows[:, alone.shape[1] :] > 0).any()  # padding


def test_sampled_sequences_take_their_samples_adapter():
    model = several(llama(), GATED, CURLORA)
    torch.manual_seed(0)
    together = model.generate(
        input_ids=tokens(2),
        adapter_names=["second", "default"],
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=3,
    )
    assert together.shape[0] == 6
    assert torch.equal(together[:, :6], tokens(2).repeat_interleave(3, 0))


@pytest.mark.parametrize("settings", [GATED, CURLORA], ids=str)
def test_64_adapters_in_one_batch(settings):
    """They share their columns and rows: one product with R and one op for all."""
    model = peft(mlp(dtype=DOUBLE), **settings)
    names = ["default"] + [f"task{i}" for i in range(63)]
    for i, name in enumerate(names):
        if i:
            model.add_adapter(name, SecuraConfig(target_modules=["0", "2"], **settings))
        move(model, name, seed=i)
    model.eval()
    layer = layers(model)["base_model.model.0"]
    assert len(batched._groups(layer, names)) == 1
    order = torch.randperm(64).tolist()
    check(model, torch.randn(64, 24, dtype=DOUBLE), [names[i] for i in order])


def test_training_an_adapter_further_is_seen_by_the_next_batch():
    """What was found to be shared is not remembered too long."""
    model, x = several(mlp(dtype=DOUBLE), GATED, GATED), torch.randn(2, 24, dtype=DOUBLE)
    names = ["default", "second"]
    check(model, x, names)
    move(model, "second", seed=7)
    check(model, x, names)
    for layer in layers(model).values():  # as another file would bring
        adapter = layer.secura_adapter["second"]
        adapter.load_state_dict(adapter.state_dict() | dict(rows=adapter.rows.flip(0)))
    check(model, x, names)


def test_gradients_after_inference_mode():
    model, x = several(mlp(), GATED, CURLORA), torch.randn(2, 24)
    with torch.inference_mode():
        expected = model(x, adapter_names=["default", "second"])
    y = model(x, adapter_names=["default", "second"])
    # Without gradients t is columns of the base product, with them a product of its own.
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    y.sum().backward()


@pytest.mark.parametrize("settings", [(GATED, CURLORA), (SECURA | dict(norm="figure"), GATED)])
def test_autocast(settings):
    model, x = several(mlp(), *settings), torch.randn(4, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = logits(model, x, adapter_names=["default", "second", BASE, "default"])
        alone = [logits(model, x[:1]), logits(model, x[3:])]
        assert layers(model)["base_model.model.0"](x).dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16 == alone[0].dtype
    for row, expected in zip((0, 3), alone, strict=True):
        assert (y[row] - expected[0]).norm() <= 2 * torch.finfo(torch.bfloat16).eps * y[row].norm()


def test_misuse_is_refused():
    model, x = several(mlp(), GATE_FREE, CURLORA), torch.randn(2, 24)
    with pytest.raises(ValueError, match=r"adapter_names has \['thrid'\]: the model has"):
        model(x, adapter_names=["default", "thrid"])
    with pytest.raises(ValueError, match=r"'3 names' is not allowed.*each of the 2 samples"):
        model(x, adapter_names=["default"] * 3)
    with pytest.raises(TypeError, match="adapter_names is a str"):
        model(x, adapter_names="default")
    model.merge_adapter()
    before = logits(model, x)
    with pytest.raises(ValueError, match=r"call unmerge_adapter\(\) first"):
        model(x, adapter_names=["default"] * 2)
    assert torch.equal(logits(model, x), before)  # no hook is left behind
