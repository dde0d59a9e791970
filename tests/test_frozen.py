"""Nothing frozen is ever trained: no trained or stored tensor shares memory with the base, and the
base is to the bit what it was after training, stages, merging and loading."""

import copy

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secura_kernels import CURLoRALinear, ImportanceDecay, SECURALinear, SMagNorm
from secura_kernels.peft import SecuraConfig

N, K = 12, 16
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# What W looks like in memory decides what a slice of it shares with it.
LAYOUTS = ["rows", "columns", "part of a larger tensor", "Conv1D", "Conv1D, columns"]
RANKS = [1, 5, N]
GATE_FREE = dict(variant="secura")
GATED = GATE_FREE | dict(norm="calibrated")
VARIANTS = {
    "CURLoRA": dict(variant="curlora"),
    "CURLoRA, raw": dict(variant="curlora", basis="raw"),
    "SECURA": GATED,
    "SECURA, raw": GATED | dict(basis="raw"),
    "SECURA, no gate": GATE_FREE,
    "SECURA, on the weight": GATE_FREE | dict(norm=dict(domain="weight")),
    "SECURA, m = K": GATED | dict(m=K),
    "SECURA, truncated SVD": GATED | dict(a_init="truncated_svd"),
    "SECURA, importance decay": GATED | dict(importance_decay={}),
}
OPTIMISERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=0.1, weight_decay=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def base_layer(layout: str, dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    if layout.startswith("Conv1D"):
        layer, shape = Conv1D(N, K).to(dtype), (K, N)
    else:
        layer, shape = nn.Linear(K, N, dtype=dtype), (N, K)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout.endswith("columns"):
        weight = weight.T.contiguous().T
    elif layout.startswith("part"):
        whole = torch.zeros(N + 2, K + 4, dtype=dtype)
        whole[1:-1, 2:-2] = weight
        weight = whole[1:-1, 2:-2]
    layer.weight = nn.Parameter(weight)
    with torch.no_grad():
        layer.bias.copy_(torch.randn(N, generator=generator, dtype=torch.float64))
    return layer


def own_layer(base: nn.Module, r: int, variant: str, **settings) -> nn.Module:
    """The layer of this package without PEFT."""
    kind = CURLoRALinear if variant == "curlora" else SECURALinear
    if isinstance(settings.get("norm"), dict):
        settings["norm"] = SMagNorm(**settings["norm"])
    if "importance_decay" in settings:
        settings["importance_decay"] = ImportanceDecay()
    return kind.from_linear(base, r, generator=torch.Generator().manual_seed(0), **settings)


def peft_layer(base: nn.Module, r: int, **settings) -> nn.Module:
    return get_peft_model(
        nn.Sequential(base), SecuraConfig(r=r, target_modules=["0"], **settings)
    ).base_model.model[0]


BUILD = {"own": own_layer, "PEFT": peft_layer}


def stage_of(kind: str, r: int, settings: dict) -> str:
    """Either kind; a gate on the weight takes M2 alone."""
    m1 = r > 1 and settings.get("norm") != dict(domain="weight")
    return "stage_m1" if m1 else "stage_m2"


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def check_apart(layer: nn.Module, frozen: list[Tensor]) -> None:
    """Every tensor that trains or is stored beside the base lies in memory of its own."""
    named = dict(layer.named_parameters()) | dict(layer.named_buffers())
    owners = {memory(t): "the base" for t in frozen}
    for name, tensor in named.items():
        if any(tensor is t for t in frozen) or not tensor.numel():
            continue
        assert memory(tensor) not in owners, f"{name} shares memory with {owners[memory(tensor)]}"
        owners[memory(tensor)] = name


def train(layer: nn.Module, optimiser, steps: int = 3) -> None:
    trained = [p for p in layer.parameters() if p.requires_grad]
    before, optimizer = [p.detach().clone() for p in trained], optimiser(trained)
    dtype = getattr(layer, "base_layer", layer).weight.dtype
    x = torch.randn(7, K, dtype=torch.float64).to(dtype)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (layer(x).float() - 1).square().mean()
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(loss)
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_base_is_what_it_was(kind, layout, dtype):
    """For every variant and rank: trained, taken through stages, merged, unmerged and loaded."""
    for settings in VARIANTS.values():
        for r in RANKS:
            if settings.get("m", K) <= r:
                continue
            base = base_layer(layout, dtype)
            frozen = [base.weight, base.bias]
            values = [t.detach().clone() for t in frozen]

            def check(layer, frozen=frozen, values=values):
                check_apart(layer, frozen)
                assert all(map(torch.equal, frozen, values))

            layer = BUILD[kind](base, r, **settings)
            check(layer)
            train(layer, OPTIMISERS["AdamW"])
            check(layer)
            other = BUILD[kind](copy.deepcopy(base), r, **settings)
            other.load_state_dict(layer.state_dict())
            check(layer)
            getattr(layer, stage_of(kind, r, settings))()
            check(layer)
            train(layer, OPTIMISERS["SGD"])
            check(layer)
            if settings.get("norm") is None:
                layer.merge()
                check_apart(layer, frozen)
                holder = getattr(layer, "base_layer", layer)
                with torch.no_grad():
                    for tensor in (holder.weight, holder.bias):
                        tensor.add_(1)
                layer.unmerge()
                check(layer)


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("settings", [VARIANTS["CURLoRA"], VARIANTS["SECURA"]], ids=str)
def test_no_optimiser_moves_the_base(kind, optimiser, settings):
    base = base_layer("rows", torch.float32)
    frozen = [base.weight, base.bias]
    values = [t.detach().clone() for t in frozen]
    layer = BUILD[kind](base, 1, **settings)
    train(layer, OPTIMISERS[optimiser], steps=20)
    assert all(map(torch.equal, frozen, values))
    # Nor where a user hands over every parameter, the frozen ones with them.
    every = list(layer.parameters())
    if optimiser != "Muon":
        optimizer = OPTIMISERS[optimiser](every)
        optimizer.step(lambda: layer(torch.randn(3, K)).square().mean())
    assert all(map(torch.equal, frozen, values))


def test_a_disabled_adapter_is_the_base_after_training():
    base = base_layer("rows", torch.float32)
    x = torch.randn(5, K)
    expected = base(x).detach()
    model = get_peft_model(nn.Sequential(base), SecuraConfig(r=1, target_modules=["0"], **GATED))
    train(model.base_model.model[0], OPTIMISERS["AdamW"], steps=20)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_over_an_adapter_leaves_the_base(assign):
    """A's start is a slice of W, which a loaded A must not be written into."""
    base = base_layer("Conv1D", torch.float64)
    values = base.weight.detach().clone()
    model = get_peft_model(nn.Sequential(base), SecuraConfig(r=N, target_modules=["0"], **GATED))
    saved = {
        k: v + 1 if k.endswith(".A") else v.clone()
        for k, v in get_peft_model_state_dict(model).items()
        if not k.endswith("checksum")
    }
    set_peft_model_state_dict(model, saved, low_cpu_mem_usage=assign)
    assert torch.equal(base.weight, values)
    check_apart(model.base_model.model[0], [base.weight, base.bias])
