"""Which columns and rows of W the change is built from: C = W[:, cols], R = W[rows, :].

Sources: CURLoRA, arXiv 2408.14572 (inverted probabilities); the published SECURA code ("lowest").
"""

import torch
from torch import Tensor

from .checks import check_choice, check_int, fail

RULES = ("inverted", "lowest", "highest")


def select(
    weight: Tensor,
    r: int,
    rule: str = "inverted",
    *,
    replace: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses r columns and r rows of W.

    Args:
        weight: W (N, K), floating point, finite, not all zeros.
        r: how many of each, 1 to min(N, K).
        rule: ``"inverted"`` samples with probability proportional to 1 / norm squared (CURLoRA,
            section 3); ``"lowest"`` and ``"highest"`` take the r smallest or largest norms in
            order, ties by index.
        replace: ``"inverted"`` only: sample with replacement (as CURLoRA does; duplicates are
            then possible).
        generator: ``"inverted"`` only: source of the randomness, on any device. The default
            is PyTorch's CPU generator, so a seed gives the same indices on every device.

    Returns:
        cols (r,) and rows (r,), int64, on W's device.

    Raises:
        ValueError: an argument outside these; TypeError: a weight that is not floating point.
    """
    check_weight(weight)
    _check_r(r, weight)
    check_choice("selection", rule, RULES)
    if replace and rule != "inverted":
        raise fail("replace", replace, f"False with selection={rule!r}, which draws nothing")
    norms = [torch.linalg.vector_norm(weight, dim=dim, dtype=torch.float64) for dim in (0, 1)]
    if rule == "inverted":
        cols, rows = (_sample_inverted(n, r, replace, generator) for n in norms)
    else:
        cols, rows = (n.argsort(stable=True, descending=rule == "highest")[:r] for n in norms)
    return cols, rows


def select_none(
    weight: Tensor, r: int, rule: str | None = None, replace: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Indices 0 to r-1 in the place of ``select``'s, for a basis that takes no columns and rows.

    Raises:
        ValueError: a rule or ``replace``; r outside 1 to min(N, K).
    """
    for name, value in (("selection", rule), ("replace", replace)):
        if value:
            raise fail(name, value, "None with basis='svd', which takes no columns and rows of W")
    check_weight(weight)
    _check_r(r, weight)
    indices = torch.arange(r, device=weight.device)
    return indices, indices


def _check_r(r: int, weight: Tensor) -> None:
    check_int("r", r, 1, min(weight.shape), f", min(N, K) of a weight {tuple(weight.shape)}")


def _sample_inverted(norms: Tensor, r: int, replace: bool, generator) -> Tensor:
    """q_j = (1 / p_j) / sum(1 / p_i), p_j = norm_j^2 / ||W||_F^2.

    A column of zeros has p = 0: it can carry no update, and the limit of q would choose nothing
    else, so it is never drawn. (The published code adds 1e-3 to p instead; the paper does not.)
    """
    device = "cpu" if generator is None else generator.device
    p = norms.to(device).square()
    positive = p > 0
    available = int(positive.sum())
    if not replace and available < r:
        raise fail(
            "r",
            r,
            f"at most {available} here, the number of non-zero columns or rows of "
            "the weight, when sampling without replacement",
        )
    q = torch.where(positive, p[positive].min() / p, 0)  # proportional to 1 / p, within [0, 1]
    return torch.multinomial(q, r, replacement=replace, generator=generator).to(norms.device)


def check_weight(weight: Tensor) -> None:
    """W must be a finite, non-zero floating-point matrix."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        what = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(
            f"weight has dtype {what}: it must be a floating-point tensor "
            "(dequantise a quantised weight first)"
        )
    if weight.ndim != 2:
        raise fail("weight.shape", tuple(weight.shape), "two-dimensional, (N, K)")
    if not torch.isfinite(weight).all():
        raise fail("weight", "a tensor with NaN or infinite values", "finite")
    if not weight.any():
        raise fail("weight", "a tensor of zeros", "non-zero: its columns and rows carry the change")


def check_indices(argument: str, indices: Tensor, size: int) -> None:
    """``indices`` must be a non-empty int64 vector of values in [0, size)."""
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1:
        what = f"{indices.dtype} {tuple(indices.shape)}" if isinstance(indices, Tensor) else indices
        raise fail(argument, what, "an int64 tensor of shape (r,)")
    if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < size):
        raise fail(
            argument, [int(indices.min()), int(indices.max())], f"indices from 0 to {size - 1}"
        )
