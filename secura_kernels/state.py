"""What a layer's saved state holds beside its tensors, and every check before one is loaded.

A state is tensors only, so it passes through safetensors: the settings are JSON in a uint8 tensor.
Reading one never executes code.
"""

import json

import torch
from torch import Tensor, nn

from .checks import fail
from .selection import check_indices

FORMAT, VERSION = "secura_kernels", 1
SETTINGS = "_extra_state"  # the key under which nn.Module keeps what get_extra_state returns


def pack_settings(layer: nn.Module) -> Tensor:
    """The layer's settings and the format's version as UTF-8 JSON, (bytes,) uint8."""
    content = dict(format=FORMAT, version=VERSION, base_changed=layer.base_changed,
                   **layer.settings())
    return torch.tensor(list(json.dumps(content, sort_keys=True).encode()), dtype=torch.uint8)


def unpack_settings(packed: object) -> dict:
    """Inverse of ``pack_settings``.

    Raises:
        ValueError: not settings of this format and version.
    """
    try:
        content = json.loads(bytes(packed.cpu().tolist()))
        found = content["format"], content["version"]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{SETTINGS} does not hold settings of {FORMAT}") from None
    if found != (FORMAT, VERSION):
        raise ValueError(f"the state has format {found[0]!r}, version {found[1]!r}: this release "
                         f"reads {FORMAT!r}, version {VERSION}")
    return content


def check_state(layer: nn.Module, found: dict[str, Tensor], strict: bool = True) -> dict:
    """Checks a whole state against the layer and returns its settings; changes nothing.

    Args:
        found: the state by names within the layer. strict: whether every tensor must be there.

    Raises:
        ValueError: what does not fit, with both values.
    """
    if layer.merged:
        raise ValueError("the layer is merged: call unmerge() before loading a state")
    if SETTINGS not in found:
        raise ValueError(f"the state has no {SETTINGS}, so its format is unknown")
    content = unpack_settings(found[SETTINGS])
    for name, value in layer.settings().items():
        if content.get(name) != value:
            raise ValueError(f"the state was saved with {name}={content.get(name)!r}, the layer "
                             f"was built with {name}={value!r}")
    own = {k: v for k, v in layer.state_dict().items() if k != SETTINGS}
    late = layer.late_shapes()
    expected = {k: tuple(v.shape) for k, v in own.items() if k not in late} | late
    for name, shape in expected.items():
        if name not in found:
            if strict and name not in late:
                raise ValueError(f"the state has no {name}")
        elif tuple(found[name].shape) != shape:
            raise fail(f"{name}.shape", tuple(found[name].shape), f"{shape} for this layer")
        elif found[name].is_floating_point() != _floating(name, own):
            raise fail(f"{name}.dtype", found[name].dtype, "the kind of number the layer holds")
    for group in map(set, layer.late_groups()):
        if group & set(found) and not group <= set(found):
            raise ValueError(f"the state has {sorted(group & set(found))} without "
                             f"{sorted(group - set(found))}")
    for name, size in (("cols", layer.in_features), ("rows", layer.out_features)):
        if name in found:
            check_indices(name, found[name], size)
    return content


def _floating(name: str, own: dict[str, Tensor]) -> bool:
    return name not in own or own[name].is_floating_point()  # all late tensors are floating point


FINGERPRINT = "fingerprint"  # its name in a file
FINGERPRINT_VALUES = 16


def fingerprint(weight: Tensor) -> Tensor:
    """A few values of a base weight, evenly spread, (16,): enough to tell two bases apart."""
    flat = weight.detach().reshape(-1)
    steps = torch.linspace(0, flat.numel() - 1, FINGERPRINT_VALUES, dtype=torch.float64)
    return flat[steps.round().long().to(flat.device)].cpu()


def same_base(saved: Tensor, weight: Tensor) -> bool:
    """Whether a fingerprint is this weight's, in the coarser of the two dtypes."""
    here = fingerprint(weight)
    coarser = max(saved.dtype, here.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(saved.to(coarser), here.to(coarser))
