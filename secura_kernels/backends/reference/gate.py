"""S-MagNorm element by element: the gate, its derivative, and the code it is saved in.

Notation of ``settings.py``; ``s = 1 / g``. A per-channel importance-decay factor ``c`` (1 where
nothing decays) multiplies the *updated* value before the division [SECURA code]::

    out = ((beta - 1) * b + c * (b + d)) * s     = (beta * b + d) * s   where c = 1

Everything is computed in float32, in float64 where the inputs are.
"""

import torch
from torch import Tensor

from ...settings import SMagNorm
from ..gate_code import code_range, highest_gate, saved_dtype


def relative_magnitude(b: Tensor, d: Tensor, eps: float) -> Tensor:
    """rho = |d| / (|b| + eps). (Published: |d / (b + eps)|, which divides by 0 at b = -eps.)"""
    return (d / b.abs().add_(eps)).abs_()


def minus_z(b: Tensor, d: Tensor, norm: SMagNorm, largest: Tensor | None) -> Tensor:
    """-z = scale (shift - rho / ref); ``largest``: scalar, max(rho), where ``ref`` is "max"."""
    rho = relative_magnitude(b, d, norm.eps)
    if norm.ref == "max":
        rho = rho / torch.where(largest > 0, largest, 1)  # all of d may be zero
        return rho.mul_(-norm.scale).add_(norm.scale * norm.shift)
    return rho.mul_(-norm.scale / norm.ref).add_(norm.scale * norm.shift)


def inverse_gate(b: Tensor, d: Tensor, norm: SMagNorm, largest: Tensor | None) -> Tensor:
    """s = 1 / g = 1 / (1 + sigmoid(-z)), and s = 1 / beta where d == 0, where ``out`` is then b.

    Args:
        b, d: base and change, same shape.
        largest: scalar tensor, max(rho) of the whole matrix; used where ``norm.ref == "max"``.
    """
    # In place, as fresh matrices cost more than the arithmetic; sigmoid's result autograd needs.
    q = minus_z(b, d, norm, largest).sigmoid_()
    s = (q + 1 if torch.is_grad_enabled() else q.add_(1)).reciprocal_()
    if norm.continuous:
        return s  # 1 / beta at d == 0 by itself
    return torch.where(d == 0, 1 / norm.base_weight, s)


def apply_gate(b: Tensor, d: Tensor, s: Tensor, norm: SMagNorm, decay: Tensor | None) -> Tensor:
    """out, given s. ``decay`` (c above) broadcasts against b, or is None for 1 everywhere."""
    beta = norm.base_weight
    if decay is None:
        out, unmoved = torch.add(d, b, alpha=beta).mul_(s), b
    else:
        out = ((beta - 1 + decay) * b + decay * d) * s
        unmoved = b * (1 + (decay - 1) / beta)
    # The formula gives b up to rounding where d == 0; there take b itself. d.bool() is d != 0,
    # eight times as fast.
    if torch.is_grad_enabled():  # and keep the formula's gradient: a zero change must learn
        return out + (torch.where(d.bool(), out, unmoved) - out).detach()
    return torch.where(d.bool(), out, unmoved, out=out)


def split_gradient(
    grad: Tensor, s: Tensor, norm: SMagNorm, decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of b and of d with the gate a constant: (beta - 1 + c) s grad and c s grad."""
    scaled = grad * s
    if decay is None:
        return norm.base_weight * scaled, scaled
    return (norm.base_weight - 1 + decay) * scaled, decay * scaled


def gate_gradient(
    grad: Tensor,
    b: Tensor,
    d: Tensor,
    s: Tensor,
    norm: SMagNorm,
    decay: Tensor | None,
    largest: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What the gate's own derivative adds to the gradients of b and d (``detach_gate=False``).

    From s = 1 / (2 - sigmoid(z)):  ds/dz = s^2 sigmoid(z) sigmoid(-z), and
    d rho / dd = sign(d) / (|b| + eps), d rho / db = -rho sign(b) / (|b| + eps).
    Where d == 0 the gate is taken as constant (rho has a kink there and ``out`` is b by rule).
    With ``ref="max"`` the gradient of the maximum is shared evenly among equal maxima.
    """
    negative = minus_z(b, d, norm, largest)
    slope = s.square() * negative.sigmoid() * (-negative).sigmoid()
    numerator = apply_gate(b, d, torch.ones_like(s), norm, decay)
    by_z = torch.where(d != 0, grad * numerator * slope * norm.scale, 0)
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


def encode(s: Tensor, norm: SMagNorm, dtype: torch.dtype) -> Tensor:
    """s as it is saved by a layer that computes in ``dtype``."""
    if code_range(dtype) is None:
        return s.to(dtype)
    low, high = code_range(dtype)
    top = highest_gate(norm)
    code = torch.rsub(s.reciprocal(), top).mul_((high - low) / (top - 1)).add_(low).round_()
    # NaN has no code; any will do, the output it belongs to is NaN already.
    return code.nan_to_num_(0).clamp_(low, high).to(saved_dtype(dtype))


def decode(saved: Tensor, norm: SMagNorm, dtype: torch.dtype) -> Tensor:
    """s in ``dtype``, from what ``encode`` saved."""
    if saved.is_floating_point():
        return saved.to(dtype)
    low, high = torch.iinfo(saved.dtype).min, torch.iinfo(saved.dtype).max
    top = highest_gate(norm)
    step = (top - 1) / (high - low)
    return torch.rsub(saved.to(dtype).sub_(low), top, alpha=step).reciprocal_()
