"""``secura::cur_linear_fwd`` and ``secura::cur_linear_bwd``: no gate, or S-MagNorm on outputs."""

import torch
from torch import Tensor

from ..backends.gate_code import saved_dtype
from ..backends.operands import CurOperands
from ..backends.reference import linear as reference
from .registry import (
    backend,
    batched_dims,
    call,
    empty_if_none,
    fake_gradients,
    one_by_one,
    register,
    unpack_layer,
)

_PARAMETERS = """Tensor core, Tensor? cols, Tensor? rows, Tensor? C, Tensor? R,
    Tensor? adapter_bias, Tensor? decay, Tensor? task_gate"""
_SETTINGS = "float alpha, float[] norm, bool detach_gate"


def _fwd(x, *arguments):
    *tensors, task_gate, alpha, norm, detach_gate, edge, save, impl = arguments
    layer = unpack_layer(tensors, alpha, norm, "output", detach_gate, task_gate)
    return backend(impl, "linear", x, layer.r, layer.norm).forward(x, layer, edge, save)


def _fwd_fake(
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
    M, N = x.shape[0], weight.shape[0]
    y = x.new_empty(M, N)
    t = x.new_empty(M, core.shape[0])
    if not norm:
        return y, t, x.new_empty(0), x.new_empty(0, dtype=torch.int64)
    dtype = saved_dtype(x.dtype) if detach_gate else x.dtype
    saved = x.new_empty((M, N) if save else (0,), dtype=dtype)
    return y, t, saved, x.new_empty(1 if edge else 0, dtype=torch.int64)


def _fwd_flops(x, weight, bias, core, *_, **__):
    """Base product, then t, h and delta; the gate is elementwise and counts nothing."""
    (M, K), N, r = x, weight[0], core[0]
    return 2 * M * N * K + 2 * M * r * (K + r + N)


def _fwd_vmap(info, in_dims, x, *rest):
    norm, edge = rest[11], rest[13]
    whole_matrix = bool(norm) and (norm[2] == 0 or edge)  # a maximum or a count over (M, N)
    first, *others = batched_dims(in_dims, (x, *rest))
    if first is None or any(d is not None for d in others) or whole_matrix:
        return one_by_one(cur_linear_fwd, info, in_dims, x, *rest)
    batched = x.movedim(first, 0)
    outputs = cur_linear_fwd(batched.flatten(0, 1), *rest)
    shape = batched.shape[:2]
    return (
        tuple(o.unflatten(0, shape) if o.ndim == 2 else o for o in outputs),
        tuple(0 if o.ndim == 2 else None for o in outputs),
    )


def _bwd(dy, weight, *arguments):
    *tensors, task_gate, t, saved, alpha, norm, detach_gate, needs, impl = arguments
    layer = unpack_layer((weight, None, *tensors), alpha, norm, "output", detach_gate, task_gate)
    gradients = backend(impl, "linear", dy, layer.r, layer.norm).backward(
        dy, layer, t, saved, needs
    )
    return empty_if_none(gradients, dy)


def _bwd_fake(
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
    return fake_gradients(dy, weight, core, adapter_bias, needs)


def _bwd_flops(dy, weight, core, *args, **_):
    """v; then the input gradient's two products and v core; then v^T t."""
    (M, N), K, r, needs = dy, weight[1], core[0], args[12]
    total = 2 * M * N * r * (needs[0] or needs[1])
    return total + needs[0] * 2 * M * (N * K + r * (r + K)) + needs[1] * 2 * M * r * r


cur_linear_fwd = register(
    f"""cur_linear_fwd(Tensor x, Tensor weight, Tensor? bias, {_PARAMETERS}, {_SETTINGS},
    float edge, bool save, str impl) -> (Tensor y, Tensor t, Tensor saved, Tensor moved)""",
    _fwd,
    _fwd_fake,
    _fwd_flops,
    _fwd_vmap,
)
cur_linear_bwd = register(
    f"""cur_linear_bwd(Tensor dy, Tensor weight, {_PARAMETERS}, Tensor t, Tensor saved, {_SETTINGS},
    bool[3] needs, str impl) -> (Tensor dx, Tensor dcore, Tensor dadapter_bias)""",
    _bwd,
    _bwd_fake,
    _bwd_flops,
)


class CurLinear(torch.autograd.Function):
    """Gradients of x, core and adapter_bias; W, bias, C, R, decay and task_gate are constants.

    t, and the base output where the gate is not detached, are outputs rather than hidden state:
    that makes the saved tensors part of the graph, so that second derivatives are right.
    """

    generate_vmap_rule = True

    # By name: torch.compile counts the arguments.
    @staticmethod
    def forward(
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
        impl,
    ):
        return call(
            cur_linear_fwd,
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
            True,
            impl,
        )

    @staticmethod
    def alone(x, *arguments):
        *operands, impl = arguments
        return call(cur_linear_fwd, x, *operands, False, impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, weight, _, *others = inputs[:11]
        _, t, saved, moved = output
        ctx.alpha, ctx.norm, ctx.detach_gate, _, ctx.impl = inputs[11:]
        if ctx.detach_gate:
            ctx.mark_non_differentiable(saved, moved)
        else:
            ctx.mark_non_differentiable(moved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, *others, t, saved)

    @staticmethod
    def backward(ctx, dy, dt, dsaved, _):
        kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        needs = (wanted[0], wanted[3], wanted[8])
        dx = dcore = dbias = None
        if dy is not None:
            if torch.is_grad_enabled():  # to be differentiated again
                dx, dcore, dbias = reference.backward(dy, CurLinear.layer(ctx), *kept[9:], needs)
            else:
                gradients = call(
                    cur_linear_bwd, dy, *kept, ctx.alpha, ctx.norm, ctx.detach_gate, needs, ctx.impl
                )
                dx, dcore, dbias = (g if n else None for g, n in zip(gradients, needs, strict=True))
        # Only a second differentiation brings gradients of what was saved. torch.compile has none
        # and would trace products with zeros here.
        if needs[0] and not torch.compiler.is_compiling():
            if dt is not None:
                dx = _plus(dx, reference.backward_of_saved(dt, CurLinear.layer(ctx)))
            if dsaved is not None:
                dx = _plus(dx, dsaved @ kept[0])
        return (dx, None, None, dcore, None, None, None, None, dbias, *[None] * 7)

    @staticmethod
    def layer(ctx) -> CurOperands:
        weight, *others, task_gate = ctx.saved_tensors[:9]
        tensors, settings = (weight, None, *others), (ctx.alpha, ctx.norm, "output")
        return unpack_layer(tensors, *settings, ctx.detach_gate, task_gate)


def _plus(value: Tensor | None, more: Tensor) -> Tensor:
    return more if value is None else value + more
