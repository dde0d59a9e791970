"""The method as a reader would write it: plain differentiable PyTorch, nothing saved by hand.

The truth that every other implementation is compared with (in float64), and the "eager" rival of
the benchmarks. Symbols: W (N, K), C = W[:, cols] (N, r), R = W[rows, :] (r, K), core (r, r).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...settings import SMagNorm
from .gate import apply_gate, inverse_gate, relative_magnitude
from .task_gate import openness


def cabr_core(A: Tensor, B: Tensor) -> Tensor:
    """core = A^T B^T (..., r, r) from A (..., m, r) and B (..., r, m) [SECURA, CABR]."""
    return A.mT @ B.mT


def cabr_core_backward(dcore: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (dA, dB) of ``cabr_core``: core^T = B A, so dA = B^T dcore^T, dB = dcore^T A^T."""
    return B.mT @ dcore.mT, dcore.mT @ A.mT


def delta_weight(core: Tensor, C: Tensor, R: Tensor, alpha: float) -> Tensor:
    """delta_W = alpha C core R (N, K) [CURLoRA, section 3; SECURA, CABR]."""
    return alpha * (C @ core @ R)


def smagnorm(b: Tensor, d: Tensor, norm: SMagNorm, decay: Tensor | None = None) -> Tensor:
    """S-MagNorm of a change d to a base b, whole matrices, differentiable (see ``settings.py``)."""
    largest = None
    if norm.ref == "max":
        rho = relative_magnitude(b, d, norm.eps)
        largest = rho.amax() if rho.numel() else rho.new_zeros(())
    s = inverse_gate(b, d, norm, largest)
    return apply_gate(b, d, s.detach() if norm.detach_gate else s, norm, decay)


def cur_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    core: Tensor,
    C: Tensor,
    R: Tensor,
    *,
    alpha: float = 1.0,
    norm: SMagNorm | None = None,
    adapter_bias: Tensor | None = None,
    decay: Tensor | None = None,
    task_gate: Tensor | None = None,
) -> Tensor:
    """y (M, N) of x (M, K), in every form.

    No gate [CURLoRA]: y = y0 + delta. Gate in the output domain [SECURA code]: y = S-MagNorm(y0,
    delta). Gate in the weight domain [SECURA figure]: y = x S-MagNorm(W, delta_W)^T + biases.
    Here y0 = x W^T + bias, delta = alpha (x R^T) core^T C^T + adapter_bias; ``decay`` (N,) is the
    importance-decay factor of each output channel. With ``task_gate`` (r, 2) x R^T is multiplied
    by ``task_gate.openness``.
    """
    if norm is not None and norm.domain == "weight":
        wide = torch.promote_types(weight.dtype, torch.float32)
        change = delta_weight(core.to(wide), C.to(wide), R.to(wide), alpha)
        channel = None if decay is None else decay[:, None]
        effective = smagnorm(weight.to(wide), change, norm, channel).to(weight.dtype)
        return add(F.linear(x, effective, bias), adapter_bias)
    return cur_epilogue(
        F.linear(x, weight, bias),
        x @ R.T,
        core,
        C,
        alpha=alpha,
        norm=norm,
        adapter_bias=adapter_bias,
        decay=decay,
        task_gate=task_gate,
    )


def cur_epilogue(
    y0: Tensor,
    t: Tensor,
    core: Tensor,
    C: Tensor,
    *,
    alpha: float = 1.0,
    norm: SMagNorm | None = None,
    adapter_bias: Tensor | None = None,
    decay: Tensor | None = None,
    task_gate: Tensor | None = None,
) -> Tensor:
    """y (M, N): a base output y0 (M, N) changed, with t = x R^T (M, r); no gate, or one in the
    output domain."""
    if task_gate is not None:
        t = t * openness(t, task_gate).to(t.dtype)
    h = alpha * t @ core.to(t.dtype).T
    delta = add(h @ C.T, adapter_bias)
    if norm is None:
        return y0 + delta
    wide = torch.promote_types(y0.dtype, torch.float32)
    return smagnorm(y0.to(wide), delta.to(wide), norm, decay).to(y0.dtype)


def add(value: Tensor, vector: Tensor | None) -> Tensor:
    """value + vector in value's dtype; value itself where vector is None."""
    return value if vector is None else value + vector.to(value.dtype)
