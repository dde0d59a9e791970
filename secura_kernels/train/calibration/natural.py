"""The natural basis: the directions that learn a task most for each nat of general change.

With A_x A_x^T = (Sigma + lambda_x I)^-1, A_g A_g^T = (Gamma + lambda_g I)^-1 and the task's mean
gradient G = E[g x^T], the singular vectors of A_g^T G A_x = P S Q^T give C = A_g P_r and
R = Q_r^T A_x^T (which of the roots A is taken makes no difference). G is never formed: a randomised
range finder (Halko, Martinsson and Tropp, arXiv 0909.4061) takes products with it from passes over
the task's batches.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...bases import orthonormal_basis
from ...nn.adapter import Adapter
from .metric import InverseRoot, Moment, random_test_matrix

OVERSAMPLING = 32  # directions more than r that the range finder takes


class Moments:
    """Sigma = E[x x^T] and Gamma = E[g g^T] of one layer."""

    def __init__(
        self, adapter: Adapter, rank: int, seed: int, tests: dict[tuple[int, int], Tensor]
    ) -> None:
        """tests: of all layers, which share those of a size."""

        def moment(size: int, side: int) -> Moment:
            if (size, side) not in tests:
                tests[size, side] = random_test_matrix(
                    size, rank, adapter.cols.device, 2 * seed + side
                )
            return Moment(tests[size, side])

        self.x, self.g = moment(adapter.in_features, 0), moment(adapter.out_features, 1)

    @property
    def sums(self) -> list[Tensor]:
        return [*self.x.sums, *self.g.sums]

    @property
    def tokens(self) -> Tensor:
        return self.x.tokens

    def keep(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None

    def add(self, x: Tensor, _: None, g: Tensor) -> None:
        self.x.add(x)
        self.g.add(g)

    def finite(self) -> bool:
        return self.x.finite() and self.g.finite()

    def reached(self) -> bool:
        return bool(self.x.diagonal.any() and self.g.diagonal.any())

    def joined(self, other: "Moments", weight: float) -> "Moments":
        out = object.__new__(Moments)
        out.x, out.g = self.x.joined(other.x, weight), self.g.joined(other.g, weight)
        return out


class GradientTimes:
    """G right (N, q), summed over tokens."""

    def __init__(self, right: Tensor, N: int) -> None:
        self.right = right.float()
        self.product = self.right.new_zeros(N, right.shape[1])

    @property
    def sums(self) -> list[Tensor]:
        return [self.product]

    def keep(self, x: Tensor) -> tuple[Tensor, None]:
        return x.float() @ self.right, None

    def add(self, kept: Tensor, _: None, g: Tensor) -> None:
        self.product.addmm_(g.float().T, kept)


class TimesGradient:
    """left^T G (q, K), summed over tokens."""

    def __init__(self, left: Tensor, K: int) -> None:
        self.left = left.float()
        self.product = self.left.new_zeros(left.shape[1], K)

    @property
    def sums(self) -> list[Tensor]:
        return [self.product]

    def keep(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None

    def add(self, x: Tensor, _: None, g: Tensor) -> None:
        self.product.addmm_((g.float() @ self.left).T, x.float())


Sides = tuple[Tensor, Tensor, float]
Run = Callable[[dict[str, object]], None]


def natural_sides(
    layers: dict[str, tuple[nn.Module, Adapter]],
    moments: dict[str, Moments],
    damping: float,
    run: Run,
    seed: int,
) -> dict[str, Sides | None]:
    """C (N, r), R (r, K) of each layer, float64, and what to multiply their product with so that a
    core changes W by as much as between orthonormal bases. None for a layer that the task does not
    reach. ValueError where the task's gradients are not finite.

    Args:
        run: a pass of the task's batches, which fills the collectors that it is given.
    """
    roots = {
        name: tuple(m.inverse_root(damping) for m in (moments[name].x, moments[name].g))
        for name in layers
    }
    times = {}
    for name, (_, adapter) in layers.items():
        q = min(adapter.r + OVERSAMPLING, adapter.in_features, adapter.out_features)
        wide = random_test_matrix(adapter.in_features, q, adapter.cols.device, seed)
        times[name] = GradientTimes(roots[name][0] @ wide, adapter.out_features)
    run(times)
    _check_finite(times)
    tall = {
        name: torch.linalg.qr(roots[name][1].transposed(times[name].product)).Q for name in layers
    }
    found = {
        name: TimesGradient(roots[name][1] @ tall[name], adapter.in_features)
        for name, (_, adapter) in layers.items()
    }
    run(found)
    _check_finite(found)
    return {
        name: _sides(adapter.r, *roots[name], tall[name], found[name].product)
        for name, (_, adapter) in layers.items()
    }


def sides_without_metric(module: nn.Module, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Orthonormal C and R of the layer's columns and rows, where nothing is known of it."""
    weight = module.base_matrix().detach()
    C, _, R, _ = orthonormal_basis(weight[:, adapter.cols], weight[adapter.rows])
    return C, R.T


def _check_finite(products: dict[str, GradientTimes | TimesGradient]) -> None:
    for name, each in products.items():
        if not each.product.isfinite().all():
            raise ValueError(
                f"layer {name!r}: its inputs or gradients on the task's batches are not finite"
            )


def _sides(
    r: int, root_x: InverseRoot, root_g: InverseRoot, tall: Tensor, product: Tensor
) -> Sides | None:
    """Of Q = ``tall`` (N, q), orthonormal, and ``product`` (q, K) = (A_g Q)^T G."""
    if not product.any():
        return None
    P, _, Qt = torch.linalg.svd(root_x.transposed(product.T).T, full_matrices=False)
    C, R = root_g @ (tall @ P[:, :r]), (root_x @ Qt[:r].T).T
    return C, R, r / float(C.norm() * R.norm())
