"""Adapting a model happens whole or not at all: after any error it is what it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn


class Snapshot:
    """What a model's modules hold and what trains, to go back to; no tensor is copied."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, _attributes(module)) for module in model.modules()]
        self._trained = [(p, p.requires_grad) for p in model.parameters()]

    def restore(self) -> None:
        for module, (attributes, contents) in self._modules:
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in contents:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
        for parameter, value in self._trained:
            parameter.requires_grad_(value)


def _attributes(holder: object) -> tuple[dict, list]:
    """An object's attributes; and its dicts, lists and sets, the same objects, with a copy of what
    each holds."""
    attributes = dict(vars(holder))
    return attributes, [
        (value, value.copy())
        for value in attributes.values()
        if isinstance(value, dict | list | set)
    ]


@contextmanager
def undone_on_error(tuner: BaseTuner, model: nn.Module, adapter_name: str) -> Iterator[Snapshot]:
    """Around the injection of one adapter: on any error, an interrupt included, the model is what
    it was, to the module object, and so is the adapter's configuration."""
    config = tuner.peft_config[adapter_name]
    before, settings = Snapshot(model), dict(vars(config))
    try:
        yield before
    except BaseException:
        take_back(tuner, model, adapter_name, before)
        vars(config).update(settings)
        raise


def await_file(tuner: BaseTuner, adapter_name: str, before: Snapshot) -> None:
    """Remembers what to go back to if the file is refused for which PEFT has added an adapter."""
    vars(tuner).setdefault("_awaiting", {})[adapter_name] = before, _versions(tuner, adapter_name)


@contextmanager
def undone_on_refusal(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Around the check of an adapter's file: where it is refused and the adapter was added for it
    (and not touched since), the adapter goes again, and with the first one its layers."""
    tuner = getattr(model, "base_model", None)
    awaiting = getattr(tuner, "_awaiting", {}) if isinstance(tuner, BaseTuner) else {}
    before, versions = awaiting.pop(adapter_name, (None, None))
    try:
        yield
    except ValueError:
        if before is not None and versions == _versions(tuner, adapter_name):
            take_back(tuner, tuner.model, adapter_name, before)
        raise


def _versions(tuner: BaseTuner, adapter_name: str) -> list[tuple[int, int]]:
    """Changes with every change of an adapter's values."""
    return [
        (id(p), p._version)
        for name, p in tuner.model.named_parameters()
        if f".{adapter_name}." in name
    ]


def take_back(tuner: BaseTuner, model: nn.Module, adapter_name: str, before: Snapshot) -> None:
    """Restores a model from before an adapter was added."""
    before.restore()
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    if not any(adapter_name in layer._get_available_adapters() for layer in layers):
        tuner.peft_config.pop(adapter_name, None)  # which PEFT adds before it injects
    if not layers:
        vars(model).pop("_hf_peft_config_loaded", None)  # transformers sets it before it injects
