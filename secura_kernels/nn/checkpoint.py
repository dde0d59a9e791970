"""Adapter files: the trained tensors, indices and settings of a model's layers, without the base.

One safetensors file; a layer's tensors stand under its name in the model. Reading one never
executes code.
"""

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checks import check_choice, fail
from ..settings import ImportanceDecay
from .linear import CURLinear, CURLoRALinear, SECURALinear
from .state import (
    CHECKSUM,
    FINGERPRINT,
    SETTINGS,
    check_finite,
    check_state,
    check_sum,
    checksum,
    fingerprint,
    same_base,
    unpack_settings,
)

KINDS = {kind.__name__: kind for kind in (CURLoRALinear, SECURALinear)}


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Saves every CURLoRALinear and SECURALinear of ``model`` to one safetensors file.

    The base weights are not saved; 256 values of each are, to recognise them. A checksum ties a
    layer's indices to its core. The file is replaced as a whole or not at all.

    Raises:
        ValueError: a model without such layers.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, CURLinear):
            continue
        entries = layer.state_dict()
        entries[FINGERPRINT] = fingerprint(entries.pop("weight"))
        entries.pop("bias", None)
        entries[CHECKSUM] = checksum(entries)
        tensors |= {_join(name, k): v.contiguous().cpu() for k, v in entries.items()}
    if not tensors:
        raise fail(
            "model", type(model).__name__, "a model with CURLoRALinear or SECURALinear layers"
        )
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, unfinished, metadata={"format": "pt"})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_adapter(
    model: nn.Module, path: str | os.PathLike, *, impl: str = "auto", force: bool = False
) -> list[str]:
    """Puts the layers of an adapter file into ``model``, in place.

    Args:
        model: the base model, whose plain layers are replaced (their weights are shared), or one
            that has such layers already, which are then loaded.
        path: a file of ``save_adapter``.
        impl: the backend of layers that are built here.
        force: load it on a base of other values too. C and R are then columns and rows of that one,
            so that the change is another than the one that was trained.

    Returns:
        The names of the layers.

    Raises:
        ValueError: a file that is truncated, tampered with, of another version, with NaN, or made
            for another base; FileNotFoundError: no such file. The model is then unchanged.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    suffix = "." + SETTINGS
    names = [
        k.removesuffix(suffix) if k != SETTINGS else ""
        for k in tensors
        if k == SETTINGS or k.endswith(suffix)
    ]
    if not names:
        raise ValueError(f"{path} holds no layers of secura_kernels")
    trainable = {p: p.requires_grad for p in model.parameters()}
    try:
        plan = [_plan(model, name, tensors, impl, force) for name in names]
        claimed = {_join(name, k) for name, _, found in plan for k in found}
        stray = sorted(set(tensors) - claimed)
        if stray:
            raise ValueError(f"it holds tensors of no layer: {', '.join(stray[:3])}")
    except (ValueError, TypeError) as error:
        for parameter, value in trainable.items():  # building a layer froze its base
            parameter.requires_grad_(value)
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    for name, layer, found in plan:
        for key in (FINGERPRINT, CHECKSUM):
            found.pop(key, None)
        layer.load_state_dict(found)
        if model.get_submodule(name) is not layer:
            model.set_submodule(name, layer)
    return names


def _plan(model: nn.Module, name: str, tensors: dict[str, Tensor], impl: str, force: bool):
    """A layer that is ready to take its part of the file, and that part, checked."""
    start = _join(name, "")
    found = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    try:
        target = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the model has no layer {name!r}") from None
    try:
        layer = target if isinstance(target, CURLinear) else _build(target, found, impl)
        own = layer.state_dict()
        if (
            FINGERPRINT in found
            and not force
            and not same_base(found[FINGERPRINT], fingerprint(own["weight"]))
        ):
            raise ValueError(
                "it was trained on another base: the layer's weight has other values "
                "(force=True loads it all the same)"
            )
        check_finite(found)
        found |= {k: own[k] for k in ("weight", "bias") if k in own}  # which no file holds
        about = {FINGERPRINT, CHECKSUM}
        check_state(layer, {k: v for k, v in found.items() if k not in about})
        unknown = set(found) - set(own) - set(layer.optional_shapes()) - about
        if unknown:
            raise ValueError(f"it holds unknown tensors {sorted(unknown)}")
        check_sum(found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    return name, layer, found


def _build(base: nn.Module, found: dict[str, Tensor], impl: str) -> CURLinear:
    """A layer of the file's kind and settings around a plain one."""
    settings = unpack_settings(found[SETTINGS])
    kind = check_choice("kind", settings.get("kind"), tuple(KINDS))
    for name in ("cols", "rows", *(("A",) if kind == "SECURALinear" else ())):
        if name not in found:
            raise ValueError(f"the state has no {name}")
    decay = settings.get("importance_decay")
    extra = {}
    if kind == "SECURALinear":
        extra = dict(m=found["A"].shape[0], adapter_bias=settings.get("adapter_bias"))
    basis = str(settings.get("basis"))
    layer = KINDS[kind](
        base,
        found["cols"],
        found["rows"],
        alpha=settings.get("alpha"),
        basis="raw" if basis == "svd" else basis,  # the file has C and R: no SVD
        norm=settings.get("norm"),
        importance_decay=None if decay is None else ImportanceDecay(**decay),
        impl=impl,
        **extra,
    )
    layer.basis = basis
    return layer


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
