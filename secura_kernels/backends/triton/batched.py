"""A batch whose rows belong to different adapters, on the kernels: ``reference.batched`` with a
detached gate, or none."""

import torch
from torch import Tensor

from ...settings import SMagNorm
from ..host import GateNumbers, contiguous, saved_for_backward
from .launch import addressable
from .passes.adapter_sums import bias_parts, core_parts, order_of, sum_of_parts
from .passes.batched_epilogue import batched_epilogue
from .passes.factors import Factor
from .passes.gate_backward import gate_backward
from .passes.own_core import own_core


def forward(
    y0: Tensor,
    t: Tensor,
    cores: Tensor,
    adapter: Tensor,
    C: Tensor,
    adapter_bias: Tensor | None,
    alpha: float,
    norm: SMagNorm | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y (M, N) and the coded gate; arguments as of ``reference.batched.forward``."""
    y0, cores, C = addressable(y0), addressable(cores), addressable(C)
    t, adapter, adapter_bias = contiguous(t, adapter, adapter_bias)
    h = own_core(t, cores, adapter, alpha, t.dtype)
    gate = None if norm is None else GateNumbers.of(norm, y0.dtype)
    inputs = (y0, h, adapter, C, adapter_bias, len(cores), gate)
    largest = None
    if norm is not None and norm.ref == "max":
        largest = y0.new_zeros(len(adapter), dtype=torch.int32)
        batched_epilogue(*inputs, largest=largest)
    y = y0.new_empty(y0.shape)
    saved, kept = saved_for_backward(y0, y0.shape[1], norm, save)
    batched_epilogue(*inputs, y=y, saved=kept, largest=largest)
    return y, saved


def backward(
    dy: Tensor,
    cores: Tensor,
    adapter: Tensor,
    C: Tensor,
    adapter_bias: Tensor | None,
    t: Tensor,
    saved: Tensor,
    alpha: float,
    norm: SMagNorm | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of y0, t, cores and adapter_bias; None where ``needs`` is False."""
    dy, cores, C = addressable(dy), addressable(cores), addressable(C)
    t, saved, adapter = contiguous(t, saved, adapter)
    low_rank = needs[1] or needs[2]
    if norm is None:
        g, scale, v = dy, 1.0, (dy @ C).float() if low_rank else None
    else:
        factor = Factor(C, None, C.stride(0), C.stride(1), C.shape[1])
        gate, scale = GateNumbers.of(norm, dy.dtype), 1 / norm.base_weight
        wanted = (needs[0] or needs[3], low_rank, False)
        g, v, _ = gate_backward(dy, saved, factor, C.shape[1], gate, decay=None, needs=wanted)
        if low_rank:
            v = v[0] if len(v) == 1 else v.sum(0)
    dt = dcores = dbias = None
    if needs[1]:
        q = own_core(v, cores.mT, adapter, alpha, dy.dtype)
        dt = q[:, : C.shape[1]].contiguous()
    if needs[2] or needs[3]:
        order, A = order_of(adapter, len(cores)), len(cores)
    if needs[2]:
        parts = core_parts(v, t, adapter, order, alpha, A)
        dcores = sum_of_parts(parts, order, len(dy), cores.new_empty(cores.shape))
    if needs[3]:
        parts = bias_parts(g, adapter, order, scale, A)
        out = adapter_bias.new_empty(adapter_bias.shape)  # type: ignore[union-attr]
        dbias = sum_of_parts(parts, order, len(dy), out)
    return g if needs[0] else None, dt, dcores, dbias
