"""benchmarks/forgetting/study/starts.py: where rivals' factors start."""

import copy

import pytest
import torch

pytest.importorskip("peft", reason="the rivals are PEFT's")
pytest.importorskip("attrs", reason="PEFT's CorDA needs it")
from forgetting_models import VOCABULARY, tiny_language_model
from peft import LoraConfig
from study.starts import STARTS

RANK = 4


@pytest.fixture
def base():
    return tiny_language_model(dtype=torch.float32)


def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (4, 16), generator=generator)
    return [dict(input_ids=ids, labels=ids)]


def started(base, name, rank=RANK):
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "down_proj"])
    return STARTS[name](copy.deepcopy(base), config, lambda: batches(0), lambda: batches(1))


@pytest.mark.parametrize("name", STARTS)
def test_a_start_leaves_the_predictions_as_they_were(base, name):
    ids = batches(2)[0]["input_ids"]
    with torch.no_grad():
        expected, found = (m(input_ids=ids).logits for m in (base, started(base, name).eval()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", STARTS)
def test_a_start_reads_its_text(base, name):
    """LoRA's own A is random; of the same text the same start is made."""
    first, second = (
        torch.cat([p.flatten() for n, p in started(base, name).named_parameters() if "lora_A" in n])
        for _ in range(2)
    )
    torch.testing.assert_close(first, second)


def test_a_frozen_a_spans_what_general_text_uses_least(base):
    inputs = {}
    name = "model.layers.1.mlp.down_proj"
    layer = base.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.update(x=args[0].flatten(0, -2)))
    base(input_ids=batches(0)[0]["input_ids"])
    hook.remove()
    model = started(base, "null")
    adapter = model.get_submodule(f"base_model.model.{name}")
    a, b = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
    assert not a.requires_grad and b.requires_grad
    rows = torch.linalg.qr(a.detach().double().T).Q.T  # (r, K), orthonormal
    x = inputs["x"].double()
    least = torch.linalg.svdvals(x.T @ x).flip(0)[:RANK].sum()
    assert torch.allclose((x @ rows.T).square().sum(), least, rtol=1e-3)
    on_them = layer.weight.double() @ rows.T @ rows
    torch.testing.assert_close((b @ a).double(), on_them, rtol=1e-4, atol=1e-5)
