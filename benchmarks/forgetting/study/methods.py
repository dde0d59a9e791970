"""What is compared: ways to fine-tune, each with the learning rates of its search."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from peft import LoraConfig, OSFConfig, PeftConfig, PsoftConfig, ShiraConfig, get_peft_model
from torch import nn

from secura_kernels.checks import check_choice
from secura_kernels.peft import SecuraConfig

from .starts import STARTS, Batches

ADAPTER, FULL, HEAD = "adapter", "full", "head"


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes:
        name: as the tables have it. kind: what is trained beside a task's head: adapters, the whole
        model, nothing.
        settings: of ``peft``'s configuration. metric: of ``calibrate``.
        start: one of ``STARTS``: text is read before the factors of LoRA are made.
        keeps_tasks: of a natural basis: the statistics of each task that is done join it.
        passages: of these, one of ``causal_model.PASSAGES``, is to be kept as well as the model's
            own text.
        fresh: a basis is found on other batches of the task than those that are trained on first.
        stage: ``"m1"`` or ``"m2"`` between tasks. rates: the learning rates that are tried, as many
        for each method; heads have their own. family: whose curves are drawn in one panel.
        every_layer: adapters go to all linear layers of a block, not to queries, keys and values
        alone; and of the whole model these layers alone are trained, not embeddings and norms.
        only: of these layers those whose names end so.
    """

    name: str
    kind: str
    rates: tuple[float, ...]
    settings: dict = field(default_factory=dict)
    metric: dict = field(default_factory=dict)
    keeps_tasks: bool = False
    passages: str | None = None
    fresh: bool = False
    peft: type[PeftConfig] = SecuraConfig
    start: str | None = None
    stage: str | None = None
    family: str = "methods"
    every_layer: bool = False
    only: tuple[str, ...] = ()

    @property
    def calibrated(self) -> bool:
        """Whether it measures on general text, before it trains, what the model is to keep."""
        return self.basis in ("whitened", "natural")

    @property
    def basis(self) -> str | None:
        return self.settings.get("basis")

    @property
    def of_language_alone(self) -> bool:
        """Whether it needs a model that writes text, or layers named as Llama's."""
        return self.calibrated or self.start is not None or bool(self.only)

    def attach(
        self,
        model: nn.Module,
        targets: Sequence[str],
        layers: Sequence[str],
        seed: int,
        general: Batches | None = None,
        task: Batches | None = None,
    ) -> nn.Module:
        """``model`` with what this method trains requiring gradients, and nothing else.

        Args:
            targets: the layers that adapters go to, by the ends of their names. layers: every
                linear layer of a block, for a method with ``every_layer``.
            general, task: what a ``start`` reads: general text, and the first task's batches.
        """
        check_choice("kind", self.kind, (ADAPTER, FULL, HEAD))
        if self.kind == ADAPTER:
            names = [name for name in layers if name.endswith(self.only or ("",))]
            config = self.config(names if self.every_layer else targets, seed)
            if self.start:
                return STARTS[self.start](model, config, general, task)
            return get_peft_model(model, config)
        if self.kind == HEAD or not self.every_layer:
            return model.requires_grad_(self.kind == FULL)
        model.requires_grad_(False)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.endswith(tuple(layers)):
                module.requires_grad_(True)
        return model

    def config(self, targets: Sequence[str], seed: int) -> PeftConfig:
        seeded = {SecuraConfig: dict(seed=seed), ShiraConfig: dict(random_seed=seed)}
        own = seeded.get(self.peft, {})
        return self.peft(target_modules=list(targets), **own, **self.settings)


SELECTION, GATE = "CURLoRA: basis, rank, selection", "SECURA: gate"
STAGES, LAYERS = "SECURA: decay and stages", "every linear layer"
METRIC = "every linear layer: the natural basis's metric"
RIVALS = "every linear layer: rivals that keep"
MLP = ("gate_proj", "up_proj", "down_proj")
TASK_GATE = dict(rate=1.2e-2, metric=dict(gated=True), keeps_tasks=True)  # of a natural basis


def up_to(rate: float) -> tuple[float, ...]:
    """Three rates, each three times the one before, the last one given: the highest at which the
    method still learns more than at the one before, or about there."""
    return tuple(float(f"{rate / 3**power:.2g}") for power in (2, 1, 0))


def lora(
    name: str,
    family: str = "methods",
    rate: float = 3e-3,
    every_layer: bool = False,
    passages: str | None = None,
    start: str | None = None,
    only: tuple[str, ...] = (),
    **settings,
) -> Method:
    return Method(
        name,
        ADAPTER,
        up_to(rate),
        dict(r=16, lora_alpha=16) | settings,
        passages=passages,
        peft=LoraConfig,
        start=start,
        family=family,
        every_layer=every_layer,
        only=only,
    )


def rival(name: str, peft: type[PeftConfig], rate: float, **settings) -> Method:
    """A method of PEFT's, on every linear layer."""
    return Method(
        f"{name}, every layer",
        ADAPTER,
        up_to(rate),
        settings,
        peft=peft,
        family=RIVALS,
        every_layer=True,
    )


def secura(
    name: str,
    family: str = "methods",
    rate: float = 6e-3,
    stage: str | None = None,
    every_layer: bool = False,
    metric: dict | None = None,
    keeps_tasks: bool = False,
    passages: str | None = None,
    fresh: bool = False,
    only: tuple[str, ...] = (),
    **settings,
) -> Method:
    default = dict(variant="secura", r=64, basis="orthonormal", norm="calibrated")
    return Method(
        name,
        ADAPTER,
        up_to(rate),
        default | settings,
        metric=metric or {},
        keeps_tasks=keeps_tasks,
        passages=passages,
        fresh=fresh,
        stage=stage,
        family=family,
        every_layer=every_layer,
        only=only,
    )


def curlora(name: str, family: str = "methods", rate: float = 2e-2, **settings) -> Method:
    return secura(name, family, rate, variant="curlora", norm=None, **settings)


def natural(name: str = "", family: str = LAYERS, rate: float = 7e-3, **settings) -> Method:
    name = f"CURLoRA, every layer, natural, {name}".removesuffix(", ")
    return curlora(name, family, rate, every_layer=True, basis="natural", **settings)


METHODS = {
    method.name: method
    for method in (
        Method("head only", HEAD, (0.0,)),
        Method("full", FULL, up_to(2e-4)),
        lora("LoRA"),
        lora("DoRA", use_dora=True),
        curlora("CURLoRA"),
        curlora("CURLoRA, as published", rate=3e-2, r=16, basis="raw"),
        secura("CABR", norm=None),
        secura("SECURA"),
        secura(
            "SECURA, as published",
            rate=1e-3,
            r=150,
            m=200,
            basis="raw",
            norm="published",
            importance_decay=True,
        ),
        secura("SECURA, on the weight", GATE, norm_domain="weight"),
        secura("SECURA, published gate", GATE, norm="published"),
        secura(
            "SECURA, published gate on the weight", GATE, norm="published", norm_domain="weight"
        ),
        secura("SECURA, figure", GATE, norm="figure"),
        secura("SECURA, figure on outputs", GATE, norm="figure", norm_domain="output"),
        secura("SECURA, full derivative", GATE, norm=dict(detach_gate=False)),
        secura("SECURA, scale 1", GATE, norm=dict(scale=1.0)),
        secura("SECURA, shift 4", GATE, norm=dict(shift=4.0)),
        secura("SECURA, importance decay", STAGES, importance_decay=True),
        secura("SECURA, M1", STAGES, stage="m1"),
        secura("SECURA, M2", STAGES, stage="m2"),
        curlora("CURLoRA, raw", SELECTION, rate=2.2e-3, basis="raw"),
        curlora("CURLoRA, r = 16", SELECTION, rate=6e-2, r=16),
        curlora("CURLoRA, r = 128", SELECTION, rate=3.3e-3, r=128),
        curlora("CURLoRA, lowest", SELECTION, selection="lowest"),
        curlora("CURLoRA, highest", SELECTION, selection="highest"),
        Method("full, every layer", FULL, up_to(2e-4), family=LAYERS, every_layer=True),
        lora("LoRA, every layer", LAYERS, 1e-3, every_layer=True),
        curlora("CURLoRA, every layer", LAYERS, 7e-3, every_layer=True),
        curlora("CURLoRA, every layer, whitened", LAYERS, 7e-3, every_layer=True, basis="whitened"),
        natural(),
        natural("tasks kept", keeps_tasks=True),
        natural("with Wikipedia", passages="wikipedia"),
        natural("with Wikipedia, tasks kept", passages="wikipedia", keeps_tasks=True),
        natural("tasks kept, gated", **TASK_GATE),
        natural("with Wikipedia, tasks kept, gated", passages="wikipedia", **TASK_GATE),
        natural("fresh", fresh=True),
        natural("tasks kept, fresh", fresh=True, keeps_tasks=True),
        natural("tasks kept, gated, fresh", fresh=True, **TASK_GATE),
        natural(
            "with JavaScript, tasks kept, gated, fresh",
            fresh=True,
            passages="javascript",
            **TASK_GATE,
        ),
        # For a KL loss on the same passages; r = 3 has as many numbers as the cores.
        lora(
            "LoRA, every layer, with Wikipedia",
            LAYERS,
            1e-3,
            every_layer=True,
            passages="wikipedia",
        ),
        lora(
            "LoRA, every layer, r = 3, with Wikipedia",
            LAYERS,
            3e-3,
            every_layer=True,
            passages="wikipedia",
            r=3,
            lora_alpha=3,
        ),
        curlora("LoRA-XS, every layer", RIVALS, 7e-3, every_layer=True, basis="svd"),
        lora("CorDA, every layer", RIVALS, 1e-3, every_layer=True, start="corda"),
        lora("EVA, every layer", RIVALS, 1e-3, every_layer=True, start="eva"),
        lora("LoRA-Null, every layer", RIVALS, 1e-3, every_layer=True, start="null"),
        rival("OSF", OSFConfig, 1e-4),
        rival("PSOFT", PsoftConfig, 1e-3, r=64, psoft_alpha=64),
        rival("SHiRA", ShiraConfig, 3e-3, r=16),
        lora("LoRA, MLP layers", RIVALS, 1e-3, every_layer=True, only=MLP),
        curlora("CURLoRA, MLP layers", RIVALS, 7e-3, every_layer=True, only=MLP),
        natural("diagonal", METRIC, metric=dict(rank=0)),
        natural("rank 64", METRIC, metric=dict(rank=64)),
        natural("rank 512", METRIC, metric=dict(rank=512)),
        natural("damping 0.01", METRIC, metric=dict(damping=0.01)),
        natural("damping 1", METRIC, metric=dict(damping=1.0)),
        curlora("CURLoRA, every layer, r = 128", LAYERS, 2.3e-3, r=128, every_layer=True),
        secura("CABR, every layer", LAYERS, 2e-3, every_layer=True, norm=None),
        secura("SECURA, every layer", LAYERS, 2e-3, every_layer=True),
    )
}
