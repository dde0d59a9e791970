"""Layers that share an input: the same outputs to the bit, gradients within rounding, and every
way in which the group may not hold."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from secura_kernels import (
    CURLoRALinear,
    ImportanceDecay,
    SECURALinear,
    SMagNorm,
    fuse_projections,
)
from secura_kernels.ops import projections as ops
from secura_kernels.peft import SecuraConfig

QKV, SIZES, K, M = ("q_proj", "k_proj", "v_proj"), (20, 8, 12), 24, 10
FORMS = {
    "CURLoRA": (CURLoRALinear, {}),
    "raw": (CURLoRALinear, dict(basis="raw")),
    "SECURA": (SECURALinear, {}),
    "gate": (SECURALinear, dict(norm="calibrated")),
    "full gate": (SECURALinear, dict(norm=SMagNorm(detach_gate=False))),
    "decay": (
        SECURALinear,
        dict(norm="published", importance_decay=ImportanceDecay(edge=1.9, ratio=0.1)),
    ),
}
every_form = pytest.mark.parametrize("form", FORMS)


class Attention(nn.Module):
    """q, k and v of one input, or of two."""

    def __init__(self, form="CURLoRA", bias=False, dtype=torch.float64, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        kind, settings = FORMS[form]
        for name, N in zip(QKV, SIZES, strict=True):
            layer = kind.from_linear(nn.Linear(K, N, bias, dtype=dtype), 4, **settings)
            setattr(self, name, layer)
            with torch.no_grad():
                for parameter in layer.learned_parameters():
                    parameter.normal_(std=0.1)

    def forward(self, x, other=None):
        other = x if other is None else other
        return self.q_proj(x), self.k_proj(other), self.v_proj(other)


def pair(*args, **kwargs):
    """A module and its equal, fused."""
    separate = Attention(*args, **kwargs)
    fused = copy.deepcopy(separate)
    assert fuse_projections(fused) == 1
    return separate, fused


def inputs(dtype=torch.float64, shape=(M, K)):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def run(model, x=None, call=None, used=(0, 1, 2), **kwargs):
    """Outputs; gradients of the input and, by name, of what trains."""
    x = inputs() if x is None else x.detach().requires_grad_()
    model.zero_grad()
    y = (model if call is None else call)(x, **kwargs)
    sum((i + 1) * (y[i] * (y[i] + 1)).double().sum() for i in used).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [part.detach() for part in y], gradients, x.grad


def assert_same(found, expected):
    """Outputs and what is trained to the bit; float64 gradients of the input to rounding."""
    for a, b in zip(found[0], expected[0], strict=True):
        assert torch.equal(a, b)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        assert torch.equal(gradient, expected[1][name]), name
    torch.testing.assert_close(found[2], expected[2], rtol=1e-12, atol=1e-12)


def relative_error(value, truth):
    return float((value.double() - truth).norm() / truth.norm())


@pytest.fixture
def products(monkeypatch):
    """How many layers each shared product had gradients of."""
    seen, plain = [], ops._side_by_side
    monkeypatch.setattr(
        ops, "_side_by_side", lambda parts: (seen.append(len(parts)), plain(parts))[1]
    )
    return seen


# The same as the layers by themselves.


@every_form
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(M, K), (2, 5, K), (K,), (0, K)], ids=str)
def test_same_as_separate_layers(form, bias, shape, products):
    separate, fused = pair(form, bias)
    x = inputs(shape=shape)
    expected = run(separate, x)
    assert not products
    assert_same(run(fused, x), expected)
    assert products == [3]


@pytest.mark.parametrize("form", ["CURLoRA", "gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_separate_layers(form, dtype, products):
    separate, fused = pair(form, dtype=dtype)
    x = inputs(dtype, (64, K))
    truth = run(copy.deepcopy(separate).double(), x.double())[2]
    before, after = run(separate, x), run(fused, x)
    for a, b in zip(before[0], after[0], strict=True):
        assert torch.equal(a, b)
    for name, gradient in before[1].items():
        assert torch.equal(gradient, after[1][name]), name
    off = [relative_error(found[2], truth) for found in (before, after)]
    assert 0 < off[1] <= off[0] + (1e-6 if dtype is torch.float32 else 0)  # as in layer_cases.py
    assert products == [3]


def test_under_autocast(products):
    separate, fused = pair("gate", dtype=torch.float32)
    x = inputs(torch.float32, (64, K))
    truth = run(copy.deepcopy(separate).double(), x.double())[2]
    with torch.autocast("cpu", torch.bfloat16):
        before, after = run(separate, x), run(fused, x)
    for a, b in zip(before[0], after[0], strict=True):
        assert torch.equal(a, b) and b.dtype == torch.bfloat16
    assert 0 < relative_error(after[2], truth) <= relative_error(before[2], truth)
    assert after[2].dtype == torch.float32 and products == [3]
    separate, fused = pair("gate")
    with torch.autocast("cpu", torch.bfloat16):  # leaves float64 as it is
        assert_same(run(fused), run(separate))


@pytest.mark.parametrize("form", ["CURLoRA", "gate"])
@pytest.mark.parametrize("bias", [False, True])
def test_triton_kernels(form, bias, products):
    """In the interpreter, or on a GPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    separate, fused = pair(form, bias, dtype=torch.float32)
    truth = run(copy.deepcopy(separate).double())
    before = run(separate, inputs(torch.float32))
    for name in QKV:
        getattr(fused, name).impl = "triton"
    found = run(fused.to(device), inputs(torch.float32).to(device))
    assert products == [3]
    for mine, reference, true in (
        *zip(found[0], before[0], truth[0], strict=True),
        *((found[1][name], before[1][name], truth[1][name]) for name in truth[1]),
        (found[2], before[2], truth[2]),
    ):
        assert relative_error(mine.cpu(), true) <= relative_error(reference, true) + 1e-6


def test_stored_C_and_R(products):
    separate, fused = pair()
    for model in (separate, fused):
        for name in QKV[1:]:  # of q they stay slices
            layer = getattr(model, name)
            layer.untie(layer.weight)
    assert_same(run(fused), run(separate))
    assert products == [3]


def test_stage_and_past(products):
    separate, fused = pair()
    for model in (separate, fused):
        model.q_proj.stage_m2()
        with torch.no_grad():
            model.q_proj.U.fill_(0.1)
        k = model.k_proj
        k.C_past, k.R_past = k.weight[:, :3].clone(), k.weight[:3].clone()
    found, expected = run(fused), run(separate)
    assert_same(found, expected)
    assert products == [3]


def test_second_derivatives():
    def gradient_of_gradient(model):
        x = inputs()
        y = sum((part**3).sum() for part in model(x))
        trained = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(y, [x, *trained], create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), [x, *trained])

    for form in FORMS:
        separate, fused = pair(form)
        for a, b in zip(gradient_of_gradient(fused), gradient_of_gradient(separate), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("used", [(0,), (1, 2), (0, 2)], ids=str)
def test_outputs_that_nobody_uses(used, products):
    separate, fused = pair("gate")
    assert_same(run(fused, used=used), run(separate, used=used))
    assert products == [len(used)]


def test_gradients_of_the_input_alone_and_of_cores_alone(products):
    separate, fused = pair()
    for model in (separate, fused):
        model.requires_grad_(False)
    assert_same(run(fused), run(separate))
    assert products == [3]
    separate, fused = pair()
    y, expected = (model(inputs().detach()) for model in (fused, separate))
    sum(part.sum() for part in y).backward()
    sum(part.sum() for part in expected).backward()
    assert torch.equal(fused.v_proj.U.grad, separate.v_proj.U.grad)
    assert products == [3]


# What may come between.


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, products):
    separate, fused = pair("gate")
    call = partial(checkpoint, fused, use_reentrant=reentrant)
    assert_same(run(fused, call=call), run(separate))
    assert products == [3]


def test_torch_compile():
    separate, fused = pair("gate")
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_same(run(fused, call=compiled), run(separate))
    fused.to(torch.float32)
    found = run(fused, inputs(torch.float32), call=compiled)
    for a, b in zip(found[0], run(separate.float(), inputs(torch.float32))[0], strict=True):
        assert torch.equal(a, b)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_one_layer_compiled_alone(products):
    separate, fused = pair("gate")
    fused.q_proj.compile(fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert_same(run(fused), run(separate))
    assert products == [2, 2, 2]


def test_functional_transforms(products):
    separate, fused = pair()
    x = inputs().detach()
    for transform in (torch.func.grad, torch.func.hessian):
        a, b = (
            transform(lambda x, m=model: sum((y**2).sum() for y in m(x)))(x)
            for model in (fused, separate)
        )
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not products


def test_other_inputs_run_apart(products):
    separate, fused = pair()
    other = inputs().detach() * 2
    assert_same(run(fused, other=other), run(separate, other=other))
    equal = inputs().detach()
    assert_same(run(fused, other=equal), run(separate, other=equal))  # another tensor
    assert set(products) == {1}  # q's own


def test_input_changed_in_place_between_the_calls():
    class Changing(Attention):
        def forward(self, x):
            x = x * 1
            q = self.q_proj(x)
            x.mul_(2)
            return q, self.k_proj(x), self.v_proj(x)

    separate = Changing()
    fused = copy.deepcopy(separate)
    fuse_projections(fused)
    assert_same(run(fused), run(separate))


def test_chunks_and_calls_again(products):
    class Chunked(Attention):
        def forward(self, x):
            chunks = [Attention.forward(self, part) for part in x.split(5)]
            self.q_proj(x)  # nobody uses it
            return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    separate = Chunked()
    fused = copy.deepcopy(separate)
    fuse_projections(fused)
    assert_same(run(fused), run(separate))
    assert products == [3, 3]


def test_layer_outside_its_parent_and_exceptions(products):
    separate, fused = pair()
    x = inputs()
    with pytest.raises(ValueError, match=r"x\.shape"):
        fused(inputs(shape=(M, K + 1)))
    with pytest.raises(ValueError, match=r"x\.shape"):  # k's
        fused(x, other=inputs(shape=(M, K + 1)))
    assert all(getattr(fused, name).group_call is None for name in QKV)
    assert torch.equal(fused.q_proj(x), separate.q_proj(x))
    assert_same(run(fused), run(separate))
    assert products == [3]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    separate, fused = pair("gate")
    for training in (True, False):
        with mode():
            for a, b in zip(
                fused.train(training)(inputs()), separate.train(training)(inputs()), strict=True
            ):
                assert torch.equal(a, b)
    assert_same(run(fused), run(separate))


# What changes the layers.


@pytest.mark.parametrize("change", ["merge", "disable", "m2 with a gate"])
def test_one_layer_that_cannot_join(change, products):
    separate, fused = pair("gate" if change.startswith("m2") else "CURLoRA")
    for model in (separate, fused):
        if change == "merge":
            model.k_proj.merge()
        elif change == "disable":
            model.k_proj.disable_adapters = True
        else:
            model.k_proj.stage_m2()
    assert_same(run(fused), run(separate))
    assert not products
    if change == "merge":
        for model in (separate, fused):
            model.k_proj.unmerge()
        assert_same(run(fused), run(separate))
        assert products == [3]


def test_state_dict_is_unchanged(tmp_path):
    separate, fused = pair("gate")
    weights = {name: getattr(fused, name).weight for name in QKV}
    state, expected = fused.state_dict(), separate.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value) and state[name].shape == value.shape, name
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    save_file(tensors, tmp_path / "model.safetensors")
    saved = io.BytesIO()
    torch.save(state, saved)
    saved.seek(0)
    other = Attention("gate", seed=5)
    fuse_projections(other)
    for found in (load_file(tmp_path / "model.safetensors"), torch.load(saved)):
        other.load_state_dict(found)
        assert_same(run(other), run(separate))
        assert_same(run(other), run(fused))
    for name, weight in weights.items():
        assert getattr(fused, name).weight is weight


def test_loading_by_assignment_runs_apart_until_fused_again(products):
    _, fused = pair()
    other = Attention(seed=5)
    fused.load_state_dict(other.state_dict(), assign=True)
    assert_same(run(fused), run(other))
    assert not products
    assert fuse_projections(fused) == 1
    assert_same(run(fused), run(other))
    assert products == [3] and len(fused._forward_pre_hooks) == len(fused._forward_hooks) == 1


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def moved(model):
    return model.to(torch.float32).to(torch.float64)


@pytest.mark.parametrize("way", [copied, pickled, moved])
def test_copied_and_moved_models_are_put_together_again(way, products):
    separate, fused = pair("gate")
    model, expected = way(fused), moved(separate) if way is moved else separate
    assert_same(run(model), run(expected))
    assert products == [3]
    with torch.no_grad():  # the product's matrix is the layers' weights, no copy
        for both in (model, expected):
            both.k_proj.weight.mul_(2)
    assert_same(run(model), run(expected))
    assert products == [3, 3]
    if way is not moved:
        with torch.no_grad():
            model.k_proj.weight.zero_()
        assert fused.k_proj.weight.any()


def test_parts_on_their_own_run_apart(products):
    separate, fused = pair()
    fused.q_proj.to(torch.float32)
    expected = copy.deepcopy(separate)
    expected.q_proj.to(torch.float32)
    for model in (fused, expected):
        model.q_proj.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    assert_same(run(fused), run(expected))
    lone = copy.deepcopy(fused.k_proj)
    assert torch.equal(lone(inputs()), separate.k_proj(inputs()))
    assert not [n for n in products if n == 3]


def test_replaced_weights_are_left_alone(products):
    """As FSDP does in a forward pass: other parameters in the places of the layers' own."""
    separate, fused = pair()
    own = {f"{n}.weight": nn.Parameter(2 * getattr(fused, n).weight, False) for n in QKV}
    memory = {name: weight.data_ptr() for name, weight in own.items()}
    found, expected = (
        torch.func.functional_call(model, own, inputs()) for model in (fused, separate)
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert memory == {name: weight.data_ptr() for name, weight in own.items()}
    assert_same(run(fused), run(separate))
    assert products == [3]


def test_nothing_to_fuse():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="model=Sequential has no layers to fuse"):
        fuse_projections(model)
    alone = Attention()
    alone.k_proj = alone.v_proj = nn.Linear(K, 4)
    with pytest.raises(ValueError, match="two or more children"):
        fuse_projections(alone)
    in_the_weight = Attention()
    for name in QKV:
        linear = nn.Linear(K, 8, dtype=torch.float64)
        layer = SECURALinear.from_linear(linear, 4, norm=SMagNorm(domain="weight"))
        setattr(in_the_weight, name, layer)
    with pytest.raises(ValueError, match="no layers to fuse"):
        fuse_projections(in_the_weight)
    assert not in_the_weight._forward_hooks


# Models, by PEFT.

SMALL = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
MODELS = {
    "Llama": LlamaConfig(**SMALL),
    "Qwen2": Qwen2Config(**SMALL),
    "Mistral": MistralConfig(**SMALL),
    "Gemma": GemmaConfig(**SMALL, head_dim=8),
}


def peft_pair(name, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]).double()
    model = get_peft_model(model, SecuraConfig(r=4, **settings))
    model.enable_input_require_grads()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, copy.deepcopy(model)


def loss_and_gradients(model):
    tokens = torch.arange(24).view(2, 12)
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_models_same(fused, separate):
    (a, gradients), (b, expected) = loss_and_gradients(fused), loss_and_gradients(separate)
    assert torch.equal(a, b)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [{}, dict(variant="secura", norm="calibrated", m=6)], ids=str)
def test_models(name, settings, products):
    separate, fused = peft_pair(name, **settings)
    assert fuse_projections(fused) == 4  # q, k, v and gate, up of two blocks
    assert_models_same(fused, separate)
    assert sorted(products) == [2, 2, 3, 3]


def test_gpt_neox_has_them_in_one_already():
    config = GPTNeoXConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = get_peft_model(AutoModelForCausalLM.from_config(config), SecuraConfig(r=4))
    with pytest.raises(ValueError, match="no layers to fuse"):
        fuse_projections(model)


def test_q_and_v_alone(products):
    separate, fused = peft_pair("Llama", target_modules=["q_proj", "v_proj"])
    assert fuse_projections(fused) == 2
    assert_models_same(fused, separate)
    assert products == [2, 2]


def test_gradient_checkpointing_of_a_model(products):
    separate, fused = peft_pair("Llama")
    fuse_projections(fused)
    fused.gradient_checkpointing_enable()
    fused.train()
    assert_models_same(fused, separate)
    assert len(products) == 4


def test_peft_adapters_come_and_go(products, tmp_path):
    separate, fused = peft_pair("Llama")
    fuse_projections(fused)
    for model in (separate, fused):
        model.add_adapter("second", SecuraConfig(r=3))
        model.base_model.set_adapter(["default", "second"])
    assert_models_same(fused, separate)
    assert not products
    for model in (separate, fused):
        model.set_adapter("second")
    assert_models_same(fused, separate)
    assert len(products) == 4
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        for model in (separate, fused):
            model.eval()
        names = ["default", "second"]
        mixed = [m(input_ids=tokens, adapter_names=names).logits for m in (separate, fused)]
        assert torch.equal(*mixed)
        before = fused(input_ids=tokens).logits
        for model in (separate, fused):
            model.merge_adapter()
        assert torch.equal(*(m(input_ids=tokens).logits for m in (separate, fused)))
        for model in (separate, fused):
            model.unmerge_adapter()
        assert torch.equal(fused(input_ids=tokens).logits, before)
        with fused.disable_adapter(), separate.disable_adapter():
            assert torch.equal(*(m(input_ids=tokens).logits for m in (separate, fused)))
    assert_models_same(fused, separate)
    assert len(products) == 8
    fused.save_pretrained(tmp_path)
    whole = fused.merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float64)
    assert torch.equal(again(input_ids=tokens).logits, whole(input_ids=tokens).logits)
