"""The passes of csrc/, each with its outputs allocated. What they compute:
backends/triton/README.md."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..host import GateNumbers, cdiv, padded_rank, processors_of_gpu
from ..operands import CurOperands
from .library import call

# As in csrc/passes.h.
ROWS_PER_PROGRAM, BIAS_PARTS, ROWS_PER_PART = 64, 4, 256
COLUMNS_OF_W, MOST_TOKENS = 128, 64


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
    a: Tensor, factor: Tensor, core: Tensor, alpha: float, *, p_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """p = a factor (M, r) in ``p_dtype``, and q = alpha p core^T (M, padded r); core: float32."""
    p = a.new_empty(a.shape[0], core.shape[0], dtype=p_dtype)
    q = a.new_empty(a.shape[0], factor.shape[1])
    call("down", a, a, factor, core, alpha, p, q, _parts(a, core.shape[0]))
    return p, q


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
    a: Tensor, index: Tensor | None, core: Tensor, alpha: float, *, q_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """p = a[:, index] (M, r), and q = alpha p core^T (M, padded r) in ``q_dtype``."""
    M, r = a.shape[0], core.shape[0]
    p, q = a.new_empty(M, r), a.new_empty(M, padded_rank(r), dtype=q_dtype)
    call("project", a, a, index, core, alpha, p, q)
    return p, q


@dataclass(frozen=True)
class Finish:
    """What turns a base output and a change into a layer's output. ``gate``: None for no gate;
    ``saved``: (M, N), the gate's code, to be written; ``moved``: (1,) int64, raised by the count of
    gates <= ``edge``."""

    adapter_bias: Tensor | None = None
    decay: Tensor | None = None
    gate: GateNumbers | None = None
    saved: Tensor | None = None
    moved: Tensor | None = None
    edge: float = 0.0

    def arguments(self) -> tuple:
        return self.adapter_bias, self.decay, numbers(self.gate)

    def outputs(self) -> tuple:
        return self.saved, self.moved, self.edge


def numbers(gate: GateNumbers | None) -> list[float]:
    return [] if gate is None else list(vars(gate).values())


def product(
    a: Tensor, b: Tensor, h: Tensor, factor: Tensor, bias: Tensor | None, finish: Finish
) -> Tensor:
    """y (M, N) = a b^T + h factor^T + biases, gated; a: (M, K), b: (N, K), any strides."""
    y = a.new_empty(a.shape[0], b.shape[0])
    call("product", a, a, b, h, factor, bias, *finish.arguments(), y, *finish.outputs())
    return y


def epilogue(
    y: Tensor,
    h: Tensor,
    factor: Tensor,
    finish: Finish,
    largest: Tensor | None = None,
    find_largest: bool = False,
) -> None:
    """Turns y (M, N), the base output, into the layer's; ``find_largest`` only raises ``largest``,
    (1,) int32, the bits of max(rho)."""
    call("epilogue", y, y, h, factor, *finish.arguments(), *finish.outputs(), largest, find_largest)


@dataclass(frozen=True)
class GateGradients:
    """``g``: G' (M, N) with dT already in it, or db where R is stored and ``q``, dT (M, padded r),
    is still to be added as dT R; None where no dX was asked for. ``v``: (M, r) float32."""

    g: Tensor | None
    q: Tensor | None
    v: Tensor | None
    dadapter_bias: Tensor | None


def gate_backward(
    dy: Tensor,
    saved: Tensor,
    factor: Tensor,
    rows: Tensor | None,
    core: Tensor,
    alpha: float,
    gate: GateNumbers,
    *,
    decay: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> GateGradients:
    """Args:
    dy: (M, N), any strides. saved: (M, N), what the forward pass saved. factor: C.
    rows: (r,) where R is W[rows]; None where it is stored. needs: of x, core, adapter_bias.
    """
    (M, N), r = dy.shape, core.shape[0]
    programs = cdiv(M, ROWS_PER_PROGRAM)
    wide = dict(dtype=torch.float32)
    g = torch.empty_like(saved, dtype=dy.dtype) if needs[0] else None
    v = dy.new_empty(M, r, **wide) if needs[0] or needs[1] else None
    q = dy.new_empty(M, factor.shape[1]) if needs[0] and rows is None else None
    part = dy.new_empty(BIAS_PARTS * programs, N, **wide) if needs[2] else None
    v_part = None if v is None else _parts(dy, r)
    layer = (factor, rows, core.T, alpha, decay, numbers(gate))
    call("gate_backward", dy, dy, saved, *layer, g, v, q, part, v_part)
    return GateGradients(g, q, v, None if part is None else part.sum(0))


def core_gradient(v: Tensor, t: Tensor, alpha: float) -> Tensor:
    """alpha v^T t (r, r) float32; v: (M, r) float32, any strides."""
    M, r = v.shape
    part = v.new_empty(cdiv(M, ROWS_PER_PART), r, r)
    call("core_gradient", v, v, t, alpha, part)
    return part.sum(0)


@dataclass(frozen=True)
class WeightChange:
    """W (N, K), any strides; P = alpha C core (N, padded r) float32 and R (K, padded r), so that
    delta_W = P R; ``decay``: (N,) float32."""

    weight: Tensor
    P: Tensor
    factor: Tensor
    decay: Tensor | None
    gate: GateNumbers

    def arguments(self) -> tuple:
        return self.weight, self.P, self.factor, self.decay, numbers(self.gate)


def effective_weight(
    change: WeightChange, largest: Tensor | None, moved: Tensor | None = None, edge: float = 0.0
) -> Tensor:
    """W_eff (N, K), contiguous, in W's dtype."""
    out = torch.empty(change.weight.shape, dtype=change.weight.dtype, device=change.weight.device)
    call("effective_weight", out, *change.arguments(), out, moved, edge, largest, False)
    return out


def largest_weight_change(change: WeightChange) -> Tensor:
    """(1,) int32: the bits of max(rho)."""
    largest = change.weight.new_zeros(1, dtype=torch.int32)
    call("effective_weight", largest, *change.arguments(), None, None, 0.0, largest, True)
    return largest


def _groups(K: int, blocks: int) -> int:
    """Enough groups of columns of W for ``blocks`` of its rows to fill a large chip, no more: each
    has a result of its own."""
    return min(cdiv(K, COLUMNS_OF_W), cdiv(256, blocks))


def decode(x: Tensor, change: WeightChange, largest: Tensor | None) -> Tensor:
    """x W_eff^T (M, N) in float32; x: (M, K), M <= MOST_TOKENS, any strides."""
    N, K = change.weight.shape
    part = x.new_empty(_groups(K, cdiv(N, 64)), x.shape[0], N, dtype=torch.float32)
    call("decode", x, x, *change.arguments(), largest, part)
    return part.sum(0)


def weight_core_gradient(
    dy: Tensor, x: Tensor, change: WeightChange, largest: Tensor | None
) -> Tensor:
    """Q (N, r'), so that d_core = alpha C^T Q."""
    N, K = dy.shape[1], x.shape[1]
    rows_of_w = 64 if dy.dtype == torch.float32 else 128
    groups = _groups(K, cdiv(N, rows_of_w))
    q = dy.new_zeros(groups, *change.P.shape, dtype=torch.float32)
    call("weight_core_gradient", dy, dy, x, *change.arguments(), largest, q)
    return q.sum(0)
