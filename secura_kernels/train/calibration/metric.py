"""The metric of what is to be kept, for whole layers: second moments that need no K x K matrix.

A moment E[z z^T] of vectors z (size,) is kept as its diagonal and a Nystrom approximation of rank
``rank`` (Halko, Martinsson and Tropp, arXiv 0909.4061, section 5.4), from sums over tokens alone:
with the mean's, size (rank + 2) numbers. At rank = size it is exact; at rank 0 it is its diagonal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = 1e-6  # of the largest: what float32 sums say nothing of


class Moment:
    """Sums of one kind of vectors over tokens, in float32.

    Args:
        test: (size, rank), the same for all that are to be joined; see ``random_test_matrix``.
    """

    def __init__(self, test: Tensor) -> None:
        self.test = test
        self.diagonal = test.new_zeros(len(test))
        self.product = torch.zeros_like(test)
        self.total = test.new_zeros(len(test))
        self.tokens = test.new_zeros((), dtype=torch.float64)

    @property
    def sums(self) -> list[Tensor]:
        """What several processes add up."""
        return [self.diagonal, self.product, self.total, self.tokens]

    def add(self, z: Tensor) -> None:
        """z: (tokens, size), any dtype."""
        z = z.to(self.test.dtype)
        self.diagonal += z.square().sum(0)
        self.product.addmm_(z.T, z @ self.test)
        self.total += z.sum(0)
        self.tokens += len(z)

    def finite(self) -> bool:
        return bool(self.diagonal.isfinite().all() and self.product.isfinite().all())

    def joined(self, other: "Moment", weight: float) -> "Moment":
        """The mean of both moments, ``weight`` times as much of ``other``; as of one token."""
        out = Moment(self.test)
        for name in ("diagonal", "product", "total"):
            own, more = (getattr(m, name) / m.tokens.to(m.diagonal.dtype) for m in (self, other))
            setattr(out, name, (own + weight * more) / (1 + weight))
        out.tokens += 1
        return out

    def mean(self) -> Tensor:
        """E[z] (size,), float64."""
        return self.total.double() / self.tokens

    def between(self, R: Tensor) -> Tensor:
        """R E[z z^T] R^T (n, n), float64, for R (n, size)."""
        left, low_rank = self._parts()
        projected = R @ low_rank
        return (R * left) @ R.T + projected @ projected.T

    def inverse_root(self, damping: float) -> "InverseRoot":
        """A with A A^T = (moment + lambda I)^-1; lambda is ``damping`` of the mean diagonal."""
        left, low_rank = self._parts()
        diagonal = self.diagonal.double() / self.tokens
        scale = (left + damping * diagonal.mean()).rsqrt()
        low_rank *= scale[:, None]
        # (I + F F^T)^(-1/2) = I + V ((1 + s^2)^(-1/2) - 1) V^T, with V and s of F's SVD.
        values, vectors = torch.linalg.eigh(low_rank.T @ low_rank)
        known = values > torch.finfo(values.dtype).eps * len(scale)
        values, vectors = values[known], vectors[:, known]
        return InverseRoot(
            scale, (low_rank @ (vectors * values.rsqrt())).float(), (1 + values).rsqrt() - 1
        )

    def _parts(self) -> tuple[Tensor, Tensor]:
        """d (size,) and F (size, k), float64: the moment is diag(d) + F F^T."""
        diagonal, product, test = (
            part.double() for part in (self.diagonal, self.product, self.test)
        )
        diagonal, product = diagonal / self.tokens, product / self.tokens
        small = test.T @ product
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        known = values > NOISE * values.amax() if len(values) else values > 0
        low_rank = product @ (vectors[:, known] * values[known].rsqrt())
        return (diagonal - low_rank.square().sum(1)).clamp_min(0), low_rank


@dataclass(frozen=True)
class InverseRoot:
    """A = D (I + V diag(shrink) V^T) with a diagonal D and orthonormal V.

    Attributes:
        scale: the diagonal of D, (size,), float64. vectors: V (size, k), float32, the largest part.
        shrink: (k,), float64, from -1 to 0.
    """

    scale: Tensor
    vectors: Tensor
    shrink: Tensor

    def __matmul__(self, X: Tensor) -> Tensor:
        """A X (size, n)."""
        return self.scale[:, None] * self._shrunk(X.double())

    def transposed(self, X: Tensor) -> Tensor:
        """A^T X (size, n)."""
        return self._shrunk(self.scale[:, None] * X.double())

    def _shrunk(self, X: Tensor) -> Tensor:
        vectors = self.vectors.double()
        return X + vectors @ (self.shrink[:, None] * (vectors.T @ X))


def random_test_matrix(size: int, rank: int, device: torch.device, seed: int) -> Tensor:
    """(size, rank) float32 that a moment is multiplied with: Gaussian; the unit matrix at full
    rank."""
    if rank >= size:
        return torch.eye(size, device=device)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, rank, generator=generator).to(device)
