"""The passes of csrc/, each with its outputs allocated, as ``backends/passes.py`` describes them.

The kernels take the core and vectors in float32, and C and R gathered and padded.
"""

import torch
from torch import Tensor

from ..host import GateNumbers, cdiv, padded_rank, processors_of_gpu
from ..operands import CurOperands
from ..passes import SUM, Finish, Gradients, WeightChange
from .library import call
from .plan import one_pass

# As in csrc/passes.h.
ROWS_PER_PROGRAM, BIAS_PARTS, ROWS_PER_PART = 64, 4, 256
COLUMNS_OF_W, MOST_TOKENS = 128, 64


def addressable(matrix: Tensor) -> Tensor:
    """Offsets have 64 bits."""
    return matrix


def plan(x: Tensor, layer: CurOperands) -> bool:
    return one_pass(x, layer.weight, layer.norm)


def plan_input_gradient(dy: Tensor, layer: CurOperands) -> bool:
    return one_pass(dy, layer.weight.T, None)


def columns(layer: CurOperands) -> Tensor:
    """C as (N, padded r)."""
    return _gather(layer.weight, layer.cols) if layer.C is None else _gather(layer.C, None)


def rows(layer: CurOperands) -> Tensor:
    """R as (K, padded r)."""
    return _gather(layer.weight.T, layer.rows) if layer.R is None else _gather(layer.R.T, None)


def _gather(matrix: Tensor, index: Tensor | None) -> Tensor:
    r = matrix.shape[1] if index is None else index.shape[0]
    factor = matrix.new_empty(matrix.shape[0], padded_rank(r))
    call("gather", matrix, matrix, index, factor)
    return factor


def down(
    a: Tensor,
    factor: Tensor,
    core: Tensor,
    alpha: float,
    *,
    p_dtype: torch.dtype,
    transpose_core: bool = False,
    task_gate: Tensor | None = None,
    t: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r = core.shape[0]
    p = a.new_empty(a.shape[0], r, dtype=p_dtype)
    q = a.new_empty(a.shape[0], factor.shape[1])
    gate = _vector(task_gate), t
    call("down", a, a, factor, _wide(core, transpose_core), alpha, p, q, _parts(a, r), *gate)
    return p, q


def _wide(core: Tensor, transpose: bool) -> Tensor:
    return core.float().T if transpose else core.float()


def _parts(a: Tensor, r: int) -> Tensor | None:
    """Where the products of groups of columns of a are kept, (groups, M, r) float32, when its rows
    alone would leave processors idle."""
    processors = processors_of_gpu(a.device) if a.is_cuda else 1
    parts = _groups_of_columns(*a.shape, processors)
    return a.new_empty(parts, a.shape[0], r, dtype=torch.float32) if parts > 1 else None


def _groups_of_columns(M: int, columns: int, processors: int) -> int:
    """One where rows fill the chip, else as many as fill it, of 512 columns at least: each costs
    writing and reading (M, r) in float32."""
    return max(1, min(processors // max(1, cdiv(M, ROWS_PER_PROGRAM)), columns // 512))


def project(
    a: Tensor,
    index: Tensor | None,
    core: Tensor,
    alpha: float,
    *,
    q_dtype: torch.dtype,
    transpose_core: bool = False,
    task_gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    M, r = a.shape[0], core.shape[0]
    p, q = a.new_empty(M, r), a.new_empty(M, padded_rank(r), dtype=q_dtype)
    call("project", a, a, index, _wide(core, transpose_core), alpha, p, q, _vector(task_gate))
    return p, q


def _vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float()


def _numbers(gate: GateNumbers | None) -> list[float]:
    return [] if gate is None else list(vars(gate).values())


def product(
    a: Tensor,
    b: Tensor,
    h: Tensor,
    factor: Tensor,
    plan: bool = True,
    bias: Tensor | None = None,
    finish: Finish = SUM,
) -> Tensor:
    y = a.new_empty(a.shape[0], b.shape[0])
    adapter_bias, decay, gate, *written, _ = finish
    change = _vector(adapter_bias), _vector(decay), _numbers(gate)
    call("product", a, a, b, h, factor, bias, *change, y, *written)
    return y


def epilogue(y: Tensor, h: Tensor, factor: Tensor, finish: Finish = SUM) -> None:
    adapter_bias, decay, gate, *written, largest = finish
    change = h, factor, _vector(adapter_bias), _vector(decay), _numbers(gate), *written, largest
    if largest is not None:
        call("epilogue", y, y, *change, True)  # finds it, and no more
    call("epilogue", y, y, *change, False)


def gate_gradients(
    dy: Tensor, layer: CurOperands, t: Tensor, saved: Tensor, needs: tuple[bool, bool, bool]
) -> Gradients:
    g, q, v, dadapter_bias = gate_backward(dy, saved, columns(layer), layer, needs)
    return Gradients(g, q, core_gradient(v, t, layer) if needs[1] else None, dadapter_bias)


def gate_backward(
    dy: Tensor,
    saved: Tensor,
    factor: Tensor,
    layer: CurOperands,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """``g``, ``q`` and ``dadapter_bias`` of ``Gradients``, and before the last v (M, r) float32.

    Args:
        dy: (M, N), any strides. saved: (M, N), what the forward pass saved. factor: C.
        needs: of x, core, adapter_bias.
    """
    rows, core = layer.tied_rows, layer.core.float()
    (M, N), r = dy.shape, core.shape[0]
    programs = cdiv(M, ROWS_PER_PROGRAM)
    wide = dict(dtype=torch.float32)
    g = torch.empty_like(saved, dtype=dy.dtype) if needs[0] else None
    v = dy.new_empty(M, r, **wide) if needs[0] or needs[1] else None
    q = dy.new_empty(M, factor.shape[1]) if needs[0] and rows is None else None
    part = dy.new_empty(BIAS_PARTS * programs, N, **wide) if needs[2] else None
    v_part = None if v is None else _parts(dy, r)
    gate = _numbers(GateNumbers.of(layer.norm, dy.dtype))
    operands = factor, rows, core.T, layer.alpha, _vector(layer.decay), gate
    call("gate_backward", dy, dy, saved, *operands, g, v, q, part, v_part)
    return g, q, v, None if part is None else part.sum(0)


def core_gradient(v: Tensor, t: Tensor, layer: CurOperands) -> Tensor:
    if v.dtype != torch.float32:  # the kernel takes its float32 matrix first
        return core_gradient(t, v, layer).T.contiguous()
    M, r = v.shape
    part = v.new_empty(cdiv(M, ROWS_PER_PART), r, r)
    call("core_gradient", v, v, t, layer.alpha, part)
    return part.sum(0).to(layer.core.dtype)


def _operands(change: WeightChange) -> tuple:
    layer, _, P, R, gate, _ = change
    return layer.weight, P, R, _vector(layer.decay), _numbers(gate)


def largest_weight_change(change: WeightChange) -> Tensor:
    largest = change.P.new_zeros(1, dtype=torch.int32)
    call("effective_weight", largest, *_operands(change), None, None, 0.0, largest, True)
    return largest


def effective_weight(
    change: WeightChange, moved: Tensor | None = None, edge: float = 0.0
) -> Tensor:
    W = change.layer.weight
    out = torch.empty(W.shape, dtype=W.dtype, device=W.device)
    call("effective_weight", out, *_operands(change), out, moved, edge, change.largest, False)
    return out


def _groups(K: int, blocks: int) -> int:
    """Enough groups of columns of W for ``blocks`` of its rows to fill a large chip, no more: each
    has a result of its own."""
    return min(cdiv(K, COLUMNS_OF_W), cdiv(256, blocks))


def decode(x: Tensor, change: WeightChange) -> Tensor:
    layer = change.layer
    N, K = layer.weight.shape
    part = x.new_empty(_groups(K, cdiv(N, 64)), x.shape[0], N, dtype=torch.float32)
    call("decode", x, x, *_operands(change), change.largest, part)
    y = part.sum(0)
    for vector in (layer.bias, layer.adapter_bias):
        y = y if vector is None else y.add_(vector)
    return y.to(x.dtype)


def weight_core_gradient(dy: Tensor, x: Tensor, change: WeightChange) -> Tensor:
    N, K = dy.shape[1], x.shape[1]
    rows_of_w = 64 if dy.dtype == torch.float32 else 128
    groups = _groups(K, cdiv(N, rows_of_w))
    q = dy.new_zeros(groups, *change.P.shape, dtype=torch.float32)
    call("weight_core_gradient", dy, dy, x, *_operands(change), change.largest, q)
    return q.sum(0)[:, : change.layer.r]
