"""In which order the passes of a layer run, on any backend of kernels: the functions of the modules
``linear``, ``epilogue`` and ``weight`` of ``reference``, which has plain formulas of its own.

The derivation, and what each pass reads and writes, is in triton/README.md.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .host import GateNumbers, saved_for_backward
from .operands import CurOperands
from .passes import Finish, Gradients, Passes, WeightChange


@dataclass(frozen=True)
class Linear:
    """The output-domain layer."""

    passes: Passes

    def forward(
        self, x: Tensor, layer: CurOperands, edge: float, save: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, t, what the backward pass needs of the gate, and the count of gates <= ``edge``."""
        run = self.passes
        x, layer = run.addressable(x), layer.with_contiguous_vectors()
        weight, core, alpha, gate = layer.weight, layer.core, layer.alpha, layer.task_gate
        saved, moved, finish = _outputs(x, weight.shape[0], layer, edge, save)
        plan = run.plan(x, layer)
        if plan:
            t, h = run.down(x, run.rows(layer), core, alpha, p_dtype=x.dtype, task_gate=gate)
            y = run.product(x, weight, h, run.columns(layer), plan, layer.bias, finish)
            return y, t, saved, moved
        y = F.linear(x, weight, layer.bias)
        if layer.t_is_of_base:
            t, h = run.project(y, layer.rows, core, alpha, q_dtype=x.dtype, task_gate=gate)
        else:
            t, h = run.down(x, run.rows(layer), core, alpha, p_dtype=x.dtype, task_gate=gate)
        run.epilogue(y, h, run.columns(layer), finish)
        return y, t, saved, moved

    def backward(
        self,
        dy: Tensor,
        layer: CurOperands,
        t: Tensor,
        saved: Tensor,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, core and adapter_bias; None where ``needs`` is False."""
        run = self.passes
        dy, layer = run.addressable(dy), layer.with_contiguous_vectors()
        g, dT, dcore, dadapter_bias = _gradients(run, dy, layer, t, saved, needs)
        dx = None
        if needs[0] and layer.norm is None:
            plan, R = run.plan_input_gradient(dy, layer), run.rows(layer)
            if plan:
                dx = run.product(dy, layer.weight.T, dT, R, plan)
            else:
                dx = dy @ layer.weight
                run.epilogue(dx, dT, R)
        elif needs[0]:
            dx = g @ layer.weight
            if layer.R is not None:
                dx.addmm_(dT[:, : layer.r], layer.R)
        return dx, dcore, dadapter_bias


@dataclass(frozen=True)
class Epilogue:
    """The change of a base output that somebody else computes."""

    passes: Passes

    def forward(
        self, y0: Tensor, t: Tensor, layer: CurOperands, edge: float, save: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, what the backward pass needs of the gate, and the count of gates <= ``edge``."""
        run, t, layer = self.passes, t.contiguous(), layer.with_contiguous_vectors()
        saved, moved, finish = _outputs(t, y0.shape[1], layer, edge, save)
        y = y0.clone(memory_format=torch.contiguous_format)  # the epilogue works in place
        _, h = run.project(
            t, None, layer.core, layer.alpha, q_dtype=t.dtype, task_gate=layer.task_gate
        )
        run.epilogue(y, h, run.columns(layer), finish)
        return y, saved, moved

    def backward(
        self,
        dy: Tensor,
        layer: CurOperands,
        t: Tensor,
        saved: Tensor,
        needs: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of y0, t, core and adapter_bias; None where ``needs`` is False."""
        run = self.passes
        dy, layer = run.addressable(dy), layer.with_contiguous_vectors()
        g, dT, dcore, dadapter_bias = _gradients(
            run, dy, layer, t, saved, (needs[0] or needs[1], *needs[2:])
        )
        return (
            g if needs[0] else None,
            dT[:, : layer.r].contiguous() if needs[1] else None,
            dcore,
            dadapter_bias,
        )


def _outputs(
    like: Tensor, N: int, layer: CurOperands, edge: float, save: bool
) -> tuple[Tensor, Tensor, Finish]:
    """What the backward pass needs of the gate and the count, allocated; and what fills them.
    ``like``: (M, any), in the layer's dtype."""
    norm = layer.norm
    saved, keep = saved_for_backward(like, N, norm, save)
    counts = edge and norm is not None
    moved = (like.new_zeros if counts else like.new_empty)(1 if counts else 0, dtype=torch.int64)
    gate = largest = None
    if norm is not None:
        gate = GateNumbers.of(norm, like.dtype)
        largest = like.new_zeros(1, dtype=torch.int32) if norm.ref == "max" else None
    counted = moved if moved.numel() else None
    return saved, moved, Finish(layer.adapter_bias, layer.decay, gate, keep, counted, edge, largest)


def _gradients(
    run: Passes,
    dy: Tensor,
    layer: CurOperands,
    t: Tensor,
    saved: Tensor,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """From dY and the saved gate everything but dX; ``needs``: of x, core, adapter_bias."""
    t = t.contiguous()
    if layer.norm is not None:
        found = run.gate_gradients(dy, layer, t, saved.contiguous(), needs)
    else:
        dT = dcore = None
        if needs[0] or needs[1]:
            v, dT = run.down(
                dy,
                run.columns(layer),
                layer.core,
                layer.alpha,
                p_dtype=torch.float32,
                transpose_core=True,
                task_gate=layer.task_gate,
                t=None if layer.task_gate is None else t,
            )
            dcore = run.core_gradient(v, t, layer) if needs[1] else None
        found = Gradients(dy, dT, dcore, dy.sum(0, dtype=torch.float32) if needs[2] else None)
    if not needs[2]:
        return found
    return found._replace(dadapter_bias=found.dadapter_bias.to(layer.adapter_bias.dtype))


@dataclass(frozen=True)
class Weight:
    """The weight-domain layer.

    W_eff is formed in scratch memory that the caching allocator hands from layer to layer of a
    shape, and formed again in the backward pass.
    """

    passes: Passes

    def forward(self, x: Tensor, layer: CurOperands, edge: float) -> tuple[Tensor, Tensor]:
        """y (M, N) and the count of gates <= ``edge``."""
        run = self.passes
        x, layer = run.addressable(x), layer.with_contiguous_vectors()
        change = self._change(layer)
        moved = x.new_zeros(1 if edge else 0, dtype=torch.int64)
        if x.shape[0] <= run.MOST_TOKENS and not edge:
            return run.decode(x, change), moved
        effective = run.effective_weight(change, moved if edge else None, edge)
        y = F.linear(x, effective, layer.bias)
        return (y if layer.adapter_bias is None else y.add_(layer.adapter_bias)), moved

    def backward(
        self, dy: Tensor, x: Tensor, layer: CurOperands, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, core and adapter_bias; None where ``needs`` is False."""
        run = self.passes
        dy, x, layer = run.addressable(dy), run.addressable(x), layer.with_contiguous_vectors()
        dx = dcore = dbias = None
        if needs[0] or needs[1]:
            change = self._change(layer)
        if needs[0]:
            dx = dy @ run.effective_weight(change)
        if needs[1]:
            dcore = run.core_gradient(change.C, run.weight_core_gradient(dy, x, change), layer)
        if needs[2]:
            dbias = dy.sum(0, dtype=torch.float32).to(layer.adapter_bias.dtype)
        return dx, dcore, dbias

    def _change(self, layer: CurOperands) -> WeightChange:
        run = self.passes
        source = (layer.weight, layer.cols) if layer.C is None else (layer.C, None)
        C, P = run.project(
            *source, layer.core, layer.alpha, q_dtype=torch.float32, transpose_core=True
        )
        gate = GateNumbers.of(layer.norm, layer.dtype)
        change = WeightChange(layer, C, P, run.rows(layer), gate)
        if layer.norm.ref != "max":
            return change
        return change._replace(largest=run.largest_weight_change(change))
