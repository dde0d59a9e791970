"""Layers that share an input (q, k and v of an attention): ``fuse_projections``.

The layers' frozen weights become views of one matrix, one under another. Hooks of their parent
mark its forward pass; in it the first layer that is called makes tickets for all
(``ops/projections.py``), and the others, if they are called with the same tensor, take theirs. A
layer without a ticket runs as without this.

Whether the weights lie under one another is read from their memory in every forward pass, so that
nothing that moves, replaces or shards a weight can make the product a wrong one.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import SharedInput, forward_mode, transformed

if TYPE_CHECKING:
    from .adapter import Adapter

# Names of a module's children that known models call with the same tensor. gate and up of an MLP
# are left out: they are so large that one product for both saves nothing (docs/speed.md).
SHARING = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)

Ticket = tuple[Tensor, Tensor]  # of y and of t


class Part(NamedTuple):
    """A layer as its group sees it."""

    weight: Tensor  # W (N, K)
    adapter: "Adapter"


class Projection:
    """The part of a layer that may take a ticket."""

    group_call: "GroupCall | None" = None  # while the parent's forward pass runs

    def part(self) -> Part | None:
        """None while the layer does not run as base and one change of outputs."""
        raise NotImplementedError

    def ticket(self, x: Tensor) -> Ticket | None:
        """Of x (..., K), if the layer's group has one."""
        return None if self.group_call is None else self.group_call.take(self, x)


class Group:
    """Children of one module that share their input. Holds neither layers nor the matrix, so that
    a copied or moved module has a group that works.

    Attributes:
        names: of the children. parameters: the weights that were put under one another. Where
            these very ones are found apart (moved, copied), they are put together again.
    """

    def __init__(self, names: tuple[str, ...], parameters: tuple[Tensor, ...]) -> None:
        self.names, self.parameters = names, parameters

    def begin(self, parent: nn.Module, _) -> None:
        """Before the parent's forward pass."""
        if transformed() or not torch.is_grad_enabled():
            return  # traced, memory cannot be looked at; without gradients there is nothing to gain
        layers = [getattr(parent, name, None) for name in self.names]
        if all(isinstance(layer, Projection) for layer in layers):
            call = GroupCall(self, layers)  # type: ignore[arg-type]
            for layer in layers:
                layer.group_call = call  # type: ignore[union-attr]

    def end(self, parent: nn.Module, *_) -> None:
        """After it, also where it has raised."""
        for name in self.names:
            layer = getattr(parent, name, None)
            if getattr(layer, "group_call", None) is not None:
                layer.group_call = None

    def weight(self, weights: list[Tensor]) -> Tensor | None:
        """All of ``weights`` as one matrix, without a copy; None where they are not that."""
        whole = as_one(weights)
        if whole is None and self.parameters:
            if all(a is b for a, b in zip(weights, self.parameters, strict=True)):
                put_together(weights)
                whole = as_one(weights)
            else:  # replaced or sharded: these are others' to move
                self.parameters = ()
        return whole


class GroupCall:
    """One forward pass of the parent, and the tickets that nobody has taken yet."""

    def __init__(self, group: Group, layers: list[Projection]) -> None:
        self.group, self.layers = group, layers
        self.tickets: dict[int, Ticket] = {}  # by id of the layer
        self.input: Tensor | None = None
        self.version, self.dtype = 0, torch.float32

    def take(self, layer: Projection, x: Tensor) -> Ticket | None:
        if (
            type(x) not in (Tensor, nn.Parameter)
            or not (x.requires_grad and torch.is_grad_enabled())
            or transformed()
            or forward_mode()
        ):
            return None
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        if not self.tickets:
            self.input, self.version, self.dtype = x, x._version, dtype
            self._issue()
        if x is not self.input or (x._version, dtype) != (self.version, self.dtype):
            return None
        return self.tickets.pop(id(layer), None)

    def _issue(self) -> None:
        parts = [part for part in (layer.part() for layer in self.layers) if part is not None]
        if len(parts) < len(self.layers):
            return
        weight = self.group.weight([part.weight for part in parts])
        if weight is None or self.input.shape[-1:] != weight.shape[1:]:
            return
        adapters = [part.adapter for part in parts]
        sides = [adapter.rows if adapter.R is None else adapter.R for adapter in adapters]
        sizes = [part.weight.shape[0] for part in parts]
        ranks = [adapter.r for adapter in adapters]
        tickets = SharedInput.apply(self.input, weight, self.dtype, sizes, ranks, *sides)
        pairs = zip(tickets[: len(parts)], tickets[len(parts) :], strict=True)
        self.tickets = dict(zip(map(id, self.layers), pairs, strict=True))


def as_one(weights: list[Tensor]) -> Tensor | None:
    """Matrices (N_i, K) that lie under one another in one memory, as one (sum of N_i, K)."""
    first, rows = weights[0], 0
    for weight in weights:
        if not (
            _is_like(weight, first)
            and weight.is_contiguous()
            and weight.data_ptr() == first.data_ptr() + rows * first.shape[1] * first.itemsize
            and weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        ):
            return None
        rows += weight.shape[0]
    size = (rows, first.shape[1])
    return first.detach().as_strided(size, (first.shape[1], 1), first.storage_offset())


def put_together(weights: list[Tensor]) -> bool:
    """Makes parameters (N_i, K) views of one matrix, if they can be."""
    if not all(type(w) is nn.Parameter and _is_like(w, weights[0]) for w in weights):
        return False
    with torch.no_grad():
        blocks = torch.cat(weights).split([len(weight) for weight in weights])
    for weight, block in zip(weights, blocks, strict=True):
        weight.data = block
    return True


def _is_like(weight: Tensor, first: Tensor) -> bool:
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.ndim == 2
        and not (weight.is_meta or weight.requires_grad)
        and weight.shape[1] == first.shape[1]
        and weight.dtype == first.dtype
        and weight.device == first.device
    )


def fuse_projections(model: nn.Module) -> int:
    """Layers that share an input (q, k and v of an attention) with one product for the input's
    gradient, instead of one a layer and their sum.

    Outputs stay what they are, to the bit; gradients of the input and of what lies before it are
    off by rounding, in a low precision less so than without.

    Groups are children of one module with names that go together in known models (``SHARING``), as
    far as they have an adapter: ``CURLoRALinear``, ``SECURALinear`` and PEFT's layers. Whether
    they are called with the same tensor is seen in each forward pass. Their frozen weights become
    views of one matrix; names, shapes and values in the state dict stay what they are. ``to()`` and
    ``deepcopy`` part the views, and the next forward pass puts them together again. After weights
    were replaced (``load_state_dict(assign=True)``) call this once more.

    The layers run as before where one of them is merged, disabled, quantised, has several active
    adapters or a gate on the weight; within ``torch.compile``, ``torch.export`` and ``torch.func``;
    without gradients; where FSDP or ZeRO has sharded the weights; where the inputs differ.

    Returns:
        The number of groups.

    Raises:
        ValueError: there is no group; nothing is changed.
    """
    found = sum(_fuse(parent, names) for parent in model.modules() for names in SHARING)
    if not found:
        raise ValueError(
            f"model={type(model).__name__} has no layers to fuse: two or more children of one "
            "module must be adapted, plain and unmerged, with weights of one dtype on one device, "
            f"and names of one of {', '.join('/'.join(names) for names in SHARING)}"
        )
    return found


def _fuse(parent: nn.Module, names: tuple[str, ...]) -> bool:
    layers = {name: getattr(parent, name, None) for name in names}
    parts = {name: layer.part() for name, layer in layers.items() if isinstance(layer, Projection)}
    weights = {name: part.weight for name, part in parts.items() if part is not None}
    matrices = list(weights.values())
    if len(weights) < 2 or (as_one(matrices) is None and not put_together(matrices)):
        return False
    _forget(parent, names)
    group = Group(tuple(weights), tuple(matrices))
    parent.register_forward_pre_hook(group.begin)
    parent.register_forward_hook(group.end, always_call=True)
    return True


def _forget(parent: nn.Module, names: tuple[str, ...]) -> None:
    """Takes away the hooks of an earlier group of these children."""
    for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
        for key, hook in list(hooks.items()):
            group = getattr(hook, "__self__", None)
            if isinstance(group, Group) and set(group.names) <= set(names):
                del hooks[key]
                parent._forward_hooks_always_called.pop(key, None)
