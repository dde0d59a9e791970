"""``target_parameters``: adapters over the experts of transformers' mixtures."""

import copy

import pytest
import torch
from expert_models import BOTH, KINDS, adapted, experts_of, moe
from peft import PeftModel, get_peft_model
from peft_models import assert_same_state, layers, llama, logits, move, state, tokens
from safetensors.torch import load_file
from test_experts import core_of
from torch import nn
from transformers import PretrainedConfig
from transformers.integrations import use_experts_implementation

from secura_kernels.peft import SecuraConfig, SecuraExperts, hotswap_adapter, save_as_lora

FORMS = {
    "curlora": dict(),
    "raw, alpha": dict(basis="raw", alpha=0.5),
    "secura": dict(variant="secura"),
    "secura, no bias": dict(variant="secura", adapter_bias=False, selection="highest"),
    "gate": dict(norm="calibrated"),
}
NO_GATE = [name for name in FORMS if name != "gate"]
HIDDEN = torch.linspace(-1, 1, 9 * 32, dtype=torch.float64).mul(40).sin().view(9, 32)


def routed(experts, tokens=9):
    """Some choice of 2 of 6 experts, of which the last is never taken, and weights."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=generator, dtype=torch.float64)
    return experts(HIDDEN[:tokens].to(next(experts.parameters()).dtype), chosen, weights)


@torch.no_grad()
def with_change(wrapped):
    """The base's own module with alpha C core R in each expert's weight, one after the other."""
    plain = copy.deepcopy(wrapped.base_layer)
    for stack in wrapped.stacks():
        made, weight = stack.secura_adapter["default"], stack.base_layer.matrix()
        name = stack.base_layer.parameter
        for e in range(len(weight)):
            C, R = weight[e][:, made.cols[e]], weight[e][made.rows[e]]
            change = made.alpha * C @ core_of(made, e, weight) @ R
            getattr(plain, name)[e] += change.T if plain.is_transposed else change
            if made.adapter_bias is not None:
                getattr(plain, f"{name}_bias")[e] += made.adapter_bias[e]
    return plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", NO_GATE)
def test_experts_equal_the_dense_formula(kind, form):
    """In float64, each expert on its own: the base's own forward pass of W + delta_W."""
    if form == "secura" and kind != "gpt-oss":
        pytest.skip("a bias, which these experts have none for")
    model = move(adapted(moe(kind, torch.float64), **FORMS[form]))
    for wrapped in experts_of(model).values():
        before = routed(wrapped.base_layer)
        found, expected = routed(wrapped), routed(with_change(wrapped))
        assert (expected - before).abs().max() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("run", ["eager", "grouped_mm", "batched_mm"])
def test_an_untrained_adapter_changes_nothing(kind, form, run):
    base = moe(kind, run=run)
    expected = logits(base, tokens())
    model = adapted(base, **FORMS[form])
    found = logits(model, tokens())
    if run == "grouped_mm":  # the same products in the same order
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), expected)
    assert torch.equal(logits(move(model).unload(), tokens()), expected)


def loss_of(model, inputs):
    return model(input_ids=inputs, labels=inputs).loss


@pytest.mark.parametrize("kind", ["qwen3", "gpt-oss"])
@pytest.mark.parametrize("form", FORMS)
def test_the_loss_falls_and_only_adapters_are_trained(kind, form):
    model = adapted(moe(kind, run="grouped_mm"), **FORMS[form]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".secura_adapter.default." in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05)
    inputs, losses = tokens(4, 16), []
    for _ in range(25):
        loss = loss_of(model, inputs)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0], losses
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name


def gradients(model, inputs, **context):
    model.zero_grad()
    loss_of(model, inputs).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_gives_the_same_gradients():
    model = move(adapted(moe(run="grouped_mm"))).train()
    plain = gradients(model, tokens())
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    again = gradients(model, tokens())
    assert plain.keys() == again.keys() and len(plain) == 4
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("form", ["curlora", "secura, no bias"])
def test_bfloat16_experts_with_float32_cores(form):
    """Off from float64 by no more than experts of W + delta_W in bfloat16 are, plus 1e-6."""
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        model = moe(dtype=torch.bfloat16).to(dtype)
        model = move(adapted(model, **FORMS[form]), std=0.1)
        assert all(p.dtype != torch.bfloat16 for p in model.parameters() if p.requires_grad)
        wrapped = next(iter(experts_of(model).values()))
        found[dtype] = routed(wrapped).double(), routed(with_change(wrapped)).double()
    truth, _ = found[torch.float64]
    ours, dense = ((y - truth).norm() / truth.norm() for y in found[torch.bfloat16])
    assert ours <= dense + 1e-6


def test_autocast_runs_experts_in_their_own_dtype():
    """As transformers' grouped experts do, of which autocast knows nothing."""
    model = move(adapted(moe(run="grouped_mm"))).train()
    wrapped = next(iter(experts_of(model).values()))
    for count in (1, 9):
        expected = routed(wrapped, count)
        with torch.autocast("cpu", torch.bfloat16):
            found = routed(wrapped, count)
        assert torch.equal(found, expected) and found.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, tokens()).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == 4 and all(g.isfinite().all() and g.dtype == torch.float32 for g in grads)


def test_compiled_in_bfloat16_without_a_break():
    """torch compiles its grouped product in bfloat16 alone."""
    settings = dict(r=8, alpha=0.5)
    model = move(adapted(moe(dtype=torch.bfloat16), **settings), std=0.1).train()
    wrapped = next(iter(experts_of(model).values()))
    cores = [stack.secura_adapter["default"].U for stack in wrapped.stacks()]
    compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
    plain, found = routed(wrapped), routed(compiled)
    assert torch.equal(found, plain)
    expected, grads = (torch.autograd.grad(y.float().square().sum(), cores) for y in (plain, found))
    assert all(map(torch.equal, grads, expected)) and all(g.any() for g in grads)


def test_one_token_by_itself():
    """Fewer rows than experts: their own columns and rows are gathered alone."""
    for form in FORMS.values():
        model = move(adapted(moe(dtype=torch.float64), **form))
        wrapped = next(iter(experts_of(model).values()))
        chosen, weights = torch.tensor([[3, 1]] * 5), torch.rand(5, 2, dtype=torch.float64)
        together = wrapped(HIDDEN[:5], chosen, weights)
        for i in range(5):
            alone = wrapped(HIDDEN[i : i + 1], chosen[:1], weights[i : i + 1])
            torch.testing.assert_close(alone[0], together[i], rtol=1e-12, atol=1e-12)


# Merging.


@pytest.mark.parametrize("kind", ["qwen3", "gpt-oss"])
@pytest.mark.parametrize("form", NO_GATE)
def test_merging_keeps_the_outputs_and_unmerging_the_bits(kind, form):
    model = move(adapted(moe(kind, torch.float64), **FORMS[form]))
    if form == "secura" and kind == "qwen3":
        before = state(model)
        with pytest.raises(ValueError, match=r"they have a bias \(adapter_bias\)"):
            model.merge_adapter()
        return assert_same_state(model, before)
    before, expected = state(model), routed(next(iter(experts_of(model).values())))
    whole = logits(model, tokens())
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    merged = next(iter(experts_of(model).values()))
    torch.testing.assert_close(routed(merged), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(routed(merged), routed(merged.base_layer))
    model.unmerge_adapter()
    assert_same_state(model, before)
    assert torch.equal(logits(model, tokens()), whole)
    plain = model.merge_and_unload(safe_merge=True)
    assert [type(m) for m in plain.modules()] == [type(m) for m in moe(kind).modules()]
    torch.testing.assert_close(routed(plain.model.layers[0].mlp.experts), expected)


def test_a_gate_on_outputs_cannot_be_merged():
    model = move(adapted(moe(), norm="calibrated"))
    before = state(model)
    with pytest.raises(ValueError, match="its gate acts on outputs"):
        model.merge_and_unload()
    assert_same_state(model, before)


def test_the_change_as_a_matrix_is_in_the_layout_of_the_parameter():
    for kind in ("qwen3", "gpt-oss"):
        model = move(adapted(moe(kind, torch.float64)))
        for stack in layers(model).values():
            change = stack.get_delta_weight("default")
            expected = getattr(with_change(owner(model, stack)), stack.base_layer.parameter)
            torch.testing.assert_close(stack.weight + change, expected)


def owner(model, stack):
    return next(m for m in model.modules() if isinstance(m, SecuraExperts) and stack in m.stacks())


@use_experts_implementation(has_gate=False, has_post_expert_norm=True)
class UngatedExperts(nn.Module):
    """The layout without a gate, and a norm after each expert."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = 6
        self.up_proj = nn.Parameter(torch.randn(6, 24, 32) / 5)
        self.down_proj = nn.Parameter(torch.randn(6, 32, 24) / 5)
        self.act_fn = nn.ReLU()
        self.post_expert_norm = nn.LayerNorm(32)

    def forward(self, hidden, chosen, weights):
        out = torch.zeros_like(hidden)
        for token, (experts, shares) in enumerate(zip(chosen, weights, strict=True)):
            for e, share in zip(experts, shares, strict=True):
                y = self.down_proj[e] @ self.act_fn(self.up_proj[e] @ hidden[token])
                out[token] += share * self.post_expert_norm(y)
        return out


def test_experts_without_a_gate_and_with_a_norm():
    config = PretrainedConfig()
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    base = nn.ModuleDict(dict(experts=UngatedExperts(config))).double()
    model = move(adapted(base, target_parameters=["up_proj", "down_proj"]))
    wrapped = model.base_model.model["experts"]
    expected = routed(with_change(wrapped))
    torch.testing.assert_close(routed(wrapped), expected, rtol=1e-12, atol=1e-12)
    model = move(adapted(model.unload(), target_parameters=["experts.down_proj"]))
    wrapped = model.base_model.model["experts"]  # the other weight is the base's
    expected = routed(with_change(wrapped))
    torch.testing.assert_close(routed(wrapped), expected, rtol=1e-12, atol=1e-12)


# Files.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_saved_adapter_comes_back_to_the_bit(kind, form, tmp_path):
    model = move(adapted(moe(kind), **FORMS[form]))
    model.save_pretrained(tmp_path)
    expected = logits(model, tokens())
    for settings in (dict(), dict(low_cpu_mem_usage=True)):
        again = PeftModel.from_pretrained(moe(kind), tmp_path, **settings)
        assert torch.equal(logits(again, tokens()), expected)
    plain = moe(kind)
    plain.load_adapter(tmp_path)
    assert torch.equal(logits(plain, tokens()), expected)
    file = load_file(tmp_path / "adapter_model.safetensors")
    held = {name.rpartition(".")[2] for name in file}
    trained = {"A", "B"} if form.startswith("secura") else {"U"}
    trained |= {"adapter_bias"} if form == "secura" else set()
    assert held == {"cols", "rows", "fingerprint", "checksum"} | trained
    assert len(file) == 4 * len(held)
    start = "base_model.model.model.layers.1.mlp.experts.down_proj.secura_adapter."
    assert file[start + "cols"].shape == (6, 4)


def test_stages_and_stored_sides_are_saved_too(tmp_path):
    model = move(adapted(moe()))
    for stack in layers(model).values():
        stack.stage_m2()
        stack.secura_adapter["default"].untie(stack.base_matrix())
    move(model, seed=1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(moe(), tmp_path)
    torch.testing.assert_close(logits(again, tokens()), logits(model, tokens()))


def test_another_base_and_a_foreign_file_are_refused(tmp_path):
    model = move(adapted(moe()))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"gate_up_proj': it was trained on another base"):
        PeftModel.from_pretrained(moe(seed=1), tmp_path)
    other = adapted(moe(), target_parameters=["experts.down_proj"])
    before = state(other)
    with pytest.raises(ValueError, match="layers that are not adapted here"):
        other.load_adapter(tmp_path, "default")
    assert_same_state(other, before)


def test_hotswap(tmp_path):
    model, other = move(adapted(moe())), move(adapted(moe()), seed=5)
    other.save_pretrained(tmp_path)
    parameters = [id(p) for p in model.parameters()]
    hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model, tokens()), logits(other, tokens()))
    assert [id(p) for p in model.parameters()] == parameters


# Several adapters.


def test_several_adapters_are_switched_added_up_and_deleted():
    model = move(adapted(moe(dtype=torch.float64)))
    alone = logits(model, tokens())
    second = dict(r=6, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    model.add_adapter("second", SecuraConfig(**second))
    move(model, "second", seed=1)
    assert torch.equal(logits(model, tokens()), alone)
    stacks = [s for s in layers(model).values() if hasattr(s, "base_layer")]
    assert {tuple(sorted(s.secura_adapter)) for s in stacks} == {
        ("default",),
        ("default", "second"),
        ("second",),
    }
    model.set_adapter("second")
    rival = move(get_peft_model(moe(dtype=torch.float64), SecuraConfig(**second)), seed=1)
    torch.testing.assert_close(logits(model, tokens()), logits(rival, tokens()))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".second." in name for name in trained)
    wrapped = next(iter(experts_of(model).values()))
    model.base_model.set_adapter(["default", "second"])
    both = routed(wrapped)
    model.merge_adapter(["default", "second"])
    torch.testing.assert_close(routed(wrapped), both, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model, tokens()), alone)


def test_adapters_with_a_gate_are_not_added_up():
    model = adapted(moe(), norm="calibrated")
    model.add_adapter("second", SecuraConfig(r=4, target_modules=[], target_parameters=BOTH))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="have a gate"):
        logits(model, tokens())


# What is adapted, and what is refused.


def test_every_linear_layer_is_adapted_beside_the_experts():
    gate = ["shared_expert_gate"]  # of one row
    model = adapted(moe("qwen2"), target_modules="all-linear", exclude_modules=gate)
    names = {name.removeprefix("base_model.model.model.layers.0.") for name in layers(model)}
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.shared_expert.down_proj"} <= (
        names
    )
    move(model)
    model.add_adapter("second", SecuraConfig(r=4, target_modules=["down_proj"]))
    stack = model.base_model.model.model.layers[0].mlp.experts.down_proj
    assert list(stack.secura_adapter) == ["default"]


def test_rank_pattern_by_the_name_of_a_parameter(recwarn):
    model = adapted(moe(), rank_pattern={"layers.1.mlp.experts.down_proj": 2})
    ranks = {name: s.secura_adapter["default"].r for name, s in layers(model).items()}
    assert sorted(ranks.values()) == [2, 4, 4, 4]
    assert not [w for w in recwarn if "rank_pattern" in str(w.message)]


class OwnExperts(nn.Module):
    """Experts whose forward pass nobody knows."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 4))

    def forward(self, x):
        return x


def own():
    return nn.ModuleDict(dict(experts=OwnExperts()))


def parallel():
    model = moe()
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    return model


def partitioned():
    """As DeepSpeed's ZeRO-3 marks a parameter of which each rank has a part."""
    model = moe()
    model.model.layers[1].mlp.experts.down_proj.ds_id = 7
    return model


def in_float8():
    model = moe()
    whole = model.model.layers[1].mlp.experts.down_proj.data.to(torch.float8_e4m3fn)
    model.model.layers[1].mlp.experts.down_proj = nn.Parameter(whole, requires_grad=False)
    return model


@pytest.mark.parametrize(
    "build, settings, error, message",
    [
        (moe, dict(r=33), ValueError, r"gate_up_proj': r=33 is not allowed"),
        (
            moe,
            dict(target_parameters=["experts.nowhere"]),
            ValueError,
            r"target_parameters=\['experts.nowhere'\] is not allowed",
        ),
        (moe, dict(target_parameters=["gate.weight"]), TypeError, r"\(6, 32\), which is no stack"),
        (llama, dict(target_parameters=["q_proj.weight"]), TypeError, "named in target_modules"),
        (
            lambda: moe("gpt-oss"),
            dict(target_parameters=["down_proj_bias"]),
            TypeError,
            "which is no stack of experts",
        ),
        (own, dict(), ValueError, r"\['experts.down_proj'\] is not allowed"),
        (
            own,
            dict(target_parameters=["gate_up_proj"]),
            TypeError,
            "experts.gate_up_proj of a OwnExperts, whose forward pass is not known",
        ),
        (parallel, dict(), TypeError, "layers.1.mlp.experts.gate_up_proj, whose experts lie on"),
        (partitioned, dict(), TypeError, "matches down_proj, which is sharded over ranks"),
        (in_float8, dict(), TypeError, "down_proj, a Parameter torch.float8_e4m3fn: only"),
        (moe, dict(basis="natural"), ValueError, "basis='natural' is not allowed"),
        (moe, dict(basis="svd"), ValueError, "basis='svd' is not allowed"),
        (moe, dict(norm="figure"), ValueError, "norm=.*is not allowed.*domain 'output'"),
        (
            moe,
            dict(norm="published", importance_decay=True),
            ValueError,
            "importance_decay=.*is not allowed.*stacked experts",
        ),
    ],
)
def test_what_is_refused_leaves_the_model_what_it_was(build, settings, error, message):
    model = build()
    before, kinds = state(model), [(n, id(m)) for n, m in model.named_modules()]
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        adapted(model, **settings)
    assert_same_state(model, before)
    assert kinds == [(n, id(m)) for n, m in model.named_modules()]
    assert trained == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(target_parameters="experts.down_proj"), "target_parameters='experts.down_proj' is"),
        (dict(target_parameters=[3]), r"target_parameters=\[3\] is not allowed"),
        (dict(target_parameters=BOTH, impl="triton"), "impl='triton' is not allowed"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        SecuraConfig(**settings)


def test_refused_while_running(tmp_path):
    model = move(adapted(moe()))
    with pytest.raises(ValueError, match="adapter_names is not possible with target_parameters"):
        model(tokens(), adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="cannot be saved as a LoRA: it has target_parameters"):
        save_as_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())
    experts = next(iter(experts_of(model).values())).base_layer
    experts.down_proj.requires_grad_(True)
    with pytest.raises(RuntimeError, match="down_proj of Qwen3MoeExperts requires a gradient"):
        model(tokens())
    experts.down_proj.requires_grad_(False)
    experts.down_proj.ds_id = 7
    with pytest.raises(RuntimeError, match="down_proj of Qwen3MoeExperts is sharded over ranks"):
        model(tokens())
    del experts.down_proj.ds_id
    experts.forward = lambda *args: args[0]
    with pytest.raises(RuntimeError, match="forward pass of Qwen3MoeExperts has been replaced"):
        model(tokens())
