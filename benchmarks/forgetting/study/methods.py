"""What is compared: ways to fine-tune, each with the learning rates of its search."""

from dataclasses import dataclass, field

from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from secura_kernels.checks import check_choice
from secura_kernels.peft import SecuraConfig

ADAPTER, FULL, HEAD = "adapter", "full", "head"


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes:
        name: as the tables have it. kind: what is trained beside a task's head: adapters, the whole
        model, nothing.
        settings: of ``SecuraConfig``, or with ``lora`` of ``LoraConfig``. stage: ``"m1"`` or
        ``"m2"`` between tasks. rates: the learning rates that the search tries, as many for each
        method.
    """

    name: str
    kind: str
    rates: tuple[float, ...]
    settings: dict = field(default_factory=dict)
    lora: bool = False
    stage: str | None = None

    def attach(self, model: nn.Module, targets: list[str], seed: int) -> nn.Module:
        """``model`` with what this method trains requiring gradients, and nothing else."""
        check_choice("kind", self.kind, (ADAPTER, FULL, HEAD))
        model.requires_grad_(self.kind == FULL)
        if self.kind != ADAPTER:
            return model
        return get_peft_model(model, self.config(targets, seed))

    def config(self, targets: list[str], seed: int) -> PeftConfig:
        if self.lora:
            return LoraConfig(target_modules=list(targets), **self.settings)
        return SecuraConfig(target_modules=list(targets), seed=seed, **self.settings)


def around(rate: float) -> tuple[float, ...]:
    """Five rates, each 2.5 times the one before, the middle one given."""
    return tuple(float(f"{rate * 2.5**power:.2g}") for power in (-2, -1, 0, 1, 2))


def secura(name: str, rate: float = 1e-3, stage: str | None = None, **settings) -> Method:
    return Method(name, ADAPTER, around(rate), dict(r=64, basis="orthonormal") | settings,
                  stage=stage)


def curlora(name: str, rate: float = 6e-3, **settings) -> Method:
    return secura(name, rate, variant="curlora", **settings)


METHODS = {method.name: method for method in (
    Method("head only", HEAD, around(4e-3)),
    Method("full", FULL, around(5e-5)),
    Method("LoRA", ADAPTER, around(1e-3), dict(r=16, lora_alpha=16), lora=True),
    Method("DoRA", ADAPTER, around(1e-3), dict(r=16, lora_alpha=16, use_dora=True), lora=True),
    curlora("CURLoRA"),
    curlora("CURLoRA, as published", 1e-2, r=16, basis="raw"),
    curlora("CURLoRA, lowest", selection="lowest"),
    curlora("CURLoRA, highest", selection="highest"),
    secura("CABR", norm=None),
    secura("SECURA"),
    secura("SECURA, as published", basis="raw", norm="published", importance_decay=True),
    secura("SECURA, on the weight", norm_domain="weight"),
    secura("SECURA, published gate", norm="published"),
    secura("SECURA, published gate on the weight", norm="published", norm_domain="weight"),
    secura("SECURA, figure", norm="figure"),
    secura("SECURA, figure on outputs", norm="figure", norm_domain="output"),
    secura("SECURA, full derivative", norm=dict(detach_gate=False)),
    secura("SECURA, importance decay", importance_decay=True),
    secura("SECURA, M1", stage="m1"),
    secura("SECURA, M2", stage="m2"),
)}
