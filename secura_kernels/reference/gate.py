"""S-MagNorm element by element: the gate, its derivative, and the code it is saved in.

Notation of ``smagnorm.py``; ``s = 1 / g``. A per-channel importance-decay factor ``c`` (1 where
nothing decays) multiplies the *updated* value before the division [SECURA code]::

    out = ((beta - 1) * b + c * (b + d)) * s     = (beta * b + d) * s   where c = 1

Everything is computed in float32, in float64 where the inputs are.
"""

import torch
from torch import Tensor

from ..smagnorm import SMagNorm


def relative_magnitude(b: Tensor, d: Tensor, eps: float) -> Tensor:
    """rho = |d| / (|b| + eps). (Published: |d / (b + eps)|, which divides by 0 at b = -eps.)"""
    return (d / b.abs().add_(eps)).abs_()


def inverse_gate(b: Tensor, d: Tensor, norm: SMagNorm, largest: Tensor | None) -> Tensor:
    """s = 1 / g = 1 / (1 + sigmoid(-z)), and s = 1 / beta where d == 0, where ``out`` is then b.

    Args:
        b, d: base and change, same shape.
        largest: scalar tensor, max(rho) of the whole matrix; used where ``norm.ref == "max"``.
    """
    rho = relative_magnitude(b, d, norm.eps)
    slope = norm.scale
    if norm.ref == "max":
        rho = rho / torch.where(largest > 0, largest, 1)  # all of d may be zero
    else:
        slope /= norm.ref
    # In place where autograd allows it: what sigmoid and reciprocal return, they need again.
    minus_z = torch.rsub(rho, norm.scale * norm.shift, alpha=slope)
    s = minus_z.sigmoid_().add(1).reciprocal_()
    if norm.continuous:
        return s  # 1 / beta at d == 0 by itself
    return torch.where(d == 0, 1 / norm.base_weight, s)


def apply_gate(b: Tensor, d: Tensor, s: Tensor, norm: SMagNorm, decay: Tensor | None) -> Tensor:
    """out, given s. ``decay`` (c above) broadcasts against b, or is None for 1 everywhere."""
    beta = norm.base_weight
    if decay is None:
        # d.bool() is d != 0, eight times as fast.
        return torch.where(d.bool(), torch.add(d, b, alpha=beta).mul_(s), b)
    unmoved = b * (1 + (decay - 1) / beta)  # exactly b where c = 1, without the rounding of s
    return torch.where(d == 0, unmoved, ((beta - 1 + decay) * b + decay * d) * s)


def split_gradient(grad: Tensor, s: Tensor, norm: SMagNorm,
                   decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of b and of d with the gate a constant: (beta - 1 + c) s grad and c s grad."""
    scaled = grad * s
    if decay is None:
        return norm.base_weight * scaled, scaled
    return (norm.base_weight - 1 + decay) * scaled, decay * scaled


def gate_gradient(grad: Tensor, b: Tensor, d: Tensor, s: Tensor, norm: SMagNorm,
                  decay: Tensor | None, largest: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the gate's own derivative adds to the gradients of b and d (``detach_gate=False``).

    From s = 1 / (2 - sigmoid(z)):  ds/dz = s^2 sigmoid(z) (1 - sigmoid(z)) = (2s - 1)(1 - s),
    and d rho / dd = sign(d) / (|b| + eps), d rho / db = -rho sign(b) / (|b| + eps).
    Where d == 0 the gate is taken as constant (rho has a kink there and ``out`` is b by rule).
    With ``ref="max"`` the gradient of the maximum is shared evenly among equal maxima.
    """
    moved = d != 0
    numerator = apply_gate(b, d, torch.ones_like(s), norm, decay)
    by_z = torch.where(moved, grad * numerator * (2 * s - 1) * (1 - s) * norm.scale, 0)
    rho = relative_magnitude(b, d, norm.eps)
    if norm.ref == "max":
        safe = torch.where(largest > 0, largest, 1)
        at_maximum = (rho == largest).to(rho.dtype)
        through_max = (by_z * rho).sum() / safe.square() / at_maximum.sum()
        by_rho = by_z / safe - through_max * at_maximum
    else:
        by_rho = by_z / norm.ref
    by_d = by_rho / (b.abs() + norm.eps)
    return -by_d * rho * b.sign(), by_d * d.sign()


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """What s is saved in for a layer that computes in ``dtype``.

    bfloat16: 8 bits, whose error (at most 1e-3) is under bfloat16's own near 1. Elsewhere the
    layer's dtype, so that the saved gate is never the largest error.
    """
    return torch.uint8 if dtype == torch.bfloat16 else dtype


def code_range(norm: SMagNorm) -> float:
    """Lower end of the values of s: 1 / beta where d == 0, 1 / g(0) and up elsewhere.

    A linear code over [this, 1] holds the value of an unmoved element exactly under every preset,
    so the first step's gradients have no error from the code. (255 / 256 keeps the range open
    for a gate that is 1 everywhere.)
    """
    return min(1 / norm.base_weight, 1 / norm.gate_at_zero, 255 / 256)


def encode(s: Tensor, norm: SMagNorm, dtype: torch.dtype) -> Tensor:
    """s in the dtype it is saved in (``saved_dtype(dtype)``)."""
    target = saved_dtype(dtype)
    if target != torch.uint8:
        return s.to(target)
    low = code_range(norm)
    # NaN has no code; any will do, the output it belongs to is NaN already.
    code = torch.round((s - low) * (255 / (1 - low))).nan_to_num(0).clamp(0, 255)
    return code.to(torch.uint8)


def decode(saved: Tensor, norm: SMagNorm, dtype: torch.dtype) -> Tensor:
    """s in ``dtype``, from what ``encode`` saved."""
    if saved.dtype != torch.uint8:
        return saved.to(dtype)
    low = code_range(norm)
    return low + saved.to(dtype) * ((1 - low) / 255)
