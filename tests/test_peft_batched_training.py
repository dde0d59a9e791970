"""Several adapters trained in one batch, by sample and by token: each learns from its own alone."""

import copy

import pytest
import torch
from peft_models import (
    CURLORA,
    GATE_FREE,
    GATED,
    QV,
    SECURA,
    bert,
    gpt2,
    layers,
    llama,
    mlp,
    peft,
    tokens,
)
from test_peft_batched import BASE, NAMES, several
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from secura_kernels.backends import reference
from secura_kernels.peft import AdaptersByToken, SecuraConfig

DOUBLE = torch.float64
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [3, 4, 4, 4, 4, -1, -1, 5]])
SETTINGS = [
    (GATED,) * 3,
    (GATE_FREE,) * 3,
    (CURLORA,) * 3,
    (CURLORA | dict(basis="raw"), CURLORA | dict(basis="raw", seed=1), CURLORA | dict(basis="raw")),
    (GATED, CURLORA, GATE_FREE),
    (SECURA | dict(norm="figure"),) * 3,
    (GATED | dict(importance_decay=True),) * 3,
    (GATED, GATED | dict(target_modules=["0"]), GATE_FREE | dict(target_modules=["2"])),
]


def ids(settings) -> str:
    return "+".join(map(str, settings)) if len(set(map(str, settings))) > 1 else f"3 {settings[0]}"


def trained(model, names=("default", "second", "third")) -> dict[str, torch.Tensor]:
    """All of them trainable; the parameters by name."""
    model.set_requires_grad(list(names))
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def gradients(model, loss) -> dict[str, torch.Tensor]:
    found = trained(model)
    values = torch.autograd.grad(loss, list(found.values()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(found.items(), values, strict=True)
    }


def alone(model, x, names, weights) -> dict[str, torch.Tensor]:
    """The gradients of runs of one sample and one active adapter each, added."""
    total: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(names):
        at = [i for i, n in enumerate(names) if n == name]
        if name == BASE:
            continue
        model.set_adapter(name)
        for i in at:
            loss = (model(x[i : i + 1]) * weights[i : i + 1]).sum()
            for key, value in gradients(model, loss).items():
                total[key] = total.get(key, 0) + value
    return total


def check_same(got, expected, **tolerance):
    assert got.keys() == expected.keys() and len(got) >= 3
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **tolerance)
    assert sum(bool(value.any()) for value in got.values()) >= 3


@pytest.mark.parametrize("settings", SETTINGS, ids=ids)
def test_each_adapter_learns_from_its_own_samples(settings):
    model = several(mlp(dtype=DOUBLE), *settings)
    x, weights = torch.randn(6, 24, dtype=DOUBLE), torch.randn(6, 5, dtype=DOUBLE)
    expected = alone(model, x, NAMES, weights)
    model.set_adapter("default")
    trained(model)
    y = model.train()(x, adapter_names=NAMES)
    check_same(gradients(model, (y * weights).sum()), expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=ids)
def test_each_adapter_learns_from_its_own_tokens(settings):
    """As if each token were a sample, which it is for a model of linear layers."""
    model = several(mlp(dtype=DOUBLE), *settings)
    x, weights = torch.randn(2, 8, 24, dtype=DOUBLE), torch.randn(2, 8, 5, dtype=DOUBLE)
    names = [NAMES[i] if i >= 0 else BASE for i in SEGMENTS.flatten().tolist()]
    rows = x.flatten(0, 1)
    expected = alone(model, rows, names, weights.flatten(0, 1))
    trained(model)
    given = AdaptersByToken(NAMES, SEGMENTS.int())
    y = model.train()(x, adapter_names=given)
    torch.testing.assert_close(y.flatten(0, 1), model(rows, adapter_names=names))
    check_same(gradients(model, (y * weights).sum()), expected)
    flat = model(rows, adapter_names=given)  # as a model that flattens its tokens calls a layer
    assert torch.equal(flat, y.flatten(0, 1))


def eager(layer, x, names):
    """Each sample by the plain formula with its own adapter."""
    base, rows = layer.base_layer, []
    for row, name in zip(x, names, strict=True):
        if name == BASE:
            rows.append(base(row[None]))
            continue
        adapter = layer.secura_adapter[name]
        C, R = adapter.C_and_R(base.weight)
        change = dict(alpha=adapter.alpha, norm=adapter.norm, adapter_bias=adapter.adapter_bias)
        rows.append(
            reference.cur_linear(row[None], base.weight, base.bias, adapter.core(), C, R, **change)
        )
    return torch.cat(rows)


@pytest.mark.parametrize("settings", [GATED, GATE_FREE, CURLORA], ids=str)
@pytest.mark.parametrize("tokens", [False, True])
def test_bfloat16_is_off_by_no_more_than_eager_single_runs(settings, tokens):
    """Against float64, over all trained tensors of a layer and several draws."""
    errors = {"ours": 0.0, "eager": 0.0}
    for seed in range(6):
        torch.manual_seed(seed)
        x, weights = torch.randn(12, 24).bfloat16(), torch.randn(12, 20).bfloat16()
        model = several(mlp(seed=seed).bfloat16(), *[settings] * 3).train()
        trained(model)
        layer, exact = (
            layers(m)["base_model.model.0"] for m in (model, copy.deepcopy(model).double())
        )
        given = NAMES * 2
        if tokens:
            given = AdaptersByToken(NAMES * 2, torch.arange(12).view(3, 4))
        shape = (3, 4, 24) if tokens else (12, 24)
        ours = layer(x.view(shape), adapter_names=given).flatten(0, -2)

        def found(layer, y, weights=weights):
            parameters = list(layer.secura_adapter.parameters())
            return torch.autograd.grad((y * weights).sum(), parameters)

        truth = found(exact, eager(exact, x.double(), NAMES * 2), weights.double())
        results = dict(ours=found(layer, ours), eager=found(layer, eager(layer, x, NAMES * 2)))
        for form, values in results.items():
            for value, true in zip(values, truth, strict=True):
                errors[form] += float((value.double() - true).norm() / true.norm()) ** 2
    assert errors["ours"] ** 0.5 <= errors["eager"] ** 0.5 + 1e-6


@pytest.mark.parametrize(
    "build, targets",
    [(llama, [*QV, "down_proj"]), (gpt2, ["c_attn", "c_proj"]), (bert, ["query", "dense"])],
)
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_models_train(build, targets, checkpointing):
    """Also with gradient checkpointing, reentrant or not, whose second run has the same names."""
    model = several(build(dtype=DOUBLE), GATED, CURLORA, GATE_FREE, targets=targets)
    expected = {}
    for name in ("default", "second", "third"):
        model.set_adapter(name)
        at = [i for i, n in enumerate(NAMES) if n == name]
        loss = model(tokens(6)[at]).logits.square().sum()
        for key, value in gradients(model, loss).items():
            expected[key] = expected.get(key, 0) + value
    model.set_adapter("default")
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable(dict(use_reentrant=checkpointing))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    parameters = trained(model)
    at = [i for i, n in enumerate(NAMES) if n != BASE]
    model.train()(tokens(6), adapter_names=NAMES).logits[at].square().sum().backward()
    got = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
    check_same(got, expected)
    if checkpointing is not None:  # nothing is left behind
        for module in model.modules():
            function = vars(module).get("_gradient_checkpointing_func")
            assert function is None or "_keeping_names" not in repr(function)


def test_packed_sequences_equal_separate_ones():
    """A row of three sequences, each with its own adapter and positions, attention apart."""
    settings = [s | dict(task_type="CAUSAL_LM") for s in (GATED, GATED, CURLORA)]
    model = several(llama(dtype=DOUBLE), *settings, targets=QV)
    lengths, names = [3, 2, 3], ["default", "third", "second"]
    inputs = tokens(1, 8)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segments = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    apart = (segments[:, :, None] == segments[:, None]) & torch.ones(8, 8).tril().bool()
    mask = torch.zeros(1, 1, 8, 8, dtype=DOUBLE).masked_fill(~apart[:, None], -1e9)
    parts, expected = [], {}
    for name, part in zip(names, inputs.split(lengths, 1), strict=True):
        model.set_adapter(name)
        parts.append(model(part).logits)
        for key, value in gradients(model, parts[-1].square().sum()).items():
            expected[key] = expected.get(key, 0) + value
    trained(model)
    y = model.train()(
        inputs,
        position_ids=positions,
        attention_mask=mask,
        adapter_names=AdaptersByToken(names, segments),
    ).logits
    torch.testing.assert_close(y, torch.cat(parts, 1))
    check_same(gradients(model, y.square().sum()), expected)


@pytest.mark.parametrize("settings", [GATED, CURLORA], ids=str)
def test_64_adapters_learn_in_one_step(settings):
    model = peft(mlp(dtype=DOUBLE), **settings)
    names = ["default"] + [f"task{i}" for i in range(63)]
    for name in names[1:]:
        model.add_adapter(name, SecuraConfig(target_modules=["0", "2"], **settings))
    model.set_requires_grad(names)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    x, y = torch.randn(64, 24, dtype=DOUBLE), torch.randn(64, 5, dtype=DOUBLE)
    before = F.mse_loss(model.train()(x, adapter_names=names), y)
    before.backward()
    optimizer.step()
    assert F.mse_loss(model(x, adapter_names=names), y) < before
    cores = [
        layer.secura_adapter[n].core_parameter() for layer in layers(model).values() for n in names
    ]
    assert all(core.grad.any() for core in cores)


def test_what_trains_is_what_was_asked_for():
    model, x = several(mlp(), GATED, GATED, GATED), torch.randn(3, 24)
    names = ["default", "second", "third"]
    model.train()(x, adapter_names=names).sum().backward()
    layer = layers(model)["base_model.model.0"]
    learned = {n: a.core_parameter().grad is not None for n, a in layer.secura_adapter.items()}
    assert learned == {"default": True, "second": False, "third": False}  # PEFT's active one
    model.set_requires_grad(["second", "third"])
    model(x, adapter_names=names).sum().backward()
    assert all(a.core_parameter().grad.any() for a in layer.secura_adapter.values())


def test_autocast():
    model, x = several(mlp(), GATED, GATED, CURLORA), torch.randn(6, 24)
    parameters = trained(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = model.train()(x, adapter_names=NAMES)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in parameters.values())


def test_modules_to_save_train_with_their_samples():
    head = dict(task_type="SEQ_CLS", target_modules=["query"])
    model = several(bert(dtype=DOUBLE), GATED | head, GATED | head, CURLORA | head)
    saved = model.base_model.model.classifier.modules_to_save
    trained(model)
    model(tokens(6), adapter_names=NAMES).logits.sum().backward()
    assert all(saved[name].weight.grad.any() for name in ("default", "second", "third"))
    with pytest.raises(ValueError, match=r"by token: \['classifier'\] are whole modules"):
        model(tokens(6), adapter_names=AdaptersByToken(["default"], torch.zeros(6, 6).long()))


def test_checkpointing_that_forgets_the_names_is_refused():
    model, x = several(mlp(), GATED, GATED), torch.randn(2, 24, requires_grad=True)
    names = ["default", "second"]
    trained(model, names)
    first = layers(model)["base_model.model.0"]
    outer = model.base_model.model

    def forgetful(self, x):
        return checkpoint(self[2], checkpoint(self[0], x, use_reentrant=True), use_reentrant=True)

    outer.forward = forgetful.__get__(outer)
    y = model(x, adapter_names=names)
    with pytest.raises(RuntimeError, match="without the adapter_names of its forward pass"):
        y.sum().backward()
    del outer.forward
    whole = checkpoint(lambda x: model(x, adapter_names=names), x, use_reentrant=False)
    whole.sum().backward()  # the PEFT model itself hands them on
    assert first.secura_adapter["second"].core_parameter().grad.any()
    assert torch.equal(model(x), model(x))  # an unnamed pass is as before


def test_misuse_of_tokens_is_refused():
    long = torch.zeros(2, 3).long()
    for names in ("default", [1], None):
        with pytest.raises(TypeError, match="it must be a list of adapters' names"):
            AdaptersByToken(names, long)
    for segments in (long[0], long.float(), long.bool(), [[0]]):
        with pytest.raises(ValueError, match=r"segments=.*an integer tensor \(B, S\)"):
            AdaptersByToken(["default"], segments)
    for wrong in (2, -2):
        with pytest.raises(ValueError, match=r"segments=\[.*all in \[-1, 2\), numbers of names"):
            AdaptersByToken(["a", "b"], torch.tensor([[0, wrong]]))
    model, x = several(mlp(), GATED, SECURA | dict(norm=dict(ref="max"))), torch.randn(2, 3, 24)
    with pytest.raises(ValueError, match=r"adapter_names has \['thrid'\]: the model has"):
        model(x, adapter_names=AdaptersByToken(["thrid"], long))
    with pytest.raises(
        ValueError, match=r"of tokens \(2, 3\), and a layer got an input \(3, 2, 24\)"
    ):
        model(x.transpose(0, 1), adapter_names=AdaptersByToken(["default"], long))
    with pytest.raises(ValueError, match="by token: 'second' has a gate with ref='max'"):
        model(x, adapter_names=AdaptersByToken(["default", "second"], long))
    language = several(llama(), GATED, GATED, targets=QV)
    with pytest.raises(ValueError, match=r"tokens \(1, 6\), and a layer got an input \(1, 1, 32\)"):
        given = AdaptersByToken(["default"], torch.zeros(1, 6).long())
        language.generate(input_ids=tokens(1), adapter_names=given, max_new_tokens=3)


class WithNames:
    """A collator that says which adapter each sample has, or with ``packed`` each token."""

    def __init__(self, packed: bool) -> None:
        self.packed = packed

    def __call__(self, samples: list[dict]) -> dict:
        ids = torch.stack([sample["input_ids"] for sample in samples])
        names = [sample["adapter"] for sample in samples]
        if self.packed:
            names = AdaptersByToken(names, torch.arange(len(ids))[:, None].expand_as(ids))
        return dict(input_ids=ids, labels=ids, adapter_names=names)


@pytest.mark.parametrize("packed", [False, True])
def test_trainer_with_names_from_a_collator(packed, tmp_path):
    """As a plain loop over the same batches; evaluation takes the names too."""
    model = several(llama(), CURLORA, CURLORA, CURLORA)
    twin, data = copy.deepcopy(model), tokens(8)
    names = ["default", "second", "third", BASE] * 2
    samples = [dict(input_ids=row, adapter=name) for row, name in zip(data, names, strict=True)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    for each in (model, twin):
        each.set_requires_grad(["default", "second", "third"])
    trainer = Trainer(
        model,
        arguments,
        data_collator=WithNames(packed),
        train_dataset=samples,
        eval_dataset=samples,
    )
    trainer.train()
    optimizer = torch.optim.AdamW(list(trained(twin).values()), lr=0.01, weight_decay=0.0)
    twin.train()
    for part in range(2):
        batch = WithNames(packed)(samples[4 * part : 4 * part + 4])
        twin(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # The Trainer's AdamW is the fused one, which rounds in another order.
    check_same(trained(model), trained(twin), rtol=1e-6, atol=1e-8)
    twin.eval()
    with torch.no_grad():
        losses = [twin(**WithNames(packed)(samples[at : at + 4])).loss for at in (0, 4)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(sum(losses) / 2), rel=1e-6)
