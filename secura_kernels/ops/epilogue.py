"""``secura::cur_epilogue_fwd`` and ``secura::cur_epilogue_bwd``: the change of a base output."""

import torch

from ..backends.gate_code import saved_dtype
from ..backends.operands import CurOperands
from ..backends.reference import epilogue as reference
from .registry import backend, call, empty_if_none, register, unpack_norm


def _layer(core, C, adapter_bias, decay, task_gate, alpha, norm, detach_gate) -> CurOperands:
    return CurOperands.of_epilogue(
        core, C, adapter_bias, decay, alpha, unpack_norm(norm, "output", detach_gate), task_gate
    )


def _fwd(
    y0, t, core, C, adapter_bias, decay, task_gate, alpha, norm, detach_gate, edge, save, impl
):
    layer = _layer(core, C, adapter_bias, decay, task_gate, alpha, norm, detach_gate)
    return backend(impl, "epilogue", y0, layer.r, layer.norm).forward(y0, t, layer, edge, save)


def _fwd_fake(
    y0, t, core, C, adapter_bias, decay, task_gate, alpha, norm, detach_gate, edge, save, impl
):
    y = y0.new_empty(y0.shape)
    if not norm:
        return y, y0.new_empty(0), y0.new_empty(0, dtype=torch.int64)
    dtype = saved_dtype(y0.dtype) if detach_gate else y0.dtype
    saved = y0.new_empty(y0.shape if save else (0,), dtype=dtype)
    return y, saved, y0.new_empty(1 if edge else 0, dtype=torch.int64)


def fwd_flops(y0, t, *_, **__):
    """h and delta; the gate is elementwise and counts nothing."""
    (M, N), r = y0, t[1]
    return 2 * M * r * (r + N)


def fake_likes(likes, needs):
    """Gradients of the shapes and dtypes of ``likes``, the first of which is dy."""
    return empty_if_none(
        tuple(
            like.new_empty(like.shape) if need else None
            for like, need in zip(likes, needs, strict=True)
        ),
        likes[0],
    )


def computed_gradients(op, ctx, dy, needs):
    """By the backward op of ``CurEpilogue`` or ``CurBatched``; None where ``needs`` is False."""
    # Without a gate the gradient of y0 is dy itself, which no op may return.
    computed = (needs[0] and bool(ctx.norm), *needs[1:])
    gradients = call(
        op, dy, *ctx.saved_tensors, ctx.alpha, ctx.norm, ctx.detach_gate, computed, ctx.impl
    )
    found = [g if n else None for g, n in zip(gradients, computed, strict=True)]
    if needs[0] and not ctx.norm:
        found[0] = dy
    return found


def _bwd(
    dy, core, C, adapter_bias, decay, task_gate, t, saved, alpha, norm, detach_gate, needs, impl
):
    layer = _layer(core, C, adapter_bias, decay, task_gate, alpha, norm, detach_gate)
    gradients = backend(impl, "epilogue", dy, layer.r, layer.norm).backward(
        dy, layer, t, saved, needs
    )
    # Elementwise results take the strides of dy.
    return empty_if_none(tuple(g if g is None else g.contiguous() for g in gradients), dy)


def _bwd_fake(
    dy, core, C, adapter_bias, decay, task_gate, t, saved, alpha, norm, detach_gate, needs, impl
):
    return fake_likes((dy, t, core, adapter_bias), needs)


def bwd_flops(dy, core, *args, **_):
    """v, then v core, then v^T t. core: (r, r), or a stack of such."""
    (M, N), r, needs = dy, core[-1], args[-2]
    return 2 * M * r * (N * (needs[1] or needs[2]) + r * needs[1] + r * needs[2])


cur_epilogue_fwd = register(
    """cur_epilogue_fwd(Tensor y0, Tensor t, Tensor core, Tensor C, Tensor? adapter_bias,
    Tensor? decay, Tensor? task_gate, float alpha, float[] norm, bool detach_gate, float edge,
    bool save, str impl) -> (Tensor y, Tensor saved, Tensor moved)""",
    _fwd,
    _fwd_fake,
    fwd_flops,
)
cur_epilogue_bwd = register(
    """cur_epilogue_bwd(Tensor dy, Tensor core, Tensor C, Tensor? adapter_bias, Tensor? decay,
    Tensor? task_gate, Tensor t, Tensor saved, float alpha, float[] norm, bool detach_gate,
    bool[4] needs, str impl) -> (Tensor dy0, Tensor dt, Tensor dcore, Tensor dadapter_bias)""",
    _bwd,
    _bwd_fake,
    bwd_flops,
)


class CurEpilogue(torch.autograd.Function):
    """Gradients of y0, t, core and adapter_bias; C, decay and task_gate are
    constants.

    Saved: t, and the coded gate; y0 itself where the gate is not detached.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        y0, t, core, C, adapter_bias, decay, task_gate, alpha, norm, detach_gate, edge, impl
    ):
        return call(
            cur_epilogue_fwd,
            y0,
            t,
            core,
            C,
            adapter_bias,
            decay,
            task_gate,
            alpha,
            norm,
            detach_gate,
            edge,
            detach_gate,  # else y0 is saved
            impl,
        )

    @staticmethod
    def alone(y0, *arguments):
        *operands, impl = arguments
        return call(cur_epilogue_fwd, y0, *operands, False, impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        y0, t, core, C, adapter_bias, decay, task_gate, *settings = inputs
        _, saved, moved = output
        ctx.alpha, ctx.norm, ctx.detach_gate, _, ctx.impl = settings
        ctx.mark_non_differentiable(saved, moved)
        ctx.set_materialize_grads(False)
        kept = saved if ctx.detach_gate else y0
        ctx.save_for_backward(core, C, adapter_bias, decay, task_gate, t, kept)

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 12
        wanted = ctx.needs_input_grad
        needs = (wanted[0], wanted[1], wanted[2], wanted[4])
        if torch.is_grad_enabled():  # to be differentiated again
            *tensors, t, saved = ctx.saved_tensors
            layer = _layer(*tensors, ctx.alpha, ctx.norm, ctx.detach_gate)
            found = reference.backward(dy, layer, t, saved, needs)
        else:
            found = computed_gradients(cur_epilogue_bwd, ctx, dy, needs)
        dy0, dt, dcore, dbias = found
        return (dy0, dt, dcore, None, dbias, *[None] * 7)
