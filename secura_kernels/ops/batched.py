"""``secura::cur_batched_fwd`` and ``secura::cur_batched_bwd``: the change of a batch whose rows
belong to different adapters."""

import torch

from ..backends.gate_code import saved_dtype
from ..backends.reference import batched as reference
from .epilogue import bwd_flops, computed_gradients, fake_likes, fwd_flops
from .registry import backend, call, empty_if_none, register, resolve, unpack_norm


def _module(impl, like, r, norm):
    """The passes of csrc/ know one core for all rows. Made of them this would move y0 four times,
    so there the plain formula runs on the GPU."""
    if resolve(impl, like.device, like.dtype, r, norm) == "cuda":
        impl = "reference"
    return backend(impl, "batched", like, r, norm)


def _fwd(y0, t, cores, adapter, C, adapter_bias, alpha, norm, detach_gate, save, impl):
    gate = unpack_norm(norm, "output", detach_gate)
    return _module(impl, y0, cores.shape[1], gate).forward(
        y0, t, cores, adapter, C, adapter_bias, alpha, gate, save and detach_gate
    )


def _fwd_fake(y0, t, cores, adapter, C, adapter_bias, alpha, norm, detach_gate, save, impl):
    if not norm:
        return y0.new_empty(y0.shape), y0.new_empty(0)
    kept = y0.shape if save and detach_gate else (0,)
    return y0.new_empty(y0.shape), y0.new_empty(kept, dtype=saved_dtype(y0.dtype))


def _bwd(dy, cores, adapter, C, adapter_bias, t, saved, alpha, norm, detach_gate, needs, impl):
    gate = unpack_norm(norm, "output", detach_gate)
    gradients = _module(impl, dy, cores.shape[1], gate).backward(
        dy, cores, adapter, C, adapter_bias, t, saved, alpha, gate, needs
    )
    # Elementwise results take the strides of dy.
    return empty_if_none(tuple(g if g is None else g.contiguous() for g in gradients), dy)


def _bwd_fake(dy, cores, adapter, C, adapter_bias, t, saved, alpha, norm, detach_gate, needs, impl):
    return fake_likes((dy, t, cores, adapter_bias), needs)


cur_batched_fwd = register(
    """cur_batched_fwd(Tensor y0, Tensor t, Tensor cores, Tensor adapter, Tensor C,
    Tensor? adapter_bias, float alpha, float[] norm, bool detach_gate, bool save, str impl)
    -> (Tensor y, Tensor saved)""",
    _fwd,
    _fwd_fake,
    fwd_flops,
)
cur_batched_bwd = register(
    """cur_batched_bwd(Tensor dy, Tensor cores, Tensor adapter, Tensor C, Tensor? adapter_bias,
    Tensor t, Tensor saved, float alpha, float[] norm, bool detach_gate, bool[4] needs, str impl)
    -> (Tensor dy0, Tensor dt, Tensor dcores, Tensor dadapter_bias)""",
    _bwd,
    _bwd_fake,
    bwd_flops,
)


class CurBatched(torch.autograd.Function):
    """Gradients of y0, t, cores and adapter_bias; C and adapter are constants.

    Saved: t, and the coded gate; y0 itself where the gate is not detached.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y0, t, cores, adapter, C, adapter_bias, alpha, norm, detach_gate, impl):
        return call(
            cur_batched_fwd,
            y0,
            t,
            cores,
            adapter,
            C,
            adapter_bias,
            alpha,
            norm,
            detach_gate,
            True,
            impl,
        )

    @staticmethod
    def alone(y0, *arguments):
        *operands, impl = arguments
        return call(cur_batched_fwd, y0, *operands, False, impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        y0, t, cores, adapter, C, adapter_bias, *settings = inputs
        _, saved = output
        ctx.alpha, ctx.norm, ctx.detach_gate, ctx.impl = settings
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cores, adapter, C, adapter_bias, t, saved if ctx.detach_gate else y0)

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 10
        wanted = ctx.needs_input_grad
        needs = (wanted[0], wanted[1], wanted[2], wanted[5])
        if torch.is_grad_enabled():  # to be differentiated again
            norm = unpack_norm(ctx.norm, "output", ctx.detach_gate)
            found = reference.backward(dy, *ctx.saved_tensors, ctx.alpha, norm, needs)
        else:
            found = computed_gradients(cur_batched_bwd, ctx, dy, needs)
        dy0, dt, dcores, dbias = found
        return (dy0, dt, dcores, None, None, dbias, *[None] * 4)
