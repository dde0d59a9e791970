"""The passes as the schedule sees them: ``backends/passes.py`` says what they are."""

from torch import Tensor

from ..host import GateNumbers, padded_rank
from ..operands import CurOperands
from ..passes import Gradients
from . import dispatch
from .launch import addressable
from .passes.core_gradient import core_gradient, t_gradient
from .passes.decode import MOST_TOKENS, decode
from .passes.down import down
from .passes.effective_weight import effective_weight, largest_weight_change
from .passes.epilogue import epilogue
from .passes.factors import columns, rows
from .passes.gate_backward import gate_backward
from .passes.product import product
from .passes.project import project
from .passes.weight_core_gradient import weight_core_gradient
from .tiles import Tile

__all__ = [
    "MOST_TOKENS",
    "addressable",
    "columns",
    "core_gradient",
    "decode",
    "down",
    "effective_weight",
    "epilogue",
    "gate_gradients",
    "largest_weight_change",
    "plan",
    "plan_input_gradient",
    "product",
    "project",
    "rows",
    "weight_core_gradient",
]


def plan(x: Tensor, layer: CurOperands) -> Tile | None:
    (M, K), N = x.shape, layer.weight.shape[0]
    return dispatch.plan(
        M,
        N,
        K,
        layer.r,
        x.dtype,
        x.device,
        layer.norm,
        needs_down=not layer.t_is_of_base,
        operands=(x, layer.weight),
    ).tile


def plan_input_gradient(dy: Tensor, layer: CurOperands) -> Tile | None:
    (M, N), W = dy.shape, layer.weight
    K, r = W.shape[1], layer.r
    return dispatch.plan(
        M, K, N, r, dy.dtype, dy.device, None, input_gradient=True, operands=(dy, W.T)
    ).tile


def gate_gradients(
    dy: Tensor, layer: CurOperands, t: Tensor, saved: Tensor, needs: tuple[bool, bool, bool]
) -> Gradients:
    gate = GateNumbers.of(layer.norm, dy.dtype)
    g, v, dadapter_bias = gate_backward(
        dy, saved, columns(layer), layer.r, gate, decay=layer.decay, needs=needs
    )
    into = q = dcore = None
    if g is not None and layer.tied_rows is not None:
        into = g
    elif g is not None:
        q = dy.new_empty(dy.shape[0], padded_rank(layer.r))
    if needs[1]:
        dcore = core_gradient(v, t, layer, g=into, q=q)
    elif needs[0]:
        t_gradient(v, layer, g=into, q=q)
    return Gradients(g, q, dcore, dadapter_bias)
