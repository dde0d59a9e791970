"""How DTensor may shard the ops: for each, the placements that give a right result per rank.

Three ways over one dimension of a mesh; a mesh of more dimensions combines them:

- *tokens*: x, t and y by rows of M; core and bias gradients are sums over ranks.
- *columns* (column parallel): W, C, biases and y by N, with stored C and R (indices into a whole W
  mean nothing in a part of it); the input gradient is a sum over ranks.
- *inputs* (row parallel): x, W and R by K, so that y and t are sums over ranks. The forward pass
  only without a gate, which is not linear, and without biases, which every rank would add.

Whatever else DTensor is given it redistributes to one of these, or to whole tensors. ``ref="max"``
needs the whole matrix wherever the largest ratio is found.

``torch.distributed.tensor`` takes seconds to import, so the rules are registered when the first
DTensor comes, which has imported it.
"""

from typing import TypeVar

import torch
from torch import Tensor

from .registry import NAMESPACE

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)
_registered = False


def is_dtensor(value: object) -> bool:
    """Without an import, and traced by torch.compile as a constant."""
    return type(value).__name__ == "DTensor"


def frozen(value: MaybeTensor) -> MaybeTensor:
    """A frozen parameter as FSDP1 (``use_orig_params=True``) hands it over: a part of one flat
    parameter, which requires a gradient if any part of it does. Others as they are."""
    flat = value is not None and value.requires_grad and getattr(value._base, "_is_flat_param", 0)
    return value.detach() if flat else value


def prepare(*operands: Tensor | None) -> None:
    """Registers the rules if one of the operands is the first DTensor that comes."""
    if not _registered and any(map(is_dtensor, operands)):
        _register()


def _register() -> None:
    global _registered
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import register_sharding

    propagator = DTensor._op_dispatcher.sharding_propagator
    for name, rule in (
        ("cur_linear_fwd", _linear_fwd),
        ("cur_linear_bwd", _linear_bwd),
        ("cur_epilogue_fwd", _epilogue_fwd),
        ("cur_epilogue_bwd", _epilogue_bwd),
    ):
        op = getattr(getattr(torch.ops, NAMESPACE), name).default
        register_sharding(op)(rule)
        # Rules depend on the settings and on which operands there are, so the cache of what they
        # gave must too. By default it would know sharded operands and integers only.
        propagator.op_to_schema_info[op].static_argnum = 0
    _registered = True


def _placements():
    from torch.distributed.tensor import Partial, Replicate, Shard

    return Replicate(), Partial(), Shard(0), Shard(1)


def _rule(outputs: list, operands: tuple, inputs: list, settings: int):
    """A rule; an operand that is None has no placement, nor have settings."""
    return outputs, [
        None if operand is None else placement
        for operand, placement in zip(operands, inputs, strict=True)
    ] + [None] * settings


def _linear_fwd(
    x,
    weight,
    bias,
    core,
    cols,
    rows,
    C,
    R,
    adapter_bias,
    decay,
    task_gate,
    alpha,
    norm,
    detach_gate,
    edge,
    save,
    impl,
):
    whole, total, by_m, by_n = _placements()
    by_k = by_n  # of x (M, K), W (N, K) and R (r, K)
    operands = (x, weight, bias, core, cols, rows, C, R, adapter_bias, decay, task_gate)
    gate, moved = _gate_placements(norm, save, edge)
    rules = [_rule([whole] * 4, operands, [whole] * 11, 6)]
    if not _needs_maximum(norm):
        rules.append(_rule([by_m, by_m, gate[by_m], moved], operands, [by_m] + [whole] * 10, 6))
    if C is not None and not _needs_maximum(norm):
        rules.append(
            _rule(
                [by_n, whole, gate[by_n], moved],
                operands,
                [whole, by_m, by_m, whole, whole, whole, by_m, whole, by_m, by_m, whole],
                6,
            )
        )
    linear = not norm and task_gate is None
    if C is not None and linear and bias is None and adapter_bias is None:
        rules.append(
            _rule(
                [total, total, whole, whole],
                operands,
                [by_k, by_k, whole, whole, whole, whole, whole, by_k, whole, whole, whole],
                6,
            )
        )
    return rules


def _linear_bwd(
    dy,
    weight,
    core,
    cols,
    rows,
    C,
    R,
    adapter_bias,
    decay,
    task_gate,
    t,
    saved,
    alpha,
    norm,
    detach_gate,
    needs,
    impl,
):
    whole, total, by_m, by_n = _placements()
    by_k = by_n
    operands = (dy, weight, core, cols, rows, C, R, adapter_bias, decay, task_gate, t, saved)
    gate = {p: p if saved.ndim == 2 else whole for p in (by_m, by_n)}
    local = detach_gate or not _needs_maximum(norm)

    def gradients(*placements):
        return [p if n else whole for p, n in zip(placements, needs, strict=True)]

    rules = [_rule([whole] * 3, operands, [whole] * 12, 5)]
    if local:
        rules.append(
            _rule(
                gradients(by_m, total, total),
                operands,
                [by_m] + [whole] * 9 + [by_m, gate[by_m]],
                5,
            )
        )
    if C is None:
        return rules
    if local:
        rules.append(
            _rule(
                gradients(total, total, by_m),
                operands,
                [by_n, by_m] + [whole] * 3 + [by_m, whole, by_m, by_m, whole, whole, gate[by_n]],
                5,
            )
        )
    # Without a gate dcore is linear in t.
    for t_placement in (whole, total) if not norm and task_gate is None else (whole,):
        rules.append(
            _rule(
                gradients(by_k, t_placement, whole),
                operands,
                [whole, by_k] + [whole] * 4 + [by_k] + [whole] * 3 + [t_placement, whole],
                5,
            )
        )
    return rules


def _epilogue_fwd(
    y0, t, core, C, adapter_bias, decay, task_gate, alpha, norm, detach_gate, edge, save, impl
):
    whole, total, by_m, by_n = _placements()
    operands = (y0, t, core, C, adapter_bias, decay, task_gate)
    gate, moved = _gate_placements(norm, save, edge)
    rules = [_rule([whole] * 3, operands, [whole] * 7, 6)]
    if not _needs_maximum(norm):
        rules.append(_rule([by_m, gate[by_m], moved], operands, [by_m, by_m] + [whole] * 5, 6))
        rules.append(
            _rule(
                [by_n, gate[by_n], moved],
                operands,
                [by_n, whole, whole, by_m, by_m, by_m, whole],
                6,
            )
        )
    if not norm and task_gate is None and adapter_bias is None:
        rules.append(_rule([total, whole, whole], operands, [total, total] + [whole] * 5, 6))
    return rules


def _epilogue_bwd(
    dy, core, C, adapter_bias, decay, task_gate, t, saved, alpha, norm, detach_gate, needs, impl
):
    whole, total, by_m, by_n = _placements()
    operands = (dy, core, C, adapter_bias, decay, task_gate, t, saved)
    gate = {p: p if saved.ndim == 2 else whole for p in (by_m, by_n)}

    def gradients(*placements):
        return [p if n else whole for p, n in zip(placements, needs, strict=True)]

    rules = [_rule([whole] * 4, operands, [whole] * 8, 5)]
    if detach_gate or not _needs_maximum(norm):
        rules.append(
            _rule(
                gradients(by_m, by_m, total, total),
                operands,
                [by_m] + [whole] * 5 + [by_m, gate[by_m]],
                5,
            )
        )
        rules.append(
            _rule(
                gradients(by_n, total, total, by_m),
                operands,
                [by_n, whole, by_m, by_m, by_m, whole, whole, gate[by_n]],
                5,
            )
        )
    if not norm and task_gate is None:
        rules.append(
            _rule(gradients(whole, whole, total, whole), operands, [whole] * 6 + [total, whole], 5)
        )
    return rules


def _needs_maximum(norm: list[float]) -> bool:
    return bool(norm) and norm[2] == 0


def _gate_placements(norm, save, edge):
    """Of the saved gate, by how y lies, and of the count; an output that is not there is (0,)."""
    whole, total, by_m, by_n = _placements()
    gate = {p: p if norm and save else whole for p in (by_m, by_n)}
    return gate, total if norm and edge else whole
