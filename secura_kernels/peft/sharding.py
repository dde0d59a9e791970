"""Adapters over base layers that tensor parallelism has sharded: a DTensor weight on one mesh.

The base layer runs itself, its communication included, and its output is changed where it lies:

- *column parallel* (weight Shard(0)): x is whole, y0 holds this rank's columns. The rank's rows of
  C and of the adapter bias change them; the gradients of t, core and bias are summed over ranks.
- *row parallel* (weight Shard(1)): x is this rank's part of K (or whole), y0 is whole, after its
  reduction. t = x R^T is summed over ranks; all that follows is the same on every rank.

DeepSpeed's ZeRO-3 too has a base's weight whole inside the base layer's own forward pass only: that
is run, and changed with kept C and R as a quantised one is.

C and R are kept whole beside such a base, and the trained tensors are replicated: every rank has
the same ones and computes the same gradients. Importing ``torch.distributed.tensor`` takes
seconds, so it is imported where a DTensor exists, and it has been imported already.
"""

import sys

import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.epilogue import cur_epilogue
from ..nn.adapter import Adapter
from ..ops import is_dtensor


def is_sharded(base: nn.Module) -> bool:
    """Whether the base's weight is a DTensor: under tensor parallelism always, under FSDP2 outside
    the forward pass."""
    return is_dtensor(getattr(base, "weight", None))


def is_partitioned(base: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 keeps a part of the base's weight on each rank: it is whole inside
    the base layer's own forward pass only."""
    return hasattr(getattr(base, "weight", None), "ds_id")


def whole(value: Tensor) -> Tensor:
    """A DTensor or ZeRO-3's parameter gathered, which every rank must do; others as they are."""
    if hasattr(value, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([value]):
            return value.detach().clone()
    return value.full_tensor() if is_dtensor(value) else value


def check_injection(model: nn.Module) -> None:
    """Raises RuntimeError for a model that FSDP2 has sharded already: it would not synchronise the
    gradients of parameters that it does not know."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in model.modules()):
        raise RuntimeError(
            "adapters cannot be added to a model that fully_shard has sharded: it "
            "would not synchronise their gradients; add them first"
        )


def check_merge(base: nn.Module) -> None:
    """Raises RuntimeError for a sharded or partitioned base."""
    if is_sharded(base) or is_partitioned(base):
        raise RuntimeError(
            "the base layer's weight is sharded over ranks, where nothing can be "
            "merged into it: save the adapter and merge it into a whole model"
        )


def prepare(layer: nn.Module, adapter: Adapter) -> None:
    """Before a PEFT layer over a sharded or partitioned base uses an adapter: gathers what ZeRO-3
    has partitioned of it, and raises what ``over`` would raise whatever its inputs are.

    Raises:
        ValueError: a gate on the weight or importance decay, which need what other ranks hold, or
            a weight that is not sharded by plain rows or columns over a mesh of one dimension.
    """
    base = layer.get_base_layer()
    if is_partitioned(base):
        _prepare_partitioned(layer, adapter)
        return
    from torch.distributed.tensor import Replicate, Shard

    weight = base.weight
    if weight.device_mesh.ndim != 1 or type(weight.placements[0]) not in (Shard, Replicate):
        raise ValueError(
            f"the base layer's weight is sharded as {weight.placements} over a mesh "
            f"{tuple(weight.device_mesh.shape)}: adapters run over [Shard(0)], "
            "[Shard(1)] and [Replicate()] of a mesh of one dimension"
        )
    if not isinstance(base, nn.Linear):
        raise ValueError(
            f"the base layer is a sharded {type(base).__name__}: only nn.Linear can "
            "be sharded under an adapter"
        )
    if adapter.norm is not None and adapter.norm.domain == "weight":
        raise ValueError(
            "a gate on the weight (norm_domain='weight') is not possible over a "
            "weight that tensor parallelism has sharded: use norm_domain='output'"
        )
    if adapter.C_past is not None:
        raise ValueError(
            "an adapter that was calibrated for more than one task is not possible "
            "over a weight that tensor parallelism has sharded: merge it first"
        )
    if adapter.importance is not None:
        raise ValueError(
            "importance decay is not possible over a weight that tensor parallelism "
            "has sharded: its count and its channels would differ between ranks"
        )


def _prepare_partitioned(layer: nn.Module, adapter: Adapter) -> None:
    if adapter.norm is not None and adapter.norm.domain == "weight":
        raise ValueError(
            "a gate on the weight (norm_domain='weight') is not possible over a "
            "weight that ZeRO-3 has partitioned: use norm_domain='output'"
        )
    for parameter in adapter.parameters():
        if not parameter.numel():  # once: DeepSpeed then has it ready whenever the layer runs
            import deepspeed

            deepspeed.zero.register_external_parameter(layer, parameter)
            parameter.all_gather()


def over(base: nn.Module, adapter: Adapter, y0: Tensor, x: Tensor, impl: str) -> Tensor:
    """An adapter with stored C and R over the output y0 of a sharded base layer.

    Args:
        x: what the base layer was given, y0: what it gave; plain tensors or DTensors of its mesh.

    Returns:
        y, which lies as y0 does. A partial DTensor y0 is reduced first.

    Raises:
        ValueError: a gate with ``ref="max"`` over columns that ranks share; tokens that are
            sharded in x or y0 only (sequence parallelism).
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    weight = base.weight
    mesh, (N, K), placement = weight.device_mesh, weight.shape, weight.placements[0]
    by_column, by_row = placement == Shard(0), placement == Shard(1)
    sharded_y = None
    if is_dtensor(y0):
        keeps = by_column and y0.placements[0] == Shard(y0.ndim - 1)
        sharded_y = y0 if keeps else y0.redistribute(placements=[Replicate()])
        y0 = sharded_y.to_local()
    if is_dtensor(x):
        x = x.redistribute(placements=[Shard(x.ndim - 1) if by_row else Replicate()]).to_local()
    norm, bias, C, R = adapter.norm, adapter.adapter_bias, adapter.C, adapter.R
    some_columns, some_inputs = y0.shape[-1] != N, by_row and x.shape[-1] != K

    mine = _part(N if some_columns else K, mesh)
    t = F.linear(x, (R[:, mine] if some_inputs else R).to(x.dtype))
    if t.shape[:-1] != y0.shape[:-1]:
        raise ValueError(
            f"x {tuple(x.shape)} and the base output {tuple(y0.shape)} have other "
            "tokens on this rank: sequence parallelism inside the base layer is not "
            "possible under an adapter; gather x before the layer (PrepareModuleInput)"
            " and scatter y after it"
        )
    if some_inputs:
        t = (
            DTensor.from_local(t, mesh, [Partial()], run_check=False)
            .redistribute(placements=[Replicate()])
            .to_local()
        )
    core, long_core = adapter.core(adapter.stage_core()), adapter.long_core()
    if some_columns:
        if norm is not None and norm.ref == "max":
            raise ValueError(
                "a gate with ref='max' is not possible over a column-parallel layer: "
                "the largest ratio may lie on another rank"
            )
        # Each rank's gradients come from its own columns.
        t, core = (_sum_gradients(v, mesh) for v in (t, core))
        C = C[mine]
        bias = None if bias is None else _sum_gradients(bias, mesh)[mine]
    C = C.to(y0.dtype)
    if long_core is not None and norm is not None:
        y0 = adapter.without_gate(y0, t, C, long_core, impl)
    y = cur_epilogue(
        y0,
        t,
        core,
        C,
        alpha=adapter.alpha,
        norm=norm,
        adapter_bias=bias,
        task_gate=adapter.gate,
        impl=impl,
    )
    if sharded_y is None:
        return y
    return DTensor.from_local(
        y,
        mesh,
        sharded_y.placements,
        run_check=False,
        shape=sharded_y.shape,
        stride=sharded_y.stride(),
    )


def _sum_gradients(value: Tensor, mesh) -> Tensor:
    """The same tensor, whose gradient is the sum of all ranks' gradients."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    return DTensor.from_local(value, mesh, [Replicate()], run_check=False).to_local(
        grad_placements=[Partial()]
    )


def _part(size: int, mesh) -> slice:
    """This rank's part of a sharded dimension: as ``torch.chunk`` splits it, the last ones
    shorter."""
    step = -(-size // mesh.size())
    return slice(
        min(size, step * mesh.get_local_rank()), min(size, step * (mesh.get_local_rank() + 1))
    )
