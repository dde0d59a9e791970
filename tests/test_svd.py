"""The svd basis (LoRA-XS): C and R of W's leading singular directions, their scale, files, and what
is refused."""

import copy

import pytest
import torch
from devices import DEVICE, MARKS
from layer_cases import (
    PRECISION_NORMS,
    between_singular_directions,
    case,
    check_derivatives,
    check_no_more_than_eager,
    small_change,
)
from peft_models import CURLORA, GATED, gpt2, layers, llama, logits, mlp, move, peft, tokens
from test_linear import make, train
from torch import nn

from secura_kernels import CURLoRALinear, SECURALinear, bases, load_adapter, save_adapter
from secura_kernels.bases import orthonormal_basis, svd_sides
from secura_kernels.nn import factors

pytest.importorskip("peft")
from peft import PeftModel, get_peft_model

from secura_kernels.peft import SecuraConfig, hotswap_adapter, save_as_lora

pytestmark = MARKS
SVD = CURLORA | dict(basis="svd")
SHAPES = [(20, 24), (24, 20), (16, 16)]


@pytest.fixture
def no_svd(monkeypatch):
    """From its call on an SVD is an error."""

    def forbid():
        def svd_sides(*_):
            raise AssertionError("an SVD was computed")

        monkeypatch.setattr(factors, "svd_sides", svd_sides)

    return forbid


# C and R


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_c_and_r_are_the_truncated_svd(shape, dtype):
    W, r = torch.randn(shape).to(dtype), 5
    C, R = svd_sides(W, r)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    mean = S[:r].square().mean().sqrt()
    torch.testing.assert_close(C @ R, (U[:, :r] * S[:r]) @ Vh[:r] / mean)
    torch.testing.assert_close(C.norm(dim=0), S[:r] / mean)
    torch.testing.assert_close(R @ R.T, torch.eye(r, dtype=torch.float64))
    for side in (C, R):
        torch.testing.assert_close(side.square().sum(), torch.tensor(r, dtype=torch.float64))
    again = svd_sides(W.clone(), r)
    assert torch.equal(C, again[0]) and torch.equal(R, again[1])
    assert (R.gather(1, R.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_randomised_svd_is_near_and_repeatable(shape, monkeypatch):
    """Of as many directions as W has it is the SVD; it leaves the global generator alone."""
    W, r = torch.randn(shape), 8
    C, R = svd_sides(W, r)
    monkeypatch.setattr(bases, "EXACT_SVD", 4)
    before = torch.get_rng_state()
    found, again = svd_sides(W, r), svd_sides(W, r)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    near = dict(rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[0].double(), C, **near)
    torch.testing.assert_close(found[1].double(), R, **near)


def test_a_weight_of_lower_rank_gives_columns_of_zeros():
    for W in (torch.randn(20, 2) @ torch.randn(2, 24), torch.randn(24, 2) @ torch.randn(2, 20)):
        C, R = svd_sides(W, 5)
        assert torch.isfinite(C).all() and torch.isfinite(R).all()
        torch.testing.assert_close(C @ R * W.norm() / 5**0.5, W.double())
        assert float(C[:, 2:].norm()) < 1e-5


def test_a_core_changes_w_as_much_as_between_orthonormal_bases():
    """So that one learning rate serves both: over random cores ||C V R||_F has the same mean
    square, ||C||^2 ||R||^2 / r^2 of ||V||^2."""
    W, r = torch.randn(40, 48) * 7.0, 8
    Q_c, _, Q_r, _ = orthonormal_basis(W[:, :r], W[:r])
    cores = torch.randn(4000, r, r, dtype=torch.float64)
    C, R = svd_sides(W, r)
    ours = (C @ cores @ R).square().sum((1, 2)).mean().sqrt()
    theirs = (Q_c @ cores @ Q_r.T).square().sum((1, 2)).mean().sqrt()
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.0)


def test_a_layer_is_lora_xs():
    """delta_W = alpha U_r Sigma_r core V_r^T / s in float64."""
    layer = train(make(CURLoRALinear, basis="svd", alpha=0.7))
    U, S, Vh = torch.linalg.svd(layer.weight)
    sign = torch.sign((layer.R * Vh[:4]).sum(1))
    scale = S[:4] / S[:4].square().mean().sqrt()
    expected = 0.7 * (U[:, :4] * sign * scale) @ layer.U @ (Vh[:4] * sign[:, None])
    torch.testing.assert_close(layer.delta_weight(), expected)


@pytest.mark.parametrize("name", ["no gate", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_backend_is_as_near_to_float64_as_eager(name, dtype, impl):
    cases = [
        between_singular_directions(
            small_change(*shape, dtype=dtype, tied=False, biases=True, device=DEVICE)
        )
        for shape in ((130, 136, 72, 9), (5, 96, 64, 8), (101, 67, 131, 7))
        for _ in range(4)  # pooled: single ones scatter
    ]
    check_no_more_than_eager(cases, PRECISION_NORMS[name], impl)


def test_derivatives():
    check_derivatives(between_singular_directions(case()), None)


# Layers


@pytest.mark.parametrize("kind", [CURLoRALinear, SECURALinear])
@pytest.mark.parametrize("stage", [None, "stage_m1", "stage_m2"])
def test_a_file_needs_no_svd(kind, stage, tmp_path, no_svd):
    base = nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 24)).double()
    model = copy.deepcopy(base)
    for i in range(2):
        model[i] = train(kind.from_linear(model[i], 4, basis="svd"))
        if stage:
            getattr(model[i], stage)()
            train(model[i])
    save_adapter(model, tmp_path / "a.safetensors")
    x = torch.randn(3, 24, dtype=torch.float64)
    no_svd()
    for fresh in (copy.deepcopy(base), copy.deepcopy(model)):
        load_adapter(fresh, tmp_path / "a.safetensors")
        assert torch.equal(fresh(x), model(x))
        for each in (fresh, model):
            train(each[0], x=x)
        assert torch.equal(fresh(x), model(x))
        load_adapter(model, tmp_path / "a.safetensors")


def test_a_state_without_c_and_r_is_refused():
    layer = make(CURLoRALinear, basis="svd")
    state = {k: v for k, v in layer.state_dict().items() if k not in ("C", "R")}
    for strict in (True, False):
        with pytest.raises(ValueError, match="the state has no C and R, which basis='svd' stores"):
            layer.load_state_dict(state, strict=strict)
    assert layer.C is not None


def test_only_the_number_of_columns_and_rows_counts():
    linear = nn.Linear(24, 20)
    one = CURLoRALinear(linear, torch.arange(4), torch.arange(4), basis="svd")
    other = CURLoRALinear(linear, torch.tensor([3, 3, 9, 1]), torch.arange(4), basis="svd")
    assert torch.equal(one.C, other.C) and torch.equal(one.R, other.R)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(selection="lowest"), "selection='lowest' is not allowed: .* None with basis='svd'"),
        (dict(replace=True), "replace=True is not allowed: .* None with basis='svd'"),
        (dict(r=21), r"r=21 is not allowed: it must be .* to 20"),
    ],
)
@pytest.mark.parametrize("kind", [CURLoRALinear, SECURALinear])
def test_what_means_nothing_is_refused(kind, settings, message):
    linear = nn.Linear(24, 20)
    with pytest.raises(ValueError, match=message):
        kind.from_linear(linear, **(dict(r=4) | settings), basis="svd")
    assert linear.weight.requires_grad


# PEFT


def test_the_config_takes_no_selection():
    assert SecuraConfig(basis="svd").selection is None
    with pytest.raises(ValueError, match=r"selection='lowest' is not allowed.*basis='svd'"):
        SecuraConfig(basis="svd", selection="lowest")


@pytest.mark.parametrize("settings", [SVD, GATED | dict(basis="svd")], ids=["curlora", "secura"])
@pytest.mark.parametrize("build", [llama, gpt2, mlp])
def test_loading_needs_no_svd(settings, build, tmp_path, no_svd):
    x = torch.randn(3, 24) if build is mlp else tokens()
    targets = dict(target_modules=["c_attn", "c_proj"]) if build is gpt2 else {}
    model = move(peft(build(), **settings, **targets))
    expected = logits(model, x)
    model.save_pretrained(tmp_path)
    no_svd()
    for low in (False, True):
        read = PeftModel.from_pretrained(build(), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(logits(read, x), expected)
    read.load_adapter(tmp_path, adapter_name="again")
    read.set_adapter("again")
    assert torch.equal(logits(read, x), expected)
    hotswap_adapter(move(model, seed=3), tmp_path)
    assert torch.equal(logits(model, x), expected)


def test_transformers_own_loading_needs_no_svd(tmp_path, no_svd):
    model = llama()
    model.add_adapter(SecuraConfig(target_modules=["q_proj"], **SVD), "task")
    expected = logits(move(model, "task"), tokens())
    model.save_pretrained(tmp_path)
    no_svd()
    read = llama()
    info = read.load_adapter(tmp_path, adapter_name="other")
    assert not info.unexpected_keys and not info.missing_keys
    assert torch.equal(logits(read, tokens()), expected)


def test_a_saved_models_settings_serve_a_new_one(tmp_path):
    """They say that a file has C and R; where none comes, W's own are computed at the first use,
    or written into the next file."""
    model = move(peft(llama(), **SVD))
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path / "first")
    settings = SecuraConfig.from_pretrained(tmp_path / "first")
    for saved_first in (False, True):
        again = move(get_peft_model(llama(), settings).eval())
        if saved_first:
            again.save_pretrained(tmp_path / "second")
            again = PeftModel.from_pretrained(llama(), tmp_path / "second")
        assert torch.equal(logits(again, tokens()), expected)


def test_merging_and_lora_keep_the_outputs(tmp_path):
    model = move(peft(llama(dtype=torch.float64), **SVD))
    expected = logits(model, tokens())
    save_as_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(llama(dtype=torch.float64), tmp_path)
    torch.testing.assert_close(logits(lora, tokens()), expected, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens()), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens()), expected)


def test_a_mixed_batch_gathers_cores():
    """Adapters over one W have the same C and R to the bit, so that they differ in a core alone."""
    from secura_kernels.peft.batched import shared_key

    model = peft(llama(), **SVD)
    model.add_adapter("b", copy.deepcopy(model.peft_config["default"]))
    move(move(model), "b", seed=1)
    x, alone = tokens(2), []
    for name in ("default", "b"):
        model.set_adapter(name)
        alone.append(logits(model, x))
    mixed = logits(model.eval(), x, adapter_names=["default", "b"])
    torch.testing.assert_close(mixed, torch.stack([alone[0][0], alone[1][1]]))
    for layer in layers(model).values():
        assert len({shared_key(a) for a in layer.secura_adapter.values()}) == 1
