"""The layers that a calibration is of, and whether they may be calibrated now."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ...checks import fail
from ...nn.adapter import Adapter
from .measuring import Layers

BASES = ("whitened", "natural")


@contextmanager
def from_the_start(layers: Layers) -> Iterator[None]:
    """Nothing has been learned; after an error all of it comes back."""
    before = [
        (
            adapter,
            [p.detach().clone() for p in adapter.learned_parameters()],
            dict(adapter._buffers),
        )
        for _, adapter in layers.values()
    ]
    for module, adapter in layers.values():
        adapter.begin_anew()
        refresh(module)
    try:
        yield
    except BaseException:
        for adapter, values, buffers in before:
            with torch.no_grad():
                for parameter, value in zip(adapter.learned_parameters(), values, strict=True):
                    parameter.copy_(value)
            adapter._buffers |= buffers
        raise


def refresh(module: nn.Module) -> None:
    if isinstance(module, Adapter):  # a plain layer, which keeps what derives from its stages
        module.refresh()


def calibrated_layers(
    model: nn.Module, adapter_name: str | None
) -> Iterator[tuple[str, tuple[nn.Module, Adapter]]]:
    """Each layer whose basis is to be calibrated, by name, and its adapter, which a plain layer is
    itself."""
    for name, module in model.named_modules():
        if not hasattr(module, "change_factors"):
            continue
        found: Adapter | None = None
        if isinstance(module, Adapter):
            found = module
        else:
            names = module.active_adapters if adapter_name is None else [adapter_name]
            held = [n for n in names if n in module.secura_adapter]
            if len(held) > 1:
                raise fail("adapter_name", adapter_name, f"one of {held}, all of which are active")
            if held:
                found = module.secura_adapter[held[0]]
        if found is not None and found.basis in BASES:
            yield name, (module, found)


def one_basis(model: nn.Module, layers: Layers) -> str:
    bases = {adapter.basis for _, adapter in layers.values()}
    if len(bases) != 1:
        what = f"layers of {sorted(bases)}" if bases else type(model).__name__
        raise fail("model", what, "one with layers of basis='whitened', or of basis='natural'")
    return bases.pop()


def check_start(layers: Layers, restart: bool) -> None:
    for name, (module, adapter) in layers.items():
        if module.merged:
            raise RuntimeError(f"layer {name!r} is merged: unmerge before calibrate()")
        if restart or not adapter.core_parameter().any():
            continue
        if adapter.basis == "whitened":
            raise RuntimeError(
                f"layer {name!r} has been trained: calibrate before training, or after a stage "
                "(stage_m1, stage_m2), or pass restart=True, which sets the cores to zero"
            )
        if adapter.norm is not None:
            raise RuntimeError(
                f"layer {name!r} has been trained with a gate (norm), which leaves nothing that a "
                "later task could start from: use norm=None, or pass restart=True, which sets the "
                "cores to zero"
            )


def has_learned(adapter: Adapter) -> bool:
    return bool(adapter.core_parameter().any()) or adapter.long_core() is not None
