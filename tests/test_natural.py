"""The natural basis: its metric and gradient, tasks in turn, files, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft_models import check_trains, layers, llama, loaded, logits, move, peft, tokens
from quantised import quantised
from torch import nn

from secura_kernels import CURLoRALinear, calibrate, load_adapter, save_adapter
from secura_kernels.peft import SecuraConfig, save_as_lora
from secura_kernels.train.calibration import measuring
from secura_kernels.train.calibration.metric import Moment, random_test_matrix
from secura_kernels.train.drift import drift

NATURAL = dict(r=4, basis="natural", variant="curlora")
GATE_FREE = NATURAL | dict(variant="secura")
GATED = GATE_FREE | dict(norm="calibrated")
GENERAL = [dict(input_ids=tokens(4, 12, seed)) for seed in range(3)]
TASK = [dict(input_ids=ids, labels=ids) for ids in (tokens(3, 10, seed) for seed in (5, 6))]
NEXT = [dict(input_ids=ids, labels=ids) for ids in (tokens(3, 10, seed) for seed in (7, 8))]


@pytest.fixture(autouse=True)
def likeliest(monkeypatch):
    """Labels that do not depend on how the text is cut into batches."""
    monkeypatch.setattr(
        measuring,
        "loss_of_drawn_labels",
        lambda logits, _: F.cross_entropy(logits, logits.argmax(1), reduction="sum"),
    )


def two_layers(dtype=torch.float64, r=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 7)).to(dtype).eval()
    for i in (0, 2):
        model[i] = CURLoRALinear.from_linear(model[i], r, basis="natural")
    return model


def inputs(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1, 10, dtype=torch.float64)
    return torch.randn(count, 10, generator=generator, dtype=torch.float64) * scales


def classified(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return dict(x=inputs(count, seed), labels=torch.randint(7, (count,), generator=generator))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def root(moment, damping=0.1):
    values, vectors = torch.linalg.eigh(
        moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    )
    return (vectors * values.rsqrt()) @ vectors.T


def watch(layer, seen, gradients, key):
    """Keeps the inputs of the last forward pass and the gradient of the outputs."""

    def hook(_, args, y):
        seen[key] = args[0].detach()
        y.register_hook(lambda g: gradients.update({key: g}))

    return layer.register_forward_hook(hook)


def direction(layer):
    """C R, in which the signs of singular vectors cancel, at norm 1."""
    change = layer.C.double() @ layer.R.double()
    return change / change.norm()


def test_the_basis_is_that_of_the_formula():
    """(Gamma + lambda I)^(-1/2) G (Sigma + lambda I)^(-1/2) = P S Q^T, C = (..)^(-1/2) P_r,
    R = Q_r^T (..)^(-1/2), with all three matrices from plain autograd."""
    model, x, task = two_layers(), inputs(90), [classified(20, 2), classified(20, 3)]
    base = nn.Sequential(
        *(
            nn.Linear(m.in_features, m.out_features, dtype=torch.float64)
            if isinstance(m, CURLoRALinear)
            else m
            for m in copy.deepcopy(model)
        )
    )
    seen, gradients = {}, {}
    for i in (0, 2):
        base[i].weight, base[i].bias = (
            nn.Parameter(p.detach().clone()) for p in (model[i].weight, model[i].bias)
        )
        watch(base[i], seen, gradients, i)
    found = calibrate(model, [x[:50], x[50:]], task, loss=cross_entropy, progress=False)
    y = base(x)
    F.cross_entropy(y, y.argmax(1), reduction="sum").backward()
    moments = {i: (seen[i].T @ seen[i] / 90, gradients[i].T @ gradients[i] / 90) for i in (0, 2)}
    base.zero_grad()
    sum(cross_entropy(base, batch) for batch in task).backward()
    sizes = []
    for i in (0, 2):
        A_x, A_g = map(root, moments[i])
        P, _, Qt = torch.linalg.svd(A_g @ base[i].weight.grad @ A_x)
        C, R = A_g @ P[:, :3], Qt[:3] @ A_x
        expected = C @ R
        torch.testing.assert_close(
            direction(model[i]), expected / expected.norm(), rtol=1e-4, atol=1e-5
        )
        sizes.append(3 / (C.norm() * R.norm()))
    # The unit that the cores are measured in, the same for both: V unit is in nats^(1/2).
    torch.testing.assert_close(found.unit, float(sizes[0] * sizes[1]) ** 0.5, rtol=1e-4, atol=0)


@pytest.mark.parametrize("rank", [0, 3, 12, 40])
def test_a_moment_is_its_diagonal_and_a_low_rank_part(rank):
    """Exact where the rank suffices; the diagonal is exact at every rank."""
    torch.manual_seed(0)
    tall = torch.randn(40, 12, dtype=torch.float64)  # a second moment of rank 12
    z = torch.randn(500, 12, dtype=torch.float64) @ tall.T
    moment = Moment(random_test_matrix(40, rank, torch.device("cpu"), 0))
    for part in z.split(200):
        moment.add(part)
    exact = z.T @ z / len(z)
    A = moment.inverse_root(0.1)
    unit = torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close(A.transposed(unit), (A @ unit).T)
    held = torch.linalg.inv((A @ unit) @ A.transposed(unit)) - 0.1 * exact.diagonal().mean() * unit
    torch.testing.assert_close(held.diagonal(), exact.diagonal(), rtol=1e-3, atol=0)
    off = float((held - exact).norm() / exact.norm())
    allowed = {0: (0.5, 1), 3: (0.2, 0.9), 12: (0, 1e-3), 40: (0, 1e-5)}[rank]
    assert allowed[0] <= off <= allowed[1]


def test_cutting_the_texts_otherwise_changes_nothing():
    x, task = inputs(60), classified(40, 2)
    whole, cut = two_layers(), two_layers()
    calibrate(whole, [x], [task], loss=cross_entropy, progress=False)
    halves = [{k: v[i : i + 20] for k, v in task.items()} for i in (0, 20)]
    calibrate(cut, iter(x.split([1, 40, 19])), iter(halves), loss=cross_entropy, progress=False)
    for i in (0, 2):
        torch.testing.assert_close(direction(whole[i]), direction(cut[i]), rtol=1e-3, atol=1e-5)


def test_what_an_earlier_call_measured_is_joined():
    """Sums are as good as the text that they come from, and ``weight`` counts the new ones."""
    x, task = inputs(60), classified(40, 2)
    together, apart, alone = two_layers(), two_layers(), two_layers()
    calibrate(together, [x], [task], loss=cross_entropy, progress=False)
    first = calibrate(apart, [x[:40]], [task], loss=cross_entropy, progress=False)
    calibrate(apart, [x[40:]], [task], loss=cross_entropy, keep=first, weight=0.5, progress=False)
    for i in (0, 2):
        torch.testing.assert_close(
            direction(together[i]), direction(apart[i]), rtol=1e-3, atol=1e-5
        )
    calibrate(alone, None, [task], loss=cross_entropy, keep=first, progress=False)
    calibrate(apart, [x[:40]], [task], loss=cross_entropy, progress=False)
    torch.testing.assert_close(direction(alone[0]), direction(apart[0]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", [NATURAL, GATE_FREE, GATED], ids=str)
def test_the_model_is_what_it_was_and_trains(settings):
    model = peft(llama(), **settings).train()
    with pytest.raises(RuntimeError, match=r"calibrate\(model, task=batches\)"):
        model(tokens())
    expected = logits(model.eval(), tokens())
    found = calibrate(model, GENERAL, TASK, progress=False)
    assert set(found.tokens.values()) == {3 * 4 * 12} and not found.left_out
    assert torch.equal(logits(model, tokens()), expected)
    check_trains(model, TASK[0], steps=20, rate=0.01)


def two_tasks(model):
    """A model that has learned two tasks; its outputs after the first are those before the next
    basis is trained."""
    first = calibrate(model, GENERAL, TASK, progress=False)
    move(model)
    expected = logits(model, tokens())
    calibrate(model, TASK, NEXT, keep=first, progress=False)
    assert not any(
        a.core_parameter().any() for a in model.modules() if hasattr(a, "core_parameter")
    )
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=1e-4, atol=1e-5)
    return move(model, seed=3)


@pytest.mark.parametrize("settings", [NATURAL, GATE_FREE | dict(adapter_bias=False)], ids=str)
def test_tasks_in_turn(settings, tmp_path):
    """The next basis leaves the outputs; files, merging, LoRA and drift know what came before."""
    model = two_tasks(peft(llama(), **settings))
    expected = logits(model, tokens())
    assert not torch.allclose(expected, logits(llama(), tokens()), atol=1e-2)
    for layer in layers(model).values():
        C, core, R = layer.change_factors()
        assert core.shape == (8, 8)
        change = layer.get_delta_weight("default")
        torch.testing.assert_close(C @ core @ R, change, rtol=1e-4, atol=1e-5)
    assert all(found.relative > 0.01 for found in drift(model).values())
    model.save_pretrained(tmp_path / "own")
    for read in loaded(tmp_path / "own"):
        assert torch.equal(logits(read, tokens()), expected)
    read.train()(tokens())
    save_as_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(lora, tokens()), expected, rtol=1e-4, atol=1e-4)
    mixed = model(tokens(), adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], logits(llama(), tokens())[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        logits(model.merge_and_unload(), tokens()), expected, rtol=1e-4, atol=1e-4
    )


def test_own_layers_take_tasks_in_turn(tmp_path):
    base, x = two_layers(torch.float32), inputs(40).float()
    tasks = [
        {k: v.float() if k == "x" else v for k, v in classified(40, seed).items()}
        for seed in (2, 3)
    ]
    model = copy.deepcopy(base)
    for task in tasks:
        before = model(x)
        calibrate(model, [x], [task], loss=cross_entropy, progress=False)
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for i in (0, 2):
                model[i].U.normal_()
    expected = model(x)
    save_adapter(model, tmp_path / "adapter.safetensors")
    plain = nn.Sequential(
        *(
            m if not isinstance(m, CURLoRALinear) else nn.Linear(m.in_features, m.out_features)
            for m in copy.deepcopy(base)
        )
    )
    for i in (0, 2):
        plain[i].load_state_dict(dict(weight=base[i].weight, bias=base[i].bias))
    load_adapter(plain, tmp_path / "adapter.safetensors")
    assert torch.equal(plain.eval()(x), expected)
    merged = copy.deepcopy(model)
    for i in (0, 2):
        merged[i].merge()
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
    model[0].stage_m1()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert model[0].C_past is not None  # beside the core, as before


def test_a_restart_that_fails_forgets_nothing():
    model = two_tasks(peft(llama(), **NATURAL))
    expected = logits(model, tokens())
    with pytest.raises(ValueError, match="finite number"):
        calibrate(
            model, GENERAL, TASK, loss=lambda m, b: m(**b).loss / 0, restart=True, progress=False
        )
    assert torch.equal(logits(model, tokens()), expected)


def test_restart_forgets_what_was_learned():
    model, fresh = peft(llama(), **NATURAL), peft(llama(), **NATURAL)
    two_tasks(model)
    for each, restart in ((model, True), (fresh, False)):
        calibrate(each, GENERAL, TASK, restart=restart, progress=False)
    assert torch.equal(logits(model, tokens()), logits(llama(), tokens()))
    for a, b in zip(layers(model).values(), layers(fresh).values(), strict=True):
        torch.testing.assert_close(a.secura_adapter["default"].C, b.secura_adapter["default"].C)


@pytest.mark.parametrize("how", ["checkpointing", "autocast", "bfloat16"])
def test_ways_to_run(how):
    expected, model = peft(llama(), **NATURAL), peft(llama(), **NATURAL)
    calibrate(expected, GENERAL, TASK, progress=False)
    if how == "checkpointing":
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        calibrate(model.train(), GENERAL, TASK, progress=False)
    elif how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            calibrate(model, GENERAL, TASK, progress=False)
    else:
        model = peft(llama(dtype=torch.bfloat16), **NATURAL)
        calibrate(model, GENERAL, TASK, progress=False)
    for a, b in zip(layers(expected).values(), layers(model).values(), strict=True):
        a, b = (direction(layer.secura_adapter["default"]) for layer in (a, b))
        assert (a - b).norm() < (1e-4 if how == "checkpointing" else 0.5)


@pytest.mark.parametrize("kind", ["nf4", "torchao int4"])
def test_over_a_quantised_base(kind, tmp_path):
    torch.manual_seed(0)
    base, x = quantised(kind, torch.randn(64, 96)), torch.randn(200, 96)
    model = peft(nn.Sequential(base), target_modules=["0"], **NATURAL)
    batch = dict(x=x, labels=torch.randint(64, (200,)))
    calibrate(model, [x], [batch], loss=cross_entropy, progress=False)
    with torch.no_grad():
        layers(model)["base_model.model.0"].secura_adapter["default"].U.normal_()
    expected = model(x)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(nn.Sequential(base), tmp_path)
    assert torch.equal(again(x), expected)


class Experts(nn.Module):
    """Of which a batch reaches one alone."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(10, 7) for _ in range(2))

    def forward(self, x, both=False):
        return self.experts[0](x) + (self.experts[1](x) if both else 0)


def test_a_layer_that_the_task_never_reaches():
    model = peft(Experts(), target_modules=["0", "1"], **NATURAL)
    general = [dict(x=torch.randn(20, 10), both=True)]
    task = [dict(x=torch.randn(20, 10), labels=torch.randint(7, (20,)))]
    with pytest.raises(ValueError, match=r"do not reach layer .*experts.1'.*too_few='orthonormal'"):
        calibrate(model, general, task, loss=cross_entropy, progress=False)
    found = calibrate(
        model, general, task, loss=cross_entropy, too_few="orthonormal", progress=False
    )
    assert found.left_out == ("base_model.model.experts.1",)
    adapter = layers(model)[found.left_out[0]].secura_adapter["default"]
    torch.testing.assert_close(adapter.C.T @ adapter.C, torch.eye(4), rtol=0, atol=1e-5)
    model.train()(torch.randn(2, 10), both=True)  # it is calibrated too


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(task=None), "task=None is not allowed: it must be some batches of the task"),
        (dict(task=[]), r"task=\[\] is not allowed"),
        (
            dict(task=GENERAL),
            r"task=\['input_ids'\] is not allowed: it must be batches with labels",
        ),
        (
            dict(task=TASK, loss=lambda model, batch: model(**batch).loss * torch.nan),
            "batches whose loss is one finite number",
        ),
        (
            dict(task=[dict(input_ids=tokens(), labels=torch.full_like(tokens(), -100))]),
            "batches whose loss is one finite number",
        ),
        (
            dict(task=TASK, loss=lambda model, batch: (model(**batch).loss * 0).abs().sqrt()),
            "gradients on the task's batches are not finite",
        ),
        (dict(general=[]), "at least one batch"),
        (dict(rank=-1), "rank=-1 is not allowed"),
        (dict(weight=-1.0), "weight=-1.0 is not allowed"),
        (dict(keep="before"), "keep='str' is not allowed"),
        (dict(selection="quiet"), "selection='quiet' is not allowed: it must be None with"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_input_changes_nothing(change, message):
    model = peft(llama(), **NATURAL)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        calibrate(model, progress=False, **dict(general=GENERAL, task=TASK) | change)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert not any(m._forward_hooks for m in model.modules())


def test_statistics_of_another_model_are_refused():
    first = calibrate(
        two_layers(), [inputs(40)], [classified(40, 2)], loss=cross_entropy, progress=False
    )
    with pytest.raises(ValueError, match="with the same basis and ranks"):
        calibrate(peft(llama(), **NATURAL), None, TASK, keep=first, progress=False)
    model = two_layers()
    with pytest.raises(ValueError, match="with the same basis and ranks"):
        calibrate(
            model,
            [inputs(40)],
            [classified(40, 2)],
            loss=cross_entropy,
            keep=first,
            rank=2,
            progress=False,
        )


def test_a_gate_takes_one_task():
    model = peft(llama(), **GATED)
    calibrate(model, GENERAL, TASK, progress=False)
    move(model)
    with pytest.raises(RuntimeError, match="trained with a gate"):
        calibrate(model, GENERAL, NEXT, progress=False)


@pytest.mark.parametrize("argument", ["task", "loss"])
def test_a_whitened_basis_has_no_task(argument):
    model = peft(llama(), **GATED | dict(basis="whitened"))
    value = TASK if argument == "task" else cross_entropy
    with pytest.raises(ValueError, match=f"{argument}=.*no layer has basis='natural'"):
        calibrate(model, GENERAL, progress=False, **{argument: value})


def test_quiet_rows_and_columns_answer_general_text_least():
    model = peft(llama(), r=4, basis="whitened", variant="curlora")
    seen, gradients = {}, {}
    energies = {name: [0, 0] for name in layers(model)}
    hooks = [watch(layer, seen, gradients, name) for name, layer in layers(model).items()]
    for batch in GENERAL:
        out = model(**batch).logits.flatten(0, 1)
        F.cross_entropy(out, out.argmax(1), reduction="sum").backward()
        for name, layer in layers(model).items():
            energies[name][0] += F.linear(seen[name], layer.weight).square().sum((0, 1))
            energies[name][1] += (gradients[name] @ layer.weight).square().sum((0, 1))
    for hook in hooks:
        hook.remove()
    found = calibrate(model, GENERAL, selection="quiet", progress=False)
    for name, layer in layers(model).items():
        rows, cols = (part.detach() for part in energies[name])
        adapter = layer.secura_adapter["default"]
        assert sorted(adapter.rows.tolist()) == sorted(rows.argsort()[:4].tolist())
        assert sorted(adapter.cols.tolist()) == sorted(cols.argsort()[:4].tolist())
    move(model)
    model.train()(tokens()).logits.sum().backward()
    with pytest.raises(ValueError, match=r"keep=.* is not allowed: it must be None with"):
        calibrate(model, GENERAL, selection="quiet", keep=found, restart=True, progress=False)


def test_a_configuration_takes_the_name():
    assert SecuraConfig(basis="natural").basis == "natural"
    with pytest.raises(ValueError, match="'raw', 'orthonormal', 'whitened', 'natural'"):
        SecuraConfig(basis="gradient")
