"""The configurations that PEFT's tests run with: its lists of cases, with ours in them."""

from functools import partial

import pytest
import torch

from secura_kernels.peft import SecuraConfig, SecuraLinear

RANDOM_STD = 0.5


class SecuraCase(SecuraConfig):
    """Our configuration with ``init_weights``, which PEFT's tests pass to every method: False asks
    for an adapter that changes the outputs. Ours has no such setting: random values are written
    into the new adapter. By default it is SECURA with a gate, of which there is the most to get
    wrong. Files hold a plain ``SecuraConfig``."""

    def __init__(
        self,
        *args,
        init_weights: bool = True,
        variant: str = "secura",
        norm: str | dict | None = "calibrated",
        **kwargs,
    ) -> None:
        super().__init__(*args, variant=variant, norm=norm, **kwargs)
        self.init_weights = init_weights


class AsLora(SecuraCase):
    """Takes the place of ``LoraConfig`` in tests that know LoRA only. It too trains two matrices,
    without a bias or a gate, by default of the layers that are usual for the model's type."""

    def __init__(
        self,
        *args,
        r: int = 1,
        init_lora_weights: bool = True,
        lora_alpha: float = 1.0,
        target_modules: list[str] | str | None = None,
        **kwargs,
    ) -> None:
        super().__init__(
            *args,
            r=min(r, 2),
            alpha=lora_alpha,
            norm=None,
            adapter_bias=False,
            target_modules=target_modules,
            init_weights=init_lora_weights,
            **kwargs,
        )


def randomise_where_asked() -> None:
    """Makes new adapters random where a ``SecuraCase`` asks for it."""
    update_layer = SecuraLinear.update_layer

    def updated(
        layer: SecuraLinear, adapter_name: str, config: SecuraConfig, *args, **kwargs
    ) -> None:
        update_layer(layer, adapter_name, config, *args, **kwargs)
        if not getattr(config, "init_weights", True):
            for parameter in layer.secura_adapter[adapter_name].parameters():
                torch.nn.init.normal_(parameter, std=RANDOM_STD)

    SecuraLinear.update_layer = updated


CURLORA = dict(variant="curlora", norm=None)
VARIANTS = {
    "plain": dict(norm=None),
    "gate on outputs": dict(norm="calibrated"),
    "gate on the weight": dict(norm_domain="weight"),
    "CURLoRA": CURLORA,
}
# Layers: lin0 is 10 -> 20, lin1 20 -> 2; of EmbConv1D conv1d is 5 -> 1 and lin0 10 -> 2.
MLP = {
    "lin0": dict(target_modules="lin0", r=4),
    "[lin0, lin1]": dict(target_modules=["lin0", "lin1"], r=2),
}
MORE = [
    ("plain [lin0]", "MLP", dict(norm=None, target_modules=["lin0"])),
    ("plain [lin1]", "MLP", dict(norm=None, target_modules=["lin1"])),
    ("plain all-linear", "MLP", dict(norm=None, target_modules="all-linear")),
    (
        "plain lin0 with modules_to_save",
        "MLP",
        dict(norm=None, target_modules=["lin0"], modules_to_save=["lin1"]),
    ),
    (
        "plain [lin0, lin1] with modules_to_save",
        "MLP",
        dict(norm=None, target_modules=["lin0", "lin1"], modules_to_save=["lin1"]),
    ),
    (
        "gate on outputs with modules_to_save",
        "MLP",
        dict(target_modules=["lin0"], modules_to_save=["lin1"]),
    ),
    (
        "CURLoRA with modules_to_save",
        "MLP",
        CURLORA | dict(target_modules=["lin0"], modules_to_save=["lin1"]),
    ),
    ("plain raw", "MLP", dict(norm=None, basis="raw", target_modules=["lin0"])),
    ("CURLoRA raw", "MLP", CURLORA | dict(basis="raw", target_modules=["lin0"], alpha=9.0)),
    (
        "plain without a bias",
        "MLP",
        dict(norm=None, adapter_bias=False, target_modules=["lin0"], m=7),
    ),
    (
        "plain truncated_svd",
        "MLP",
        dict(norm=None, a_init="truncated_svd", target_modules=["lin0", "lin1"]),
    ),
    (
        "plain without projection",
        "MLP",
        dict(norm=None, save_projection=False, target_modules=["lin0", "lin1"]),
    ),
    (
        "CURLoRA without projection",
        "MLP",
        CURLORA | dict(save_projection=False, target_modules=["lin0"]),
    ),
    (
        "plain rank_pattern",
        "MLP",
        dict(norm=None, target_modules=["lin0", "lin1"], rank_pattern={"lin0": 5}),
    ),
    ("gate on outputs with decay", "MLP", dict(target_modules=["lin0"], importance_decay=True)),
    ("plain normed MLP", "MLP_LayerNorm", dict(norm=None, target_modules=["lin0", "lin1"])),
    ("plain conv1d", "EmbConv1D", dict(norm=None, target_modules=["conv1d"], r=1)),
    ("plain [conv1d, lin0]", "EmbConv1D", dict(norm=None, target_modules=["conv1d", "lin0"], r=1)),
    ("CURLoRA conv1d", "EmbConv1D", CURLORA | dict(target_modules=["conv1d"], r=1)),
    (
        "gate on the weight conv1d",
        "EmbConv1D",
        dict(norm_domain="weight", target_modules=["conv1d"], r=1),
    ),
    ("plain beside a Conv2d", "Conv2d", dict(norm=None, target_modules=["lin0"])),
]
CUSTOM = [
    *(
        (f"{variant} {layers}", "MLP", SecuraCase, settings | targets)
        for variant, settings in VARIANTS.items()
        for layers, targets in MLP.items()
    ),
    *((name, model, SecuraCase, dict(r=2) | settings) for name, model, settings in MORE),
]
CUSTOM_CLASSES = [SecuraCase]
SMALL_CLASSES = [partial(SecuraCase, r=2)]

_SAME = dict(target_modules=["lin0"], init_weights=False, r=2)
_LIN1 = _SAME | dict(target_modules=["lin1"])
SEVERAL_ACTIVE = [
    (f"{variant} {which}", "secura", SecuraCase, settings | _SAME, settings | second)
    for variant, settings in VARIANTS.items()
    for which, second in {"same": _SAME, "different": _LIN1, "other r": _SAME | dict(r=5)}.items()
]


def _mixed(second: dict, **both) -> list:
    return [
        (
            variant,
            SecuraCase(**_SAME | settings | both),
            SecuraCase(**_SAME | settings | both | second),
        )
        for variant, settings in VARIANTS.items()
    ]


MIXED = _mixed({}) + _mixed(dict(r=3))
MIXED_OTHER_LAYERS = _mixed(dict(target_modules=["lin1"]))
MIXED_MODULES_TO_SAVE = _mixed({}, modules_to_save=["lin1"])
MIXED_OVERLAPPING = _mixed(dict(target_modules=["lin0", "lin1"]))
MIXED_GRU = _mixed({}, modules_to_save=["gru"])
MIXED_CONV1D = _mixed({}, target_modules=["conv1d"], r=1)
MIXED_CONV1D_AND_MODULES_TO_SAVE = _mixed(
    {}, target_modules=["conv1d"], r=1, modules_to_save=["lin0"]
)

TARGETED_TWICE = [(SecuraCase, {"target_modules": "l1.*", "r": 2})]

# "all-linear", the default, takes no layers_to_transform.
CONFIGS = [
    (SecuraConfig, settings | {"target_modules": None})
    for settings in (CURLORA, {"variant": "secura", "norm": "calibrated"})
]


def models(task: str) -> list:
    """Cases of transformers models; PEFT chooses their layers by the model's type."""
    settings = dict(target_modules=None, r=4, task_type=task)
    # Without a bias a merged model has the base's layers, and can be loaded again.
    variants = VARIANTS | {"plain": dict(norm=None, adapter_bias=False)}
    return [
        pytest.param(SecuraCase, settings | variant, id=name) for name, variant in variants.items()
    ]


QUANTISED = [
    pytest.param(SecuraCase, dict(r=4, target_modules=["q_proj", "v_proj"]) | variant, id=name)
    for name, variant in VARIANTS.items()
]


class parameterized:
    """In the place of a package that one test file imports, for tests that are not run."""

    @staticmethod
    def expand(*args, **kwargs):
        return lambda test: test
