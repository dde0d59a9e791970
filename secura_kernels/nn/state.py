"""What a layer's saved state holds beside its tensors, and every check before one is loaded.

A state is tensors only, so it passes through safetensors: the settings are JSON in a uint8 tensor.
Reading one never executes code.
"""

import hashlib
import json

import torch
from torch import Tensor, nn

from ..checks import fail
from ..selection import check_indices

FORMAT, VERSION = "secura_kernels", 1
SETTINGS = "_extra_state"  # the key under which nn.Module keeps what get_extra_state returns


def pack_settings(layer: nn.Module) -> Tensor:
    """The layer's settings and the format's version as UTF-8 JSON, (bytes,) uint8."""
    content = dict(format=FORMAT, version=VERSION, **layer.settings())
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
        raise ValueError(
            f"the state has format {found[0]!r}, version {found[1]!r}: this release "
            f"reads {FORMAT!r}, version {VERSION}"
        )
    return content


def check_state(layer: nn.Module, found: dict[str, Tensor], strict: bool = True) -> None:
    """Checks a whole state against the layer; changes nothing.

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
            raise ValueError(
                f"the state was saved with {name}={content.get(name)!r}, the layer "
                f"was built with {name}={value!r}"
            )
    own = {k: v for k, v in layer.state_dict().items() if k != SETTINGS}
    check_tensors(layer, own, found, strict)


def check_tensors(
    adapter: nn.Module, own: dict[str, Tensor], found: dict[str, Tensor], strict: bool = True
) -> None:
    """Raises ValueError for tensors that an adapter, whose own are ``own``, cannot take: missing
    ones (with ``strict``), of another shape or kind, a part of those that belong together, indices
    outside W."""
    optional = adapter.optional_shapes()
    expected = {k: tuple(v.shape) for k, v in own.items() if k not in optional} | optional
    for name, shape in sorted(expected.items()):
        if name not in found:
            if strict and name not in optional:
                raise ValueError(f"the state has no {name}")
        elif not fits(found[name], shape):
            raise fail(f"{name}.shape", tuple(found[name].shape), f"{shape} for this layer")
        elif found[name].is_floating_point() != _floating(name, own):
            raise fail(f"{name}.dtype", found[name].dtype, "the kind of number the layer holds")
    open_sizes = {
        name: found[name].shape[shape.index(None)]
        for name, shape in optional.items()
        if name in found and None in shape
    }
    sizes = set(open_sizes.values())
    if len(sizes) > 1 or any(size % adapter.r for size in sizes):
        raise fail("sizes of the past", open_sizes, f"one multiple of r = {adapter.r}")
    if adapter.basis == "svd" and "cols" in found and "C" not in found:
        raise ValueError("the state has no C and R, which basis='svd' stores")
    for group in map(set, adapter.optional_groups()):
        if group & set(found) and not group <= set(found):
            raise ValueError(
                f"the state has {sorted(group & set(found))} without {sorted(group - set(found))}"
            )
    for name, size in (("cols", adapter.in_features), ("rows", adapter.out_features)):
        if name in found:
            check_indices(name, found[name].flatten(), size)  # (r,), or (E, r) of experts


def fits(found: Tensor, shape: tuple[int | None, ...]) -> bool:
    """Whether a tensor has that shape, in which None is any size."""
    return found.ndim == len(shape) and all(
        n is None or n == own for n, own in zip(shape, found.shape, strict=True)
    )


def _floating(name: str, own: dict[str, Tensor]) -> bool:
    return name not in own or own[name].is_floating_point()  # optional ones all are


def check_finite(found: dict[str, Tensor]) -> None:
    """Raises ValueError for a tensor of a file with NaN or infinite values."""
    for name, value in found.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise fail(name, "a tensor with NaN or infinite values", "finite")


# What a file knows of the base and of itself. Their names in it:
FINGERPRINT, CHECKSUM = "fingerprint", "checksum"
FINGERPRINT_VALUES = 256
# How far quantising may move a base, in parts of its own norm. Of Gaussian and of heavy-tailed
# (Student's t, 3 degrees) weights bitsandbytes' NF4 moves 0.09 and 0.13, torchao's int4 a row 0.13
# and 0.31 (0.40 at most), its int2 0.44 and 0.54 (0.62); two that have nothing in common are 1.4
# apart.
QUANTISED = 0.7
INDICES_AND_CORES = (
    "cols",
    "rows",
    "U",
    "U_long",
    "A",
    "B",
    "A_long",
    "B_long",
    "core_long",
    "adapter_bias",
)


def fingerprint(weight: Tensor) -> Tensor:
    """Some values of a base weight, evenly spread, (256,): enough to tell two bases apart."""
    steps = torch.linspace(0, weight.numel() - 1, FINGERPRINT_VALUES, dtype=torch.float64)
    at = torch.unravel_index(steps.round().long().to(weight.device), weight.shape)
    return weight.detach()[at].cpu()  # no reshape, which copies a transposed W


def same_base(saved: Tensor, here: Tensor) -> bool:
    """Whether two fingerprints are of the same weight, in the coarser of the two dtypes."""
    if not saved.is_floating_point():
        return False
    coarser = max(saved.dtype, here.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(saved.to(coarser), here.to(coarser))


def similar_base(saved: Tensor, here: Tensor) -> bool:
    """Whether two fingerprints are of the same weight, of which one may have been quantised."""
    if not saved.is_floating_point() or saved.shape != here.shape:
        return False
    saved, here = saved.double(), here.double()
    return bool((saved - here).norm() <= QUANTISED * torch.maximum(saved.norm(), here.norm()))


def checksum(found: dict[str, Tensor]) -> Tensor:
    """A digest (32,) uint8 of a layer's indices and cores, which belong together: a core trained
    between some columns and rows is noise between others. Independent of how wide a dtype holds
    the values. On the meta device, as they are, of tensors without values."""
    if any(found[name].is_meta for name in INDICES_AND_CORES if name in found):
        return torch.empty(32, dtype=torch.uint8, device="meta")
    digest = hashlib.sha256()
    for name in INDICES_AND_CORES:
        if name in found:
            value = found[name].detach().cpu()
            wide = torch.float64 if value.is_floating_point() else torch.int64
            digest.update(f"{name} {tuple(value.shape)} ".encode())
            digest.update(value.to(wide).contiguous().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def check_sum(found: dict[str, Tensor]) -> None:
    """Raises ValueError where a layer's part of a file has a checksum of other tensors."""
    if CHECKSUM in found and not torch.equal(found[CHECKSUM].cpu(), checksum(found)):
        raise ValueError(
            "its indices and cores are not those that were saved together (checksum); "
            "where they were changed on purpose, leave the checksum out"
        )
