"""Layers that share an input, when one of them, or their module, is changed, saved or moved."""

import copy
import io
import pickle

import pytest
import torch
from projection_cases import QKV, Attention, K, assert_same, inputs, pair, run
from safetensors.torch import load_file, save_file
from torch import nn

from secura_kernels import SECURALinear, SMagNorm, fuse_projections


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
