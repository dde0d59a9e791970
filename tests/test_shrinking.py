"""Going back from what was learned, until the model is within a budget of its base."""

import math

import pytest
import torch
from test_budget import TASK, TEXT, adapted, move

from secura_kernels import CURLoRALinear, SECURALinear, calibrate
from secura_kernels.train.budget import shrink_to_budget
from secura_kernels.train.retention import base_kl


def cores(model):
    """What a change is proportional to, of every adapter."""
    found = [m.core_parameter() for m in model.modules() if hasattr(m, "core_parameter")]
    return [core.detach().clone() for core in found]


@pytest.mark.parametrize("how", ["peft", SECURALinear, CURLoRALinear])
@pytest.mark.parametrize("basis", ["orthonormal", "whitened", "natural"])
@pytest.mark.parametrize("size", [1.0, 30.0])  # where the divergence is quadratic, and far beyond
def test_the_divergence_is_the_budget_after_it(basis, how, size):
    model, _ = adapted(basis, how=how)
    move(model, size)
    before, kl = cores(model), base_kl(model, TEXT)
    total = 1.0
    for part in (0.5, 0.01):
        found = shrink_to_budget(model, iter(TEXT), part * kl)
        assert 0.95 * part * kl <= found.kl <= part * kl
        assert found.kl == base_kl(model, TEXT) and 0 < found.factor < 1
        total *= found.factor
        for core, whole in zip(cores(model), before, strict=True):
            torch.testing.assert_close(core, total * whole)


def test_a_model_within_its_budget_is_left_alone():
    model, _ = adapted()
    assert shrink_to_budget(model, TEXT, 0.1) == (1.0, 0.0)
    move(model, 30.0)
    before, kl = cores(model), base_kl(model, TEXT)
    assert shrink_to_budget(model, TEXT, 2 * kl) == (1.0, kl)
    assert all(map(torch.equal, cores(model), before))


def test_several_adapters_in_use_and_one_that_is_not():
    model, _ = adapted(norm=None)
    model.add_adapter("second", model.peft_config["default"])
    model.add_adapter("third", model.peft_config["default"])
    for name in ("second", "third"):
        model.set_adapter(name)
        calibrate(model, TEXT, progress=False)
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "core_parameter"):
                module.core_parameter().normal_()
    before = cores(model)
    found = shrink_to_budget(model, TEXT, 0.2 * base_kl(model, TEXT))
    names = ["default", "second", "third"] * (len(before) // 3)  # as each layer holds them
    for name, core, whole in zip(names, cores(model), before, strict=True):
        assert torch.equal(core, whole if name == "third" else found.factor * whole)


def test_what_was_learned_before_stays():
    model, _ = adapted("natural", variant="curlora")
    move(model, 30.0)
    calibrate(model, TEXT, TASK, progress=False)
    kept = base_kl(model, TEXT)
    move(model, 30.0)
    before, whole = cores(model), base_kl(model, TEXT)
    assert kept < whole
    with pytest.raises(ValueError, match=r"budget=.* is not allowed: it must be more than the"):
        shrink_to_budget(model, TEXT, 0.5 * kept)
    assert all(map(torch.equal, cores(model), before))
    found = shrink_to_budget(model, TEXT, 0.5 * (kept + whole))
    assert 0.95 * found.kl <= 0.5 * (kept + whole) and found.factor < 1


def test_refusals():
    model, _ = adapted()
    for budget in (0, -1.0, math.nan, math.inf, "0.1"):
        with pytest.raises((ValueError, TypeError), match="budget"):
            shrink_to_budget(model, TEXT, budget)
    with pytest.raises(ValueError, match="at least one token"):
        shrink_to_budget(model, [], 0.1)
    with pytest.raises(ValueError, match="layers of this package"):
        shrink_to_budget(torch.nn.Linear(2, 2), TEXT, 0.1)
    move(model, math.nan)
    with pytest.raises(ValueError, match="whose predictions are numbers"):
        shrink_to_budget(model, TEXT, 0.1)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge"):
        shrink_to_budget(model, TEXT, 0.1)
