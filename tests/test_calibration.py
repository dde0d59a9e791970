"""The whitened basis and ``calibrate``: the metric, files, and what is refused."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from peft_models import layers, llama, loaded, logits, move, peft, tokens
from quantised import dequantised, quantised
from torch import nn

from secura_kernels import (
    CURLoRALinear,
    SECURALinear,
    calibrate,
    cur_linear,
    load_adapter,
    save_adapter,
)
from secura_kernels.bases import inverse_root
from secura_kernels.peft import SecuraConfig, save_as_lora
from secura_kernels.train.calibration import measuring
from secura_kernels.train.calibration.layers import calibrated_layers
from secura_kernels.train.own_text import own_text

WHITENED = dict(r=4, basis="whitened")
GATE_FREE = WHITENED | dict(variant="secura")
GATED = GATE_FREE | dict(norm="calibrated")
VARIANTS = [
    WHITENED | dict(variant="curlora"),
    GATED,
    GATE_FREE,
    GATED | dict(norm_domain="weight"),
]
GENERAL = [dict(input_ids=tokens(4, 12, seed)) for seed in range(3)]


class Softmax(nn.Module):
    """One layer whose outputs are logits, in float64."""

    def __init__(self, N=5, K=6, r=3, scale=1.0, **settings):
        super().__init__()
        torch.manual_seed(0)
        linear = nn.Linear(K, N, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.mul_(scale)
        self.layer = CURLoRALinear.from_linear(linear, r, basis="whitened", **settings)

    def forward(self, x):
        return self.layer(x)


def two_layers(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 7)).to(dtype)
    for i in (0, 2):
        model[i] = SECURALinear.from_linear(model[i], 4, basis="whitened", **settings)
    return model.eval()


def likeliest(monkeypatch):
    """Labels that do not depend on how the text is cut into batches."""
    monkeypatch.setattr(torch, "multinomial", lambda p, n, **_: p.topk(n).indices)


def folds(model):
    return {
        f"{name}.{key}": getattr(adapter, key)
        for name, (_, adapter) in calibrated_layers(model, None)
        for key in ("fold_c", "fold_r", "unit")
    }


def assert_same_folds(a, b, rtol=1e-9):
    a, b = folds(a), folds(b)
    assert a and a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=1e-9)


def test_the_norm_of_the_core_is_the_second_order_kl(monkeypatch):
    """Of a linear softmax model whose predictions depend on x so little that the Kronecker-factored
    metric is the Fisher metric; every label is drawn as often as it is likely."""
    model, x = Softmax(scale=1e-7), torch.randn(400, 6, dtype=torch.float64)
    N, drawn = 5, iter(range(5))

    def every_label(logits, generator):
        label, p = next(drawn), logits.detach().softmax(-1)
        target = torch.full((len(logits),), label)
        losses = F.cross_entropy(logits, target, reduction="none")
        return ((N * p[:, label]).sqrt() * losses).sum()

    monkeypatch.setattr(measuring, "loss_of_drawn_labels", every_label)
    found = calibrate(model, [x] * N, damping=1e-13, progress=False)
    with torch.no_grad():
        model.layer.U.normal_()
        p, moved = model.layer.bias.softmax(0), x @ model.layer.delta_weight().T
    fisher = torch.diag(p) - p[:, None] * p
    kl = ((moved @ fisher) * moved).sum(1).mean() / 2
    predicted = model.layer.U.square().sum() * found.unit**2 / 2
    torch.testing.assert_close(predicted, kl, rtol=1e-6, atol=0)


def test_the_folded_layer_equals_the_formula(monkeypatch):
    """R' = (R Sigma R^T + lambda I)^(-1/2) R, C' = C (C^T Gamma C + lambda I)^(-1/2), with Sigma
    and Gamma from a plain autograd run."""
    likeliest(monkeypatch)
    model, x, damping = two_layers(), torch.randn(90, 10, dtype=torch.float64), 0.03
    found = calibrate(model, [x[:50], x[50:]], damping=damping, progress=False)
    move_cores(model)
    base = nn.Sequential(
        *(
            nn.Linear(m.in_features, m.out_features, dtype=torch.float64)
            if isinstance(m, SECURALinear)
            else m
            for m in model
        )
    )
    inputs, gradients = {}, {}
    for i in (0, 2):
        base[i].weight, base[i].bias = (
            nn.Parameter(p.detach().clone()) for p in (model[i].weight, model[i].bias)
        )
        base[i].register_forward_hook(lambda m, args, y, i=i: inputs.update({i: args[0].detach()}))
        base[i].register_full_backward_hook(lambda m, gx, gy, i=i: gradients.update({i: gy[0]}))
    y = base(x)
    F.cross_entropy(y.float(), y.argmax(1), reduction="sum").backward()
    for i in (0, 2):
        layer = model[i]
        Sigma = inputs[i].T @ inputs[i] / 90
        Gamma = gradients[i].T @ gradients[i] / 90
        C, R = layer.weight[:, layer.cols], layer.weight[layer.rows]
        A = inverse_root(C.T @ Gamma @ C, damping)
        B = inverse_root(R @ Sigma @ R.T, damping)
        expected = found.unit * C @ A @ (layer.A.T @ layer.B.T) @ B @ R
        torch.testing.assert_close(layer.delta_weight(), expected, rtol=1e-6, atol=1e-9)


@torch.no_grad()
def move_cores(model, std=0.3):
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if hasattr(module, "core_parameter"):
            core = module.core_parameter()
            core.add_(std * torch.randn(core.shape, generator=generator, dtype=torch.float64))


def test_cutting_the_text_otherwise_changes_nothing(monkeypatch):
    likeliest(monkeypatch)
    x = torch.randn(60, 10, dtype=torch.float64)
    whole, cut = two_layers(), two_layers()
    calibrate(whole, [x], progress=False)
    calibrate(cut, iter(x.split([1, 40, 19])), progress=False)
    assert_same_folds(whole, cut)


def test_a_seed_repeats():
    first, second, other = (peft(llama(), **VARIANTS[0]) for _ in range(3))
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        calibrate(model, tokens=256, seed=seed, progress=False)
    assert all(torch.equal(v, folds(second)[k]) for k, v in folds(first).items())
    assert not any(torch.equal(v, folds(other)[k]) for k, v in folds(first).items())


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_the_model_is_what_it_was_but_for_its_folds(settings):
    model = peft(llama(), **settings).train()
    modes = [m.training for m in model.modules()]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(RuntimeError, match=r"call secura_kernels.calibrate\(model\)"):
        model(tokens())
    model.eval()
    expected = logits(model, tokens())
    model.train()
    found = calibrate(model, GENERAL, progress=False)
    assert set(found.tokens.values()) == {3 * 4 * 12} and not found.left_out
    assert [m.training for m in model.modules()] == modes
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in layers(model).values())
    assert torch.equal(logits(model.eval(), tokens()), expected)
    model.train()(tokens(), labels=tokens()).loss.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for n, p in model.named_parameters()
        if n in trained
    )


def test_a_core_changes_the_weight_as_much_as_one_between_orthonormal_bases():
    """So that the same learning rates serve."""
    sizes = {}
    for basis in ("whitened", "orthonormal"):
        model = peft(llama(), r=8, basis=basis, variant="curlora")
        if basis == "whitened":
            calibrate(model, GENERAL, progress=False)
        move(model, std=1.0)
        sizes[basis] = [float(m.get_delta_weight("default").norm()) for m in layers(model).values()]
    ratios = [math.log(a / b) for a, b in zip(*sizes.values(), strict=True)]
    assert abs(sum(ratios) / len(ratios)) < math.log(1.5)


@pytest.mark.parametrize("how", ["checkpointing", "bfloat16", "autocast", "padding", "tensor"])
def test_ways_to_run(how, monkeypatch):
    likeliest(monkeypatch)
    expected, model = (peft(llama(), **VARIANTS[0]) for _ in range(2))
    batches, rtol = GENERAL, 1e-4
    calibrate(expected, GENERAL, progress=False)
    if how == "checkpointing":
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        calibrate(model.train(), batches, progress=False)
    elif how == "bfloat16":
        model, rtol = peft(llama(dtype=torch.bfloat16), **VARIANTS[0]), None
        calibrate(model, batches, progress=False)
    elif how == "autocast":
        rtol = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            calibrate(model, batches, progress=False)
    elif how == "padding":
        for batch in batches:
            ids = F.pad(batch["input_ids"], (0, 5), value=7)
            mask = F.pad(torch.ones_like(batch["input_ids"]), (0, 5))
            batches = [*batches[1:], dict(input_ids=ids, attention_mask=mask, labels=ids)]
        found = calibrate(model, batches, progress=False)
        assert set(found.tokens.values()) == {3 * 4 * 12}
    else:
        calibrate(model, [batch["input_ids"] for batch in batches], progress=False)
    if rtol is not None:
        assert_same_folds(model, expected, rtol)
        return
    for name, value in folds(model).items():
        difference = (value - folds(expected)[name]).norm() / value.norm()
        assert value.dtype == torch.float32 and difference < 0.3, (name, difference)


def test_a_tensor_of_the_task_comes_to_the_loss_as_one():
    layer = CURLoRALinear.from_linear(nn.Linear(12, 10), 4, basis="natural")
    data = torch.randn(4, 40, 12)

    def loss(model, batch):
        assert any(batch is given or torch.equal(batch, given) for given in data)
        return model(batch).square().mean()

    calibrate(nn.Sequential(layer), list(data), list(data), loss=loss, progress=False)
    assert layer.C.shape == (10, 4) and layer.C.isfinite().all()


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int4"])
def test_over_a_quantised_base(kind, monkeypatch):
    """As over the same layer in full precision, with the weight that it dequantises to."""
    likeliest(monkeypatch)
    torch.manual_seed(0)
    base, x = quantised(kind, torch.randn(64, 96)), torch.randn(200, 96)
    plain = nn.Linear(96, 64, bias=False)
    with torch.no_grad():
        plain.weight.copy_(dequantised(base))
    models = [
        peft(nn.Sequential(layer), target_modules=["0"], **VARIANTS[0]) for layer in (base, plain)
    ]
    for model in models:
        calibrate(model, [x], progress=False)
    first, second = map(folds, models)
    for name, value in first.items():  # a quantised product is rounded otherwise
        assert (value - second[name]).norm() < 0.02 * value.norm(), name


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("stage", [None, "stage_m1", "stage_m2"])
def test_files_bring_the_basis_back_to_the_bit(settings, stage, tmp_path):
    if stage == "stage_m1" and "norm_domain" in settings:
        return  # refused
    model = peft(llama(), **settings)
    calibrate(model, GENERAL, progress=False)
    move(model)
    if stage:
        for layer in layers(model).values():
            getattr(layer, stage)()
        move(model, seed=3)
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path)
    for read in loaded(tmp_path):
        assert torch.equal(logits(read, tokens()), expected)
        assert all(
            torch.equal(
                v,
                folds(read)[
                    k.replace("base_model.model.", "") if not isinstance(read, PeftModel) else k
                ],
            )
            for k, v in folds(model).items()
        )
    read.train()(tokens())  # calibrated
    unfilled = get_peft_model(llama(), SecuraConfig.from_pretrained(tmp_path)).train()
    with pytest.raises(RuntimeError, match="calibrate"):
        unfilled(tokens())


@pytest.mark.parametrize("kind, norm", [(CURLoRALinear, None), (SECURALinear, "calibrated")])
def test_own_files(kind, norm, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 7)).eval()
    model = copy.deepcopy(base)
    model[0] = kind.from_linear(model[0], 4, basis="whitened", norm=norm)
    save_adapter(model, tmp_path / "before.safetensors")  # without folds
    x = torch.randn(40, 10)
    calibrate(model, [x], progress=False)
    move_cores(model)
    save_adapter(model, tmp_path / "after.safetensors")
    for fresh in (copy.deepcopy(base), copy.deepcopy(model)):
        load_adapter(fresh, tmp_path / "after.safetensors")
        assert torch.equal(fresh.eval()(x), model(x))
        assert_same_folds(fresh, model, 0)
    low = copy.deepcopy(model).bfloat16()
    assert low[0].fold_c.dtype == torch.float32 and torch.equal(low[0].fold_c, model[0].fold_c)
    load_adapter(low, tmp_path / "before.safetensors")
    assert not low[0].calibrated


def test_merging_and_lora(tmp_path):
    model = peft(llama(), **VARIANTS[0])
    calibrate(model, GENERAL, progress=False)
    expected = logits(move(model), tokens())
    save_as_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(lora, tokens()), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        logits(model.merge_and_unload(), tokens()), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("settings", VARIANTS[:3], ids=str)
@pytest.mark.parametrize("stage", ["stage_m1", "stage_m2"])
def test_a_second_call_between_tasks_leaves_the_outputs(settings, stage):
    model = peft(llama(), **settings)
    calibrate(model, GENERAL, progress=False)
    move(model)
    with pytest.raises(RuntimeError, match="has been trained: calibrate before"):
        calibrate(model, GENERAL, progress=False)
    for layer in layers(model).values():
        getattr(layer, stage)()
    expected, before = logits(model, tokens()), folds(model)
    calibrate(model, [dict(input_ids=tokens(4, 12, 9))], progress=False)
    assert not any(torch.equal(v, before[k]) for k, v in folds(model).items())
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", VARIANTS[:3], ids=str)
@pytest.mark.parametrize("general", [GENERAL, None], ids=["given", "own"])
def test_restart_begins_anew(settings, general):
    """As if nothing had been learned, the text that the model writes included."""
    model, fresh = (peft(llama(), **settings) for _ in range(2))
    calibrate(fresh, general, tokens=256, progress=False)
    calibrate(model, GENERAL[:1], progress=False)
    move(model)
    calibrate(model, general, tokens=256, restart=True, progress=False)
    assert torch.equal(logits(model, tokens()), logits(llama(), tokens()))
    assert_same_folds(model, fresh, 1e-5)


class Experts(nn.Module):
    """Of which general text reaches the first alone."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(10, 7) for _ in range(2))

    def forward(self, x):
        return self.experts[0](x)


def test_a_layer_that_general_text_never_reaches():
    model = peft(Experts(), target_modules=["0", "1"], **VARIANTS[0])
    batches = [torch.randn(20, 10)]
    with pytest.raises(ValueError, match=r"experts.1' saw 0 tokens.*too_few='orthonormal'"):
        calibrate(model, batches, progress=False)
    assert not any(a.calibrated for _, (_, a) in calibrated_layers(model, None))
    found = calibrate(model, batches, too_few="orthonormal", progress=False)
    assert found.left_out == ("base_model.model.experts.1",)
    left = layers(model)[found.left_out[0]]
    U = move(model) and left.secura_adapter["default"].U
    torch.testing.assert_close(left.get_delta_weight("default").norm(), U.norm())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(general=[]), "at least one batch"),
        (dict(general=[torch.full((20, 10), torch.nan)]), "are not finite"),
        (dict(general=[torch.randn(3, 10)]), "saw 3 tokens of general text, fewer than its rank 4"),
        (
            dict(general=["text"]),
            r"general\[0\]='str' is not allowed: it must be a dict or a tensor",
        ),
        (dict(general=None), "general=None is not allowed: .* a Sequential cannot generate"),
        (dict(damping=0), "damping=0 is not allowed"),
        (dict(too_few="skip"), "too_few='skip' is not allowed"),
        (dict(model=nn.Linear(3, 3)), "model='Linear' is not allowed: .* basis='whitened'"),
        (
            dict(model=two_layers(torch.float32).append(nn.Linear(7, 1))),
            "do not reach the predictions",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_input_changes_nothing(change, message):
    model = change.pop("model", None) or two_layers(torch.float32)
    before = copy.deepcopy(model.state_dict())
    arguments = dict(general=[torch.randn(20, 10, dtype=next(model.parameters()).dtype)]) | change
    with pytest.raises(ValueError, match=message):
        calibrate(model, progress=False, **arguments)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert not any(m._forward_hooks for m in model.modules())


def test_merged_layers_are_refused():
    model = two_layers(torch.float32)
    model[0].merge()
    with pytest.raises(RuntimeError, match="layer '0' is merged"):
        calibrate(model, [torch.randn(20, 10)], progress=False)


class Chat:
    """A tokenizer with a chat template; a text's first token is its length."""

    chat_template = "yes"

    def get_vocab(self):
        return {"<|endoftext|>": 9}

    def apply_chat_template(self, messages, tokenize):
        return f"<user>{messages[0]['content']}</user>"

    def __call__(self, text, add_special_tokens):
        return dict(input_ids=[len(text), 5])


def test_own_text():
    model = llama()
    rows = list(own_text(model, 100, length=9, batch_size=8, seed=1, progress=False))
    assert [tuple(b["input_ids"].shape) for b in rows] == [(8, 9), (4, 9)]
    assert all((b["input_ids"][:, 0] == 1).all() and b["attention_mask"].all() for b in rows)
    again = list(own_text(model, 100, length=9, batch_size=8, seed=1, progress=False))
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, again, strict=True)
    )
    # Of a chat model as many documents as chats; one row more of these where they are odd.
    (batch,) = own_text(model, 5 * 9, tokenizer=Chat(), length=9, progress=False)
    starts = [tuple(row) for row in batch["input_ids"][:, :2].tolist()]
    assert starts.count((len("<user>"), 5)) == 3
    assert [start[0] for start in starts].count(9) == 2
    (short,) = own_text(model, 2, tokenizer=Chat(), length=2, progress=False)
    assert short["input_ids"].tolist() == [[len("<user>"), 5]]


@pytest.mark.parametrize("dtype, allowed", [(torch.bfloat16, 3), (torch.float32, 3)])
def test_folding_costs_little_precision(dtype, allowed):
    """The change in low precision against float64, beside what stored whitened bases give."""
    torch.manual_seed(0)
    model = nn.Sequential(
        CURLoRALinear.from_linear(nn.Linear(96, 80, bias=False, dtype=dtype), 32, basis="whitened")
    ).eval()
    scales = torch.logspace(0, -2, 96)
    x = (torch.randn(600, 96) @ torch.linalg.qr(torch.randn(96, 96)).Q * scales).to(dtype)
    calibrate(model, [x], progress=False)
    layer = model[0]
    with torch.no_grad():
        layer.U.normal_()
        C, R = (s.double() for s in layer.C_and_R(layer.weight))
        A, B = layer.fold_c.double(), layer.fold_r.double()
        truth = x.double() @ (C @ A @ layer.U.double() @ B @ R).T
        stored = dict(C=(C @ A).to(dtype), R=(B @ R).to(dtype))
        zero = torch.zeros_like(layer.weight)
        errors = []
        for sides, core in (
            (dict(cols=None, rows=None, **stored), layer.U),
            (dict(cols=None, rows=None, C=C.to(dtype), R=R.to(dtype)), layer.core()),
        ):
            y = cur_linear(x, zero, core, **sides).double()
            errors.append(float((y - truth).norm() / truth.norm()))
    assert errors[1] <= allowed * errors[0], errors
