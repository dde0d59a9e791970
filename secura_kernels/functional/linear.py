"""The public function under the layers: ``cur_linear``."""

import torch
from torch import Tensor

from ..backends import reference
from ..backends.operands import CurOperands
from ..checks import check_choice, check_number, fail
from ..ops import (
    IMPLS,
    CurLinear,
    CurLinearByTicket,
    CurWeightLinear,
    apply,
    forward_mode,
    frozen,
    pack_norm,
    prepare,
)
from ..settings import SMagNorm


def cur_linear(
    x: Tensor,
    weight: Tensor,
    core: Tensor,
    *,
    cols: Tensor | None = None,
    rows: Tensor | None = None,
    C: Tensor | None = None,
    R: Tensor | None = None,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    norm: SMagNorm | None = None,
    adapter_bias: Tensor | None = None,
    decay: Tensor | None = None,
    task_gate: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """A frozen linear layer with a CUR update: x W^T + bias, changed by alpha x (C core R)^T.

    Without ``norm``: ``y = x W^T + bias + h C^T + adapter_bias`` with ``h = alpha (x R^T) core^T``
    (CURLoRA, arXiv 2408.14572). With it, S-MagNorm gates the change (SECURA, arXiv 2502.18168),
    on outputs or on the weight as ``norm.domain`` says. delta_W is never formed.

    Args:
        x: (..., K). weight: W (N, K), frozen. bias: (N,), frozen. One floating dtype and device.
        core: (r, r), any floating dtype; float32 beside low-precision weights.
        cols, rows: (r,) int64, while C = W[:, cols] and R = W[rows, :]. Or instead
        C, R: (N, r) and (r, K), frozen, in W's dtype, once they are no longer slices of W.
        alpha: scale of the adapter path.
        adapter_bias: (N,), part of the change. decay: (N,) importance-decay factors.
        task_gate: (r, 2) float32, in front of core for the tokens of a task alone: of t = x R^T a
            token's is multiplied by sigmoid(w . t + c), w its first column, c the sum of its
            second. Frozen; not beside a norm. ``calibrate(..., gated=True)`` measures it.
        impl: ``"auto"``, ``"triton"``, ``"cuda"`` or ``"reference"``.

    Returns:
        (..., N) in x's dtype; under autocast in the autocast dtype.

    Trained through autograd: x, core, adapter_bias; second derivatives included. With a detached
    gate (the default) they treat the gate as the constant that the first ones treat it as. Under
    forward-mode transforms (``torch.func.jvp``, ``jacfwd``, ``hessian``) the plain formula runs,
    whatever ``impl`` is.
    Deterministic: two runs are bitwise equal.

    Raises:
        ValueError: shapes, dtypes, devices or names that do not fit; a W, bias, C, R, decay or
            task_gate that requires a gradient, since they are constants here; a task_gate beside
            a norm.
        RuntimeError: a named ``impl`` that cannot run here.
    """
    check_settings(alpha, norm, impl)
    layer = CurOperands(
        weight, bias, core, cols, rows, C, R, adapter_bias, decay, alpha, norm, task_gate
    )
    return cur_linear_and_moved(x, layer, impl)[0]


def cur_linear_and_moved(
    x: Tensor,
    layer: CurOperands,
    impl: str,
    edge: float = 0.0,
    ticket: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``cur_linear``, and how many values of the gate lie at or under ``edge``: (1,) int64, or
    (0,) where ``edge`` is 0. Importance decay is chosen from this count. Settings are taken as
    checked. ``ticket``: what takes the gradient of x, see ``ops/projections.py``; of a layer
    without a gate on the weight."""
    if ticket is not None:
        x = x.detach()
    prepare(x, layer.weight)
    layer = _frozen(layer)
    x, layer = _autocast(x, layer)
    _check_once(x, layer)
    norm = layer.norm
    if forward_mode():
        check_uncounted(edge)
        y = reference.cur_linear(
            x.reshape(-1, x.shape[-1]),
            layer.weight,
            layer.bias,
            layer.core,
            layer.whole_C(),
            layer.whole_R(),
            alpha=layer.alpha,
            norm=norm,
            adapter_bias=layer.adapter_bias,
            decay=layer.decay,
            task_gate=layer.task_gate,
        )
        return y.view(*x.shape[:-1], y.shape[-1]), y.new_empty(0, dtype=torch.int64)
    on_weight = norm is not None and norm.domain == "weight"
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    settings = (
        float(layer.alpha),
        pack_norm(norm),
        norm is None or norm.detach_gate,
        edge,
        impl,
    )
    if on_weight:
        y, moved = apply(CurWeightLinear, flat, *layer.tensors(), *settings)
    elif ticket is None:
        y, *_, moved = apply(CurLinear, flat, *layer.tensors(), layer.task_gate, *settings)
    else:
        layer = layer._replace(C=layer.whole_C())  # read from W once for both passes
        small = (layer.core, layer.C, layer.adapter_bias, layer.decay, layer.task_gate)
        y, *_, moved = CurLinearByTicket.apply(*ticket, *small, flat, layer.tensors(), *settings)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1]), moved


def _frozen(layer: CurOperands) -> CurOperands:
    weight, bias = frozen(layer.weight), frozen(layer.bias)
    if weight is layer.weight and bias is layer.bias:
        return layer
    return layer._replace(weight=weight, bias=bias)


def _autocast(x: Tensor, layer: CurOperands) -> tuple[Tensor, CurOperands]:
    cast, weight, bias, C, R = autocast(x, layer.weight, layer.bias, layer.C, layer.R)
    if cast is x and weight is layer.weight:
        return x, layer
    return cast, layer._replace(weight=weight, bias=bias, C=C, R=R)


def check_uncounted(edge: float) -> None:
    """Raises RuntimeError where a forward-mode derivative would have to count the gate."""
    if edge:
        raise RuntimeError(
            "forward-mode derivatives of a layer in training mode with importance "
            "decay are not possible: its count belongs to a training step; call "
            "eval() first"
        )


def check_task_gate(layer: CurOperands) -> None:
    if layer.task_gate is not None and layer.norm is not None:
        raise fail("task_gate", tuple(layer.task_gate.shape), "None beside a norm, another gate")


def check_settings(alpha: float, norm: SMagNorm | None, impl: str) -> None:
    check_choice("impl", impl, IMPLS)
    check_number("alpha", alpha, "a finite number", -torch.inf)
    if norm is not None and not isinstance(norm, SMagNorm):
        raise fail("norm", norm, "an SMagNorm or None (SMagNorm.of makes one from a name)")


def autocast(x: Tensor, *others: Tensor | None) -> tuple:
    """``F.linear``'s autocast rule, by hand: the big operands in the autocast dtype, the r x r core
    and the adapter bias as they are."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if o is None else o.to(dtype) for o in (x, *others))


_checked: set[tuple] = set()
MOST_CHECKED = 2**12


def _check_once(x: Tensor, layer: CurOperands) -> None:
    """``_check``, once for operands of which all that it reads is the same."""
    if torch.compiler.is_compiling():
        return _check(x, layer)
    seen = (
        x.shape[-1:],
        x.dtype,
        x.device,
        *[
            None if o is None else (o.shape, o.dtype, o.device, o.requires_grad)
            for o in (*layer.tensors(), layer.task_gate)
        ],
        layer.norm is None,
    )
    if seen not in _checked:
        _check(x, layer)
        if len(_checked) >= MOST_CHECKED:
            _checked.clear()
        _checked.add(seen)


def _check(x: Tensor, layer: CurOperands) -> None:
    weight, core, bias, C, R = layer.weight, layer.core, layer.bias, layer.C, layer.R
    cols, rows, adapter_bias, decay = layer.cols, layer.rows, layer.adapter_bias, layer.decay
    if weight.ndim != 2 or not weight.is_floating_point():
        raise fail("weight", f"{weight.dtype} {tuple(weight.shape)}", "floating point, (N, K)")
    N, K = weight.shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise fail("x.shape", tuple(x.shape), f"(..., {K}) for a weight {(N, K)}")
    if core.ndim != 2 or core.shape[0] != core.shape[1] or not core.is_floating_point():
        raise fail("core", f"{core.dtype} {tuple(core.shape)}", "floating point, (r, r)")
    r = core.shape[0]
    tied = cols is not None and rows is not None and C is None and R is None
    stored = C is not None and R is not None and cols is None and rows is None
    if not (tied or stored):
        given = [
            n for n, v in (("cols", cols), ("rows", rows), ("C", C), ("R", R)) if v is not None
        ]
        raise fail("cols, rows, C, R", given, "either cols and rows, or C and R")
    shapes = {
        "bias": (bias, (N,)),
        "C": (C, (N, r)),
        "R": (R, (r, K)),
        "cols": (cols, (r,)),
        "rows": (rows, (r,)),
        "adapter_bias": (adapter_bias, (N,)),
        "decay": (decay, (N,)),
        "task_gate": (layer.task_gate, (r, 2)),
    }
    check_task_gate(layer)
    for name, (value, shape) in shapes.items():
        if value is not None and tuple(value.shape) != shape:
            raise fail(f"{name}.shape", tuple(value.shape), f"{shape}")
    for name, value in (("x", x), ("bias", bias), ("C", C), ("R", R)):
        if value is not None and value.dtype != weight.dtype:
            raise fail(
                f"{name}.dtype", value.dtype, f"the weight's, {weight.dtype}, outside autocast"
            )
    for name, value in (("cols", cols), ("rows", rows)):
        if value is not None and value.dtype != torch.int64:
            raise fail(f"{name}.dtype", value.dtype, "torch.int64")
    named = {"x": x, "core": core, "weight": weight} | {n: v for n, (v, _) in shapes.items()}
    for name, value in named.items():
        if value is not None and value.device != weight.device:
            raise fail(f"{name}.device", str(value.device), f"the weight's, {weight.device}")
    for name in ("weight", "bias", "C", "R", "decay", "task_gate"):
        value = named[name]
        if value is not None and value.requires_grad:
            raise fail(f"{name}.requires_grad", True, "False: only x, core and adapter_bias train")
