"""The gate that opens for tokens of the task: Fisher's linear discriminant of t = R x.

Of the general text's t the mean and the covariance S_g follow from what is known of E[x] and
Sigma = E[x x^T], sums that earlier tasks have joined; of the task's, from one more pass of its
batches. With S = (S_g + S_t) / 2 and Gaussians of that covariance, the logarithm of how much
likelier the task is to give a t than the general text is w . t + c, with w = S^-1 (mean_t - mean_g)
and c = -w . (mean_t + mean_g) / 2 (Fisher 1936).
"""

import torch
from torch import Tensor

from .metric import NOISE, Moment

PRIOR = -2.0  # the log odds of the task before a token is seen
RIDGE = 0.02  # of S's mean diagonal, added to it


class Projected:
    """t = R x of the task's tokens: how many, their sum and that of t t^T, in float64."""

    def __init__(self, R: Tensor) -> None:
        self.R = R.float()
        wide = torch.zeros_like(R, dtype=torch.float64)
        self.sums = [wide.new_zeros(()), wide.new_zeros(len(R)), wide.new_zeros(len(R), len(R))]

    def keep(self, x: Tensor) -> tuple[Tensor, None]:
        return x.float() @ self.R.T, None

    def add(self, t: Tensor, _: None, g: Tensor) -> None:
        t = t.double()
        for total, more in zip(self.sums, (len(t), t.sum(0), t.T @ t), strict=True):
            total += more


def discriminant(general: Moment, task: Projected) -> Tensor:
    """(r, 2) float32: of each row of R its w, and its share of c with the prior in it."""
    R = task.R.double()
    tokens, total, squares = task.sums
    mean_g, mean_t = R @ general.mean(), total / tokens
    whole = (general.between(R) + squares / tokens) / 2
    S = whole - (torch.outer(mean_g, mean_g) + torch.outer(mean_t, mean_t)) / 2
    S.diagonal().add_(RIDGE * S.diagonal().mean() + NOISE * whole.diagonal().mean())
    w = torch.linalg.solve(S, mean_t - mean_g)
    c = PRIOR - w @ (mean_t + mean_g) / 2
    return torch.stack([w, (c / len(w)).expand(len(w))], 1).float()
