"""``secura::cur_weight_linear_fwd`` and ``_bwd``: S-MagNorm in the weight domain."""

import torch

from ..backends.reference import weight as reference
from .registry import backend, call, empty_if_none, fake_gradients, register, unpack_layer

_ARGUMENTS = """Tensor x, Tensor weight, {bias} Tensor core, Tensor? cols, Tensor? rows, Tensor? C,
    Tensor? R, Tensor? adapter_bias, Tensor? decay, float alpha, float[] norm, bool detach_gate"""


def _fwd(x, *arguments):
    *tensors, alpha, norm, detach_gate, edge, impl = arguments
    layer = unpack_layer(tensors, alpha, norm, "weight", detach_gate)
    return backend(impl, "weight", x, layer.r, layer.norm).forward(x, layer, edge)


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
    alpha,
    norm,
    detach_gate,
    edge,
    impl,
):
    return (
        x.new_empty(x.shape[0], weight.shape[0]),
        x.new_empty(1 if edge else 0, dtype=torch.int64),
    )


def _fwd_flops(x, weight, bias, core, *_, **__):
    """core R, C (core R), then the product with W_eff."""
    (M, K), N, r = x, weight[0], core[0]
    return 2 * r * K * (r + N) + 2 * M * N * K


def _bwd(dy, x, weight, *arguments):
    *tensors, alpha, norm, detach_gate, needs, impl = arguments
    layer = unpack_layer((weight, None, *tensors), alpha, norm, "weight", detach_gate)
    gradients = backend(impl, "weight", dy, layer.r, layer.norm).backward(dy, x, layer, needs)
    return empty_if_none(gradients, dy)


def _bwd_fake(
    dy,
    x,
    weight,
    core,
    cols,
    rows,
    C,
    R,
    adapter_bias,
    decay,
    alpha,
    norm,
    detach_gate,
    needs,
    impl,
):
    return fake_gradients(dy, weight, core, adapter_bias, needs)


def _bwd_flops(dy, x, weight, core, *args, **_):
    """W_eff once more and dy W_eff; the gate once more, dy^T x, and its contraction to (r, r)."""
    (M, N), K, r, needs = dy, weight[1], core[0], args[9]
    form = 2 * r * K * (r + N)
    return needs[0] * (form + 2 * M * N * K) + needs[1] * (
        form + 2 * M * N * K + 2 * N * r * (K + r)
    )


cur_weight_linear_fwd = register(
    f"""cur_weight_linear_fwd({_ARGUMENTS.format(bias="Tensor? bias,")}, float edge, str impl)
    -> (Tensor y, Tensor moved)""",
    _fwd,
    _fwd_fake,
    _fwd_flops,
)
cur_weight_linear_bwd = register(
    f"""cur_weight_linear_bwd(Tensor dy, {_ARGUMENTS.format(bias="")}, bool[3] needs, str impl)
    -> (Tensor dx, Tensor dcore, Tensor dadapter_bias)""",
    _bwd,
    _bwd_fake,
    _bwd_flops,
)


class CurWeightLinear(torch.autograd.Function):
    """Gradients of x, core and adapter_bias; x is saved here (dcore needs dy^T x), W_eff is not."""

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
        alpha,
        norm,
        detach_gate,
        edge,
        impl,
    ):
        return call(
            cur_weight_linear_fwd,
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
            alpha,
            norm,
            detach_gate,
            edge,
            impl,
        )

    alone = forward

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, *others = inputs[:10]
        ctx.alpha, ctx.norm, ctx.detach_gate, _, ctx.impl = inputs[10:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, *others)

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 15
        needs = tuple(ctx.needs_input_grad[i] for i in (0, 3, 8))
        if torch.is_grad_enabled():  # to be differentiated again
            x, weight, *others = ctx.saved_tensors
            layer = unpack_layer(
                (weight, None, *others), ctx.alpha, ctx.norm, "weight", ctx.detach_gate
            )
            dx, dcore, dbias = reference.backward(dy, x, layer, needs)
        else:
            gradients = call(
                cur_weight_linear_bwd,
                dy,
                *ctx.saved_tensors,
                ctx.alpha,
                ctx.norm,
                ctx.detach_gate,
                needs,
                ctx.impl,
            )
            dx, dcore, dbias = (g if n else None for g, n in zip(gradients, needs, strict=True))
        return (dx, None, None, dcore, None, None, None, None, dbias, *[None] * 6)
