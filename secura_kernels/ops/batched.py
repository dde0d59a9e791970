"""``secura::cur_batched``: the change of a batch whose samples belong to different adapters."""

import torch

from ..backends.reference import batched as reference
from .registry import (
    LIBRARY,
    _outside_autocast,
    backend,
    batched_dims,
    forward_mode,
    register,
    resolve,
    unpack_norm,
)


def _run(y0, t, cores, adapter, C, adapter_bias, alpha, norm, detach_gate, impl):
    # The passes of csrc/ know one core and one maximum for all rows, and change every row. Made of
    # them this would move y0 four times, so there the plain formula runs on the GPU.
    if resolve(impl, y0.device, y0.dtype, cores.shape[1]) == "cuda":
        impl = "reference"
    return backend(impl, "batched", y0, cores.shape[1]).forward(
        y0, t, cores, adapter, C, adapter_bias, alpha, unpack_norm(norm, "output", True)
    )


def _fake(y0, t, cores, adapter, C, adapter_bias, alpha, norm, detach_gate, impl):
    return y0.new_empty(y0.shape)


def _flops(y0, t, *_, **__):
    """h and delta."""
    (B, S, N), r = y0, t[2]
    return 2 * B * S * r * (r + N)


def _vmap(info, in_dims, *args):
    dims = batched_dims(in_dims, args)
    return torch.stack(
        [
            cur_batched(
                *[a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)]
            )
            for i in range(info.batch_size)
        ]
    ), 0


cur_batched = register(
    """cur_batched(Tensor y0, Tensor t, Tensor cores, Tensor adapter, Tensor C,
    Tensor? adapter_bias, float alpha, float[] norm, bool detach_gate, str impl) -> Tensor""",
    _run,
    _fake,
    _flops,
    _vmap,
)


def _with_gradients(y0, t, cores, adapter, C, adapter_bias, alpha, norm, detach_gate, impl):
    """The op; where a derivative is wanted, which it has not, the reference's plain formula. For
    the dispatcher rather than for the caller, who cannot see that under ``torch.func.grad``."""
    tensors = (y0, t, cores, adapter_bias)
    if forward_mode() or (
        torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)
    ):
        return reference.forward(
            y0, t, cores, adapter, C, adapter_bias, alpha, unpack_norm(norm, "output", detach_gate)
        )
    with torch._C._AutoDispatchBelowAutograd():
        return cur_batched(y0, t, cores, adapter, C, adapter_bias, alpha, norm, detach_gate, impl)


LIBRARY.impl("cur_batched", _outside_autocast(_with_gradients), "Autograd")
