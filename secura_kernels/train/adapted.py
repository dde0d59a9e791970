"""The adapted layers of a model, those of PEFT's other methods among them; the model without its
adapters, and in evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def changed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[str] | None]]:
    """Each adapted layer, its name and, of a PEFT layer, those of its active adapters it holds:
    a model's active adapters need not be in every layer."""
    for name, module in model.named_modules():
        peft = hasattr(module, "base_layer") and hasattr(module, "active_adapters")
        if not hasattr(module, "change_factors") and not (
            peft and hasattr(module, "get_delta_weight")
        ):
            continue
        adapters = None
        if peft:
            held = [getattr(module, part, ()) for part in module.adapter_layer_names]
            adapters = [a for a in module.active_adapters if any(a in part for part in held)]
        if adapters is None or adapters:
            yield name, module, adapters


def calibrated_adapters(model: nn.Module) -> list[nn.Module]:
    """Those in use whose core is measured in nats."""
    return [adapter for _, adapters in calibrated_layers(model) for adapter in adapters]


def calibrated_layers(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    for name, adapters in layers_in_use(model):
        calibrated = [adapter for adapter in adapters if adapter.unit is not None]
        if calibrated:
            yield name, calibrated


def layers_in_use(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """This package's layers by name, each with its adapters in use."""
    for name, module, adapters in changed_layers(model):
        if hasattr(module, "change_factors"):
            yield (
                name,
                [module] if adapters is None else [module.secura_adapter[a] for a in adapters],
            )


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[int]:
    """The base model: adapted layers, of this package and of PEFT, are their bases. It says how
    many there are.

    Raises:
        RuntimeError: a merged layer, which has no base.
    """
    found = []
    for name, module in model.named_modules():
        flag = "_disable_adapters" if hasattr(module, "_disable_adapters") else "disable_adapters"
        if not isinstance(getattr(module, flag, None), bool):  # transformers' models have a method
            continue
        if getattr(module, "merged", False):
            raise RuntimeError(f"{name} is merged: unmerge the model first")
        found.append((module, flag, getattr(module, flag)))
    try:
        for module, flag, _ in found:
            setattr(module, flag, True)
        yield len(found)
    finally:
        for module, flag, before in found:
            setattr(module, flag, before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module's own mode comes back, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
