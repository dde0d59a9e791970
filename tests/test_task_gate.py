"""The gate for tokens of the task: its formula, what it passes, tasks in turn, files, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICE
from peft import PeftModel
from peft_models import check_trains, layers, llama, loaded, logits, move, peft, tokens
from quantised import quantised
from safetensors.torch import load_file, save_file
from torch import nn

from secura_kernels import CURLoRALinear, calibrate, load_adapter, save_adapter
from secura_kernels.nn.task_gate import ALWAYS_OPEN
from secura_kernels.peft import SecuraConfig, save_as_lora
from secura_kernels.train.calibration.task_gate import PRIOR, RIDGE

NATURAL = dict(r=4, basis="natural", variant="curlora")
GENERAL = [dict(input_ids=tokens(4, 12, seed)) for seed in range(3)]
TASK = [dict(input_ids=ids, labels=ids) for ids in (tokens(3, 10, seed) for seed in (5, 6))]
NEXT = [dict(input_ids=ids, labels=ids) for ids in (tokens(3, 10, seed) for seed in (7, 8))]


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def clouds(count, middle, seed):
    """Inputs (count, 10), float64, spread unevenly around a middle that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1, 10, dtype=torch.float64)
    offset = torch.randn(10, generator=torch.Generator().manual_seed(middle)).double()
    return torch.randn(count, 10, generator=generator, dtype=torch.float64) * scales + offset


def batch_of(x, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return dict(x=x, labels=torch.randint(7, (len(x),), generator=generator))


def one_layer(dtype=torch.float64, r=3, **settings):
    torch.manual_seed(0)
    linear = nn.Linear(10, 7).to(dtype)
    return CURLoRALinear.from_linear(linear, r, basis="natural", **settings).eval()


def gate_of(layer, x):
    """The posterior of each row of x, with the layer's stored gate, in float64."""
    w, c = layer.gate.double().unbind(-1)
    return torch.sigmoid(x.double() @ layer.R.double().T @ w + c.sum())


def test_the_gate_is_fisher_s_discriminant():
    layer, x = one_layer(), clouds(90, 1, 1)
    batches = [batch_of(clouds(40, 2, seed), seed) for seed in (2, 3)]
    calibrate(
        layer, [x[:50], x[50:]], batches, loss=cross_entropy, gated=True, rank=10, progress=False
    )
    general, task = (t @ layer.R.T for t in (x, torch.cat([batch["x"] for batch in batches])))
    S = (torch.cov(general.T, correction=0) + torch.cov(task.T, correction=0)) / 2
    S = S + RIDGE * S.diagonal().mean() * torch.eye(3)
    w = torch.linalg.solve(S, task.mean(0) - general.mean(0))
    c = PRIOR - w @ (task.mean(0) + general.mean(0)) / 2
    torch.testing.assert_close(layer.gate[:, 0].double(), w, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.gate[:, 1].double().sum(), c, rtol=1e-3, atol=1e-3)


def test_tokens_that_are_all_the_same_make_no_wild_gate():
    layer, x = one_layer(torch.float32), torch.ones(50, 10)
    calibrate(layer, [x], [batch_of(2 * x)], loss=cross_entropy, gated=True, progress=False)
    assert layer.gate.isfinite().all() and layer.gate.abs().max() < 1e9
    assert gate_of(layer, x[:1]) < 0.01 and gate_of(layer, 2 * x[:1]) > 0.99


def test_it_opens_for_what_looks_like_the_task():
    """Of samples that it has not seen."""
    layer = one_layer()
    calibrate(
        layer,
        [clouds(200, 1, 1)],
        [batch_of(clouds(80, 2, 2))],
        loss=cross_entropy,
        gated=True,
        progress=False,
    )
    assert gate_of(layer, clouds(100, 2, 5)).median() > 0.9
    assert gate_of(layer, clouds(100, 1, 6)).median() < 0.05


def two_tasks_learned(dtype=torch.float64, first=True, second=True, **settings):
    """A layer that has learned two tasks, each with a gate or without."""
    layer = one_layer(dtype, **settings)
    kept = None
    for middle, gated in ((2, first), (3, second)):
        x, task = clouds(60, 1, 1).to(dtype), batch_of(clouds(60, middle, middle).to(dtype))
        kept = calibrate(
            layer,
            [x] if kept is None else None,
            [task],
            loss=cross_entropy,
            keep=kept,
            gated=gated,
            progress=False,
        )
        with torch.no_grad():
            layer.U.normal_(generator=torch.Generator().manual_seed(middle))
    return layer


def formula(layer, x, past_gates):
    """x W^T + b and each task's C core R x times its gate, all in float64."""
    C, R = layer.C_past.double(), layer.R_past.double()
    y = x @ layer.weight.double().T + layer.bias.double()
    for i, gate in enumerate(past_gates):
        block = slice(3 * i, 3 * i + 3)
        t = x @ R[block].T
        s = torch.sigmoid(t @ gate[:, 0].double() + gate[:, 1].double().sum())[..., None]
        y = y + (s * t) @ C[:, block].T
    t, s = x @ layer.R.double().T, 1.0
    if layer.gate is not None:
        s = gate_of(layer, x)[..., None]
    return y + layer.alpha * (s * t) @ layer.core().double().T @ layer.C.double().T


OPEN = torch.tensor(ALWAYS_OPEN).expand(3, 2)


@pytest.mark.parametrize("first, second", [(True, True), (False, True), (True, False)])
def test_the_layer_is_the_formula(first, second):
    layer, x = two_tasks_learned(first=first, second=second, alpha=0.5), clouds(9, 2, 9)
    gates = [OPEN] if layer.gate_past is None else [layer.gate_past]
    assert (layer.gate is not None) == second and (layer.gate_past is not None) == first
    torch.testing.assert_close(layer(x), formula(layer, x, gates), rtol=1e-9, atol=1e-9)
    x = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, _: layer(x), (x, layer.U))


def test_every_backend(impl):
    """Their epilogue is given t times the gate."""
    layer = two_tasks_learned(torch.float32).to(DEVICE)
    layer.impl = impl
    x = clouds(9, 2, 9).float().to(DEVICE).requires_grad_()
    expected = formula(layer, x.double(), [layer.gate_past])
    y = layer(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    (y * y.detach()).sum().backward()
    again = x.detach().double().requires_grad_()
    exact = formula(layer, again, [layer.gate_past])
    (exact * exact.detach()).sum().backward()
    torch.testing.assert_close(x.grad.double(), again.grad, rtol=1e-3, atol=1e-3)


def test_cutting_the_texts_otherwise_changes_nothing():
    x, task = clouds(60, 1, 1), batch_of(clouds(40, 2, 2))
    whole, cut = one_layer(), one_layer()
    settings = dict(loss=cross_entropy, gated=True, progress=False)
    torch.manual_seed(0)
    halves = [{k: v[i : i + 20] for k, v in task.items()} for i in (0, 20)]
    # Each call draws the same labels of the same rows: one general batch.
    calibrate(whole, [x], [task], **settings)
    calibrate(cut, [x], halves, **settings)
    probe = clouds(20, 2, 7)
    torch.testing.assert_close(gate_of(whole, probe), gate_of(cut, probe), rtol=1e-3, atol=1e-4)


def test_the_model_is_what_it_was_and_trains():
    model = peft(llama(), **NATURAL)
    expected = logits(model, tokens())
    calibrate(model, GENERAL, TASK, gated=True, progress=False)
    assert torch.equal(logits(model, tokens()), expected)
    check_trains(model, TASK[0], steps=30, rate=0.02)


def two_tasks(model):
    first = calibrate(model, GENERAL, TASK, gated=True, progress=False)
    move(model)
    expected = logits(model, tokens())
    calibrate(model, TASK, NEXT, keep=first, gated=True, progress=False)
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=1e-4, atol=1e-5)
    return move(model, seed=3)


def test_tasks_in_turn(tmp_path):
    """The next basis leaves the outputs, and files have every task's gate."""
    model = two_tasks(peft(llama(), **NATURAL))
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path)
    for read in loaded(tmp_path):
        assert torch.equal(logits(read, tokens()), expected)
    mixed = model(tokens(), adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], logits(llama(), tokens())[1], rtol=1e-4, atol=1e-4)


def test_gates_stay_wide_over_a_narrow_base(tmp_path):
    two_tasks(peft(llama(), **NATURAL)).save_pretrained(tmp_path)
    narrow = llama(dtype=torch.bfloat16)
    narrow.load_adapter(tmp_path)
    wrapped = PeftModel.from_pretrained(
        llama(dtype=torch.bfloat16), tmp_path, autocast_adapter_dtype=False
    )
    for model in (narrow, wrapped):
        for layer in layers(model).values():
            adapter = layer.secura_adapter["default"]
            assert adapter.gate.dtype == adapter.gate_past.dtype == torch.float32


def test_own_layers_are_saved_and_loaded(tmp_path):
    layer, x = two_tasks_learned(torch.float32), clouds(9, 2, 9).float()
    model = nn.Sequential(layer)
    save_adapter(model, tmp_path / "adapter.safetensors")
    plain = nn.Linear(10, 7)
    plain.load_state_dict(dict(weight=layer.weight, bias=layer.bias))
    again = nn.Sequential(plain)
    load_adapter(again, tmp_path / "adapter.safetensors")
    assert torch.equal(again(x), model(x))
    other = one_layer(torch.float32)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert other.to(torch.bfloat16).gate.dtype == torch.float32


def test_a_restart_leaves_no_gate():
    model = two_tasks(peft(llama(), **NATURAL))
    calibrate(model, GENERAL, TASK, restart=True, progress=False)
    assert torch.equal(logits(model, tokens()), logits(llama(), tokens()))
    for layer in layers(model).values():
        adapter = layer.secura_adapter["default"]
        assert adapter.gate is None and adapter.gate_past is None
    move(model).merge_and_unload()


@pytest.mark.parametrize("how", ["checkpointing", "autocast", "bfloat16", "float16"])
def test_ways_to_run(how):
    """Outputs and gradients of a trained adapter are those without, but for rounding."""
    model = two_tasks(peft(llama(), **NATURAL))
    reference = copy.deepcopy(model)
    dtype = torch.float16 if how == "float16" else torch.bfloat16
    if how == "checkpointing":
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    elif how != "autocast":
        model = model.to(dtype)
    outcomes = []
    for each in (reference, model):
        with torch.autocast("cpu", dtype, enabled=how == "autocast" and each is model):
            loss = each.train()(**TASK[0]).loss
        loss.backward()
        cores = [layer.secura_adapter["default"].U for layer in layers(each).values()]
        outcomes.append((loss.float(), torch.cat([U.grad.flatten().float() for U in cores])))
    (a, before), (b, after) = outcomes
    low = how != "checkpointing"
    torch.testing.assert_close(a, b, rtol=0.02 if low else 1e-5, atol=0)
    assert (before - after).norm() < (0.1 if low else 1e-5) * before.norm()


def test_own_layers_under_autocast():
    layer, x = two_tasks_learned(torch.float32), clouds(9, 2, 9).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert layer.U.grad.isfinite().all()


def test_it_is_compiled_and_exported():
    layer, x = two_tasks_learned(torch.float32), clouds(9, 2, 9).float()
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)


def test_over_a_quantised_base(tmp_path):
    torch.manual_seed(0)
    base, x = quantised("nf4", torch.randn(64, 96)), torch.randn(200, 96)
    model = peft(nn.Sequential(base), target_modules=["0"], **NATURAL)
    batch = dict(x=x + 1, labels=torch.randint(64, (200,)))
    calibrate(model, [x], [batch], loss=cross_entropy, gated=True, progress=False)
    with torch.no_grad():
        layers(model)["base_model.model.0"].secura_adapter["default"].U.normal_()
    expected = model(x)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(nn.Sequential(base), tmp_path)
    assert torch.equal(again(x), expected)


def test_projections_that_share_an_input():
    from secura_kernels import fuse_projections

    model = peft(llama(), target_modules=["q_proj", "k_proj", "v_proj"], **NATURAL)
    fuse_projections(model)
    two_tasks(model)
    apart = peft(llama(), target_modules=["q_proj", "k_proj", "v_proj"], **NATURAL)
    two_tasks(apart)
    gradients = []
    for each in (model, apart):
        each.enable_input_require_grads()
        each(**TASK[0]).loss.backward()
        gradients.append(
            [layer.secura_adapter["default"].U.grad for layer in layers(each).values()]
        )
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_what_no_matrix_describes_is_refused(tmp_path):
    model = two_tasks(peft(llama(), **NATURAL))
    layer = next(iter(layers(model).values()))
    before = logits(model, tokens())
    for attempt in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: layer.get_delta_weight("default"),
        lambda: save_as_lora(model, tmp_path / "lora"),
    ):
        with pytest.raises(ValueError, match="a gate that opens for tokens of the task"):
            attempt()
    assert not layer.supports_lora_conversion() and not (tmp_path / "lora").exists()
    assert torch.equal(logits(model, tokens()), before)
    own = two_tasks_learned()
    for attempt in (own.merge, own.to_linear):
        with pytest.raises(RuntimeError, match="a gate that opens for tokens of the task"):
            attempt()


@pytest.mark.parametrize(
    "settings, gated, message",
    [
        (NATURAL, "yes", "gated='yes' is not allowed: it must be one of True, False"),
        (dict(r=4, basis="whitened"), True, "gated=True is not allowed: it must be False: no"),
        (NATURAL | dict(norm="calibrated"), True, "gated=True .* has a norm, a gate of its own"),
    ],
)
def test_bad_input_changes_nothing(settings, gated, message):
    model = peft(llama(), **settings)
    before = copy.deepcopy(model.state_dict())
    task = TASK if settings["basis"] == "natural" else None
    with pytest.raises(ValueError, match=message):
        calibrate(model, GENERAL, task, gated=gated, progress=False)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("rows", [3, 8])
def test_a_file_whose_gates_are_not_its_tasks_is_refused(rows, tmp_path):
    two_tasks(peft(llama(), **NATURAL)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    found = load_file(path)
    name = next(name for name in found if name.endswith("gate_past"))
    save_file(found | {name: torch.zeros(rows, 2)}, path)
    with pytest.raises(ValueError, match="sizes of the past="):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_configuration_needs_no_setting_for_it(tmp_path):
    two_tasks(peft(llama(), **NATURAL)).save_pretrained(tmp_path)
    names = SecuraConfig.from_pretrained(tmp_path).optional_tensors
    assert {"gate", "gate_past*1"} <= set(names)
