"""What a backend of kernels is to the schedule: its passes, and what goes into and out of them.

What each pass computes, reads and writes is in triton/README.md.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .host import GateNumbers
from .operands import CurOperands


class Finish(NamedTuple):
    """What turns a base output and a change into a layer's output.

    Attributes:
        adapter_bias, decay: (N,). gate: None for no gate. saved: (M, N), the gate's code, to be
            written. moved: (1,) int64, raised by the count of gates <= ``edge``.
        largest: (1,) int32, zero, for the bits of max(rho), where ``ref`` is "max".
    """

    adapter_bias: Tensor | None = None
    decay: Tensor | None = None
    gate: GateNumbers | None = None
    saved: Tensor | None = None
    moved: Tensor | None = None
    edge: float = 0.0
    largest: Tensor | None = None


SUM = Finish()  # base and change are added, no more


class Gradients(NamedTuple):
    """``g``: G' (M, N) with dT already in it, or db where R is stored and ``q``, dT (M, padded r),
    is still to be added as dT R; without a gate dY itself, and q is there whatever R is.
    ``dadapter_bias``: float32. None for what was not asked for."""

    g: Tensor | None
    q: Tensor | None
    dcore: Tensor | None
    dadapter_bias: Tensor | None


class WeightChange(NamedTuple):
    """C (N, r); P = alpha C core (N, padded r) float32 and R, so that delta_W = P R; ``largest``:
    (1,) int32, the bits of max(rho), where ``ref`` is "max"."""

    layer: CurOperands
    C: Tensor
    P: Tensor
    R: Any
    gate: GateNumbers
    largest: Tensor | None = None


class Passes(Protocol):
    """A module of a backend. Vectors are contiguous, matrices of any strides unless said otherwise.

    A factor is C (N, r) or R as (K, r), in the form in which the backend's passes take it.
    """

    MOST_TOKENS: int  # of *decode*

    def addressable(self, matrix: Tensor) -> Tensor:
        """The matrix, or a copy where its strides are too long for the kernels."""

    def plan(self, x: Tensor, layer: CurOperands) -> Any:
        """What *product* needs to know to make a layer's output in one pass; false where the
        library's product and *epilogue* are taken."""

    def plan_input_gradient(self, dy: Tensor, layer: CurOperands) -> Any:
        """The same of dX = dY W + dT R, without a gate."""

    def columns(self, layer: CurOperands) -> Any:
        """C."""

    def rows(self, layer: CurOperands) -> Any:
        """R."""

    def down(
        self,
        a: Tensor,
        factor: Any,
        core: Tensor,
        alpha: float,
        *,
        p_dtype: torch.dtype,
        transpose_core: bool = False,
        task_gate: Tensor | None = None,
        t: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """p = a factor (M, r) in ``p_dtype``, and q = alpha p core^T (M, padded r) in a's dtype;
        ``transpose_core``: alpha p core.

        With ``task_gate`` (r, 2) q is multiplied by the openness of p. With ``t`` (M, r) of the
        forward pass too, contiguous, p is multiplied by the openness of t, and q is the gradient of
        t, by ``reference/task_gate.py``.
        """

    def project(
        self,
        a: Tensor,
        index: Tensor | None,
        core: Tensor,
        alpha: float,
        *,
        q_dtype: torch.dtype,
        transpose_core: bool = False,
        task_gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """p = a[:, index] (M, r), and q = alpha p core^T (M, padded r) in ``q_dtype``, times the
        openness of p."""

    def product(
        self,
        a: Tensor,
        b: Tensor,
        h: Tensor,
        factor: Any,
        plan: Any,
        bias: Tensor | None = None,
        finish: Finish = SUM,
    ) -> Tensor:
        """y (M, N) = a b^T + h factor^T + biases, gated where there is a gate, whose ``ref`` is not
        "max"; a: (M, K), b: (N, K), h: (M, padded r)."""

    def epilogue(self, y: Tensor, h: Tensor, factor: Any, finish: Finish = SUM) -> None:
        """Turns y (M, N), contiguous, the base output, into the layer's."""

    def gate_gradients(
        self,
        dy: Tensor,
        layer: CurOperands,
        t: Tensor,
        saved: Tensor,
        needs: tuple[bool, bool, bool],
    ) -> Gradients:
        """*Gate backward* and *core gradient*, of which one or the other forms dT.

        Args:
            t: (M, r) and saved: (M, N), contiguous. needs: of x, core, adapter_bias.
        """

    def core_gradient(self, v: Tensor, t: Tensor, layer: CurOperands) -> Tensor:
        """alpha v^T t (r, r) in core's dtype. v, t: (M, r), rows contiguous; one in float32, the
        other in that or in the layer's dtype."""

    def largest_weight_change(self, change: WeightChange) -> Tensor:
        """(1,) int32: the bits of max(rho)."""

    def effective_weight(
        self, change: WeightChange, moved: Tensor | None = None, edge: float = 0.0
    ) -> Tensor:
        """W_eff (N, K), contiguous, in W's dtype; ``moved``, ``edge``: as of ``Finish``."""

    def decode(self, x: Tensor, change: WeightChange) -> Tensor:
        """y (M, N) = x W_eff^T + biases; x: (M, K), M <= MOST_TOKENS."""

    def weight_core_gradient(self, dy: Tensor, x: Tensor, change: WeightChange) -> Tensor:
        """Q (N, r) float32, so that d_core = alpha C^T Q."""
