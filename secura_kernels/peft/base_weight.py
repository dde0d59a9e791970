"""W (N, K) of whatever layer PEFT wraps: plain, quantised or sharded; and W replaced when merging.

Beside it only ``quantised.py`` and ``sharding.py`` ask a base for its weight, of the forms that are
theirs: it need not have one.

Four kinds of base layer decide how an adapter runs:

- *plain*: an ``nn.Linear`` or ``Conv1D`` with its weight in memory as an ordinary matrix. The
  fused layer takes W itself, and C and R are slices of it.
- *quantised*: its own product is used, and the change is added to its output. C and R are taken
  once from the dequantised weight and kept. See ``quantised.py``, and ``packed.py`` for layers
  that have no weight.
- *sharded*: by tensor parallelism, or partitioned by DeepSpeed's ZeRO-3; as quantised, see
  ``sharding.py``. Under FSDP a base is sharded outside the forward pass only, and plain within.
- refused, with the reason.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from ..checks import fail
from ..nn.linear import RUNS_NOWHERE, runs_nowhere
from ..ops import is_dtensor
from . import packed, quantised, sharding

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Kept:
    """What held a base layer's W, and its bias, from before a merge: the parameters, and what
    belongs to the quantised one (see ``quantised.keep``)."""

    weight: nn.Parameter
    attributes: dict
    bias: Tensor | None


def holder(base: nn.Module) -> Tensor:
    """The tensor that holds W: the layer's weight, or the packed bits of one that has none."""
    return packed.bits(base) if packed.is_packed(base) else base.weight


def backend_of(base: nn.Module, **kwargs):
    """PEFT's backend for a quantised layer; None for a layer that is not quantised.

    Raises:
        TypeError: a layer that is neither linear nor a quantised linear layer that can be trained
            over.
    """
    backend = quantised.backend_of(base, **kwargs)
    if backend is not None:
        return backend
    if runs_nowhere(base):
        raise TypeError(
            f"target_modules matches a layer that cannot be adapted: {RUNS_NOWHERE}; "
            "name others in target_modules, or this one in exclude_modules"
        )
    if not isinstance(base, nn.Linear | Conv1D):
        raise TypeError(
            f"target_modules matches a {type(base).__name__}, which SECURA cannot adapt: only "
            "nn.Linear, transformers' Conv1D and quantised linear layers of bitsandbytes, "
            "torchao, GPTQModel and HQQ can be"
        )
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in DTYPES or _is_wrapper(weight):
        what = f"{type(weight).__name__} {getattr(weight, 'dtype', '')}".strip()
        packed = sorted(name for name in base.state_dict() if name.startswith("weight_"))
        if packed:
            what += f" (it keeps {', '.join(packed)})"
        raise TypeError(
            f"target_modules matches a {type(base).__name__} whose weight is a {what}, which "
            "SECURA cannot read as a matrix: only floating-point weights, and those quantised by "
            f"bitsandbytes and torchao, can be; {quantised.DEQUANTISE}"
        )
    return None


def check_parent(parent: nn.Module, name: str) -> None:
    """Raises TypeError for a layer that its parent does not always run."""
    if (
        isinstance(parent, nn.TransformerEncoderLayer)
        and name in ("linear1", "linear2")
        and torch.backends.mha.get_fastpath_enabled()
    ):
        raise TypeError(
            f"target_modules matches {name} of an nn.TransformerEncoderLayer, whose fast path "
            "takes the weight and leaves the adapter out in inference: call "
            "torch.backends.mha.set_fastpath_enabled(False) first"
        )


def _is_wrapper(weight: Tensor) -> bool:
    """Whether a tensor is made of others in a way that PEFT does not know."""
    return is_traceable_wrapper_subclass(weight) and not is_dtensor(weight)


def is_plain(base: nn.Module) -> bool:
    """Whether the fused layer may take the place of the base layer's own forward pass."""
    return (
        type(base).forward in (nn.Linear.forward, Conv1D.forward)
        and type(base.weight) in (nn.Parameter, Tensor)
        and not sharding.is_partitioned(base)
        and not (
            base._forward_hooks
            or base._forward_pre_hooks
            or base._backward_hooks
            or "forward" in base.__dict__
        )
    )  # accelerate's offloading replaces it


@torch.no_grad()
def matrix(base: nn.Module, backend=None, kept: Kept | None = None) -> Tensor:
    """W (N, K), floating point; dequantised from a quantised layer.

    Args:
        kept: of a merged layer: what its W was before.

    Raises:
        ValueError: a weight that has no values here (meta device).
        TypeError: a quantised weight that has lost what it needs to be dequantised.
    """
    weight = holder(base) if kept is None else kept.weight
    if weight.is_meta:
        raise fail("base weight's device", "meta", "one with values: C and R are taken from it")
    if backend is None:
        weight = sharding.whole(weight).detach()
    elif kept is None:
        quantised.check_state(base, backend)
        weight = backend.get_base_weight(base).detach()
    else:
        weight = quantised.dequantised(weight, kept.attributes, backend)
    weight = weight.to(holder(base).device)
    return weight.mT if is_transposed(base) else weight


def is_transposed(base) -> bool:
    """Whether a layer keeps W as (K, N), as transformers' ``Conv1D`` and gpt-oss's experts do."""
    return isinstance(base, Conv1D) or getattr(base, "is_transposed", False)


def check_merge(base: nn.Module, backend=None) -> None:
    """Raises what is wrong with a base that is to be merged into, whatever the adapter.

    Raises:
        ValueError: a quantised base that nothing could quantise again.
        RuntimeError: one that is sharded over ranks.
    """
    sharding.check_merge(base)
    quantised.check_merge(base, backend)


def keep(base: nn.Module, backend=None) -> Kept:
    """What ``restore`` needs; before ``replace``."""
    return Kept(*quantised.keep(base, backend), base.bias)


@torch.no_grad()
def replace(layer: nn.Module, weight: Tensor, bias: Tensor | None, backend=None) -> None:
    """Gives the base of a PEFT layer a new W (N, K) and bias, as fresh parameters; a quantised
    weight is quantised again.

    Raises:
        ValueError: it cannot be quantised again; nothing is changed then.
    """
    base = layer.get_base_layer()
    if is_transposed(base):
        weight = weight.mT.contiguous()
    if backend is None:
        base.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
    else:
        quantised.requantise(layer, weight, backend)
    if bias is not None and not packed.is_packed(base):  # HQQ's is a tensor
        bias = nn.Parameter(bias, requires_grad=False)
    base.bias = bias


def restore(base: nn.Module, kept: Kept, backend=None) -> None:
    """Puts back what was kept, to the bit, on the device where the base is by now, and in the
    dtype that a plain one has by now."""
    device, dtype = holder(base).device, holder(base).dtype
    if backend is None:
        base.weight = kept.weight
    else:
        quantised.restore(base, kept.weight, kept.attributes, backend)
    base.bias = kept.bias
    if kept.weight.device != device:
        packed.move(base, device) if packed.is_packed(base) else base.to(device)
    if backend is None and kept.weight.dtype != dtype:
        base.to(dtype)
