"""Mixed batches: every sample of a batch with its own adapter, for inference.

Adapters that share their columns and rows differ in a core of r x r and a bias only. A batch of
many such adapters is then the base product, one product with R, and one op that gathers cores
(``cur_batched``). Adapters that share nothing take turns on their own samples.
"""

import functools
import hashlib
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import fail
from ..functional.epilogue import cur_batched
from ..nn.adapter import Adapter
from . import base_weight, sharding

if TYPE_CHECKING:
    from .layer import SecuraLinear

BASE = "__base__"  # PEFT's name for no adapter


def forward(layer: "SecuraLinear", x: Tensor, adapter_names: list[str], *args, **kwargs) -> Tensor:
    """(B, ..., K) -> (B, ..., N) with the adapter of each of B samples.

    Raises:
        ValueError: another number of names than samples, a merged layer, or several adapters over
            a base that tensor parallelism has sharded.
    """
    if len(adapter_names) != len(x):
        raise fail(
            "adapter_names", f"{len(adapter_names)} names", f"one for each of the {len(x)} samples"
        )
    if layer.merged:
        raise ValueError(
            "adapter_names cannot be used while adapters are merged: call unmerge_adapter() first"
        )
    names = [n if n in layer.secura_adapter else BASE for n in adapter_names]
    distinct = sorted(set(names) - {BASE})
    if len(distinct) == 1 and BASE not in names:
        return layer._first(x, distinct[0], *args, **kwargs)
    if sharding.is_sharded(layer.get_base_layer()):
        raise ValueError(
            "adapter_names can name only one adapter, for all samples, while the base "
            "layer is sharded by tensor parallelism"
        )
    y = layer.base_layer(x, *args, **kwargs)
    for group in _groups(layer, distinct):
        adapters = [layer.secura_adapter[n] for n in group]
        ids, at = _ids(tuple(names), tuple(group), x.device)
        if not _gathers(adapters[0]):
            y = y.index_copy(0, at, layer._first(x[at], group[0], *args, **kwargs))
        elif set(names) <= {BASE, *group}:
            y = _gathered(layer, adapters, layer.impl[group[0]], x, y, ids)
        else:
            y = y.index_copy(
                0, at, _gathered(layer, adapters, layer.impl[group[0]], x[at], y[at], ids[at])
            )
    return y


def _groups(layer: "SecuraLinear", names: list[str]) -> list[list[str]]:
    """Names by what their adapters share."""
    groups: dict[tuple, list[str]] = {}
    for name in names:
        adapter = layer._ready(name)
        key = (shared_key(adapter), layer.impl[name]) if _gathers(adapter) else (name,)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _gathers(adapter: Adapter) -> bool:
    """Whether ``cur_batched`` can run the adapter: not S-MagNorm of the weight, which is a matrix
    of its own for each adapter; nor what only the layer's own path has."""
    norm = adapter.norm
    return (
        adapter.importance is None
        and adapter.C_past is None
        and (norm is None or (norm.domain == "output" and adapter.long_core() is None))
    )


def shared_key(adapter: Adapter) -> tuple:
    """Equal for adapters that may differ in their core and bias only. Kept with the adapter until
    its state is loaded anew: it reads values on the host."""
    if adapter.shared_key is None:
        sides = [adapter.cols, adapter.rows]
        if adapter.C is not None:
            sides += [adapter.C, adapter.R]
        if adapter.basis == "whitened" and adapter.fold_c is not None:
            sides += [adapter.fold_c, adapter.fold_r]
        values = hashlib.sha256()
        for side in sides:
            values.update(side.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
        adapter.shared_key = (
            values.digest(),
            type(adapter),
            adapter.core_parameter().shape,
            adapter.C is None,
            adapter.basis,
            adapter.alpha,
            adapter.norm,
            adapter.adapter_bias is None,
        )
    return adapter.shared_key


def _gathered(
    layer: "SecuraLinear", adapters: list[Adapter], impl: str, x: Tensor, y0: Tensor, ids: Tensor
) -> Tensor:
    first, base = adapters[0], layer.get_base_layer()
    C, R = layer.C_and_R(first)
    if (
        first.C is None
        and base.bias is None
        and base is layer.base_layer
        and base_weight.is_plain(base)
    ):
        t = y0.index_select(-1, first.rows)  # t = x R^T is r columns of the base product
    else:
        t = F.linear(x, R.to(x.dtype))
    bias = None
    if first.adapter_bias is not None:
        bias = torch.stack([a.adapter_bias for a in adapters])
    return cur_batched(
        y0,
        t.to(y0.dtype),
        first.cores(adapters),
        ids,
        C.to(y0.dtype),
        alpha=first.alpha,
        norm=first.norm,
        adapter_bias=bias,
        impl=impl,
    )


@functools.lru_cache(maxsize=256)
def _ids(
    names: tuple[str, ...], group: tuple[str, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The number of each sample's adapter within the group, -1 for another's, and the samples of
    the group; copied to the device once for all layers."""
    number = {name: i for i, name in enumerate(group)}
    ids = [number.get(name, -1) for name in names]
    with torch.inference_mode(False):  # a later call may want gradients
        return (
            torch.tensor(ids, device=device),
            torch.tensor([i for i, n in enumerate(ids) if n >= 0], device=device),
        )
