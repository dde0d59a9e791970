"""Mixed batches: every sample of a batch, or every token, with its own adapter.

Adapters that share their columns and rows differ in a core of r x r and a bias only. A batch of
many such adapters is then the base product, one product with R, and one op that gathers cores
(``cur_batched``). Adapters that share nothing take turns on their own samples or tokens.
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
from .by_token import AdaptersByToken

if TYPE_CHECKING:
    from .layer import SecuraLinear

BASE = "__base__"  # PEFT's name for no adapter


def forward(
    layer: "SecuraLinear", x: Tensor, adapter_names: list[str] | AdaptersByToken, *args, **kwargs
) -> Tensor:
    """(B, ..., K) -> (B, ..., N) with the adapter of each of B samples, or of each token.

    Raises:
        ValueError: another number of names than samples, or of tokens; a merged layer; several
            adapters over a base that tensor parallelism has sharded; by token an adapter whose gate
            takes a sample's maximum.
    """
    by_token = isinstance(adapter_names, AdaptersByToken)
    if by_token:
        adapter_names.check_tokens(x)
    elif len(adapter_names) != len(x):
        raise fail(
            "adapter_names", f"{len(adapter_names)} names", f"one for each of the {len(x)} samples"
        )
    if layer.merged:
        raise ValueError(
            "adapter_names cannot be used while adapters are merged: call unmerge_adapter() first"
        )
    given = adapter_names.names if by_token else adapter_names
    names = tuple(n if n in layer.secura_adapter else BASE for n in given)
    distinct = sorted(set(names) - {BASE})
    if len(distinct) == 1 and BASE not in names and not by_token:
        return layer._first(x, distinct[0], *args, **kwargs)
    if sharding.is_sharded(layer.get_base_layer()):
        raise ValueError(
            "adapter_names can name only one adapter, for all samples, while the base "
            "layer is sharded by tensor parallelism"
        )
    if by_token:
        _check_maxima(layer, distinct)
    y = layer.base_layer(x, *args, **kwargs)
    if not distinct:
        return y
    shape = y.shape
    if by_token:  # each token is a sample
        x, y = x.flatten(0, -2), y.flatten(0, -2)
    for group in _groups(layer, distinct):
        adapters = [layer.secura_adapter[n] for n in group]
        number = {name: i for i, name in enumerate(group)}
        numbers = tuple(number.get(name, -1) for name in names)
        ids_of, rows_of = (adapter_names.ids, adapter_names.rows) if by_token else (_ids, _rows)
        ids = ids_of(numbers, x.device)
        if not _gathers(adapters[0]):
            at = rows_of(numbers, x.device)
            y = y.index_copy(0, at, layer._first(x[at], group[0], *args, **kwargs))
        elif set(names) <= {BASE, *group}:
            y = _gathered(layer, adapters, layer.impl[group[0]], x, y, ids)
        else:
            at = rows_of(numbers, x.device)
            y = y.index_copy(
                0, at, _gathered(layer, adapters, layer.impl[group[0]], x[at], y[at], ids[at])
            )
    return y.view(shape)


def _check_maxima(layer: "SecuraLinear", names: list[str]) -> None:
    """What the largest ratio of a sample is among packed tokens, nobody says."""
    for name in names:
        norm = layer.secura_adapter[name].norm
        if norm is not None and norm.ref == "max" and norm.domain == "output":
            raise ValueError(
                f"adapter_names by token: {name!r} has a gate with ref='max', the largest ratio of "
                "a whole sample; name an adapter for each sample, or take a ref that is a number"
            )


def check_recomputation() -> None:
    """Raises RuntimeError in a forward pass without names that a backward pass runs, after one with
    them: what is computed again would be something else."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "gradient checkpointing computes a layer again without the adapter_names of its "
            "forward pass: use model.gradient_checkpointing_enable(), which keeps them, or "
            "checkpoint a function that calls the PEFT model itself"
        )


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
        and adapter.gate is None
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
        and not y0.requires_grad  # the gradient would be spread over a matrix as large as y0
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
def _ids(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The number of each sample's adapter within a group, -1 for another's; copied to the device
    once for all layers."""
    with torch.inference_mode(False):  # a later call may want gradients
        return torch.tensor(numbers, device=device)


@functools.lru_cache(maxsize=256)
def _rows(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The samples of a group."""
    with torch.inference_mode(False):
        return torch.tensor([i for i, n in enumerate(numbers) if n >= 0], device=device)
