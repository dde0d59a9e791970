"""The coordinates that the core lives in, between C = W[:, cols] and R = W[rows, :].

- ``"raw"``: C and R themselves, as published.
- ``"orthonormal"``: orthonormal bases of the same columns and rows.
- ``"whitened"``: C and R measured by what is to be kept: a core of unit norm changes the base
  model's predictions on general text by about the same, in whatever direction. It needs
  ``calibrate``.
- ``"natural"``: C and R of their own, in the same metric: the directions in which a task is learned
  most for each nat of general change. It needs ``calibrate`` with batches of the task.
- ``"svd"``: C and R from W's leading singular directions, as LoRA-XS has them (arXiv 2405.17604).

The first three are C A and B R with r x r factors A, B ("folds"), which are multiplied into the
core: C and R stay exact slices of W. Those of the last two are stored.

One learning rate serves all but ``"raw"``: C and R are scaled so that ||C||_F ||R||_F = r, as of
orthonormal ones. A core of random direction and given norm then changes W by as much.
"""

import torch
from torch import Tensor

BASES = ("raw", "orthonormal", "whitened", "natural", "svd")
# min(N, K) up to which the SVD is exact. One CPU thread takes 0.1 s for 1536 x 576 and 21 s for
# 4096 x 4096; the randomised one takes 1.9 s there, and finds 99.1 % of the energy of a matrix of
# random numbers, the worst case.
EXACT_SVD = 2048


def orthonormal_basis(C: Tensor, R: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors C = Q_c S_c and R = S_r^T Q_r^T with orthonormal Q_c, Q_r.

    The core V between the orthonormal bases is ``core = S_c^-1 V S_r^-T`` between C and R.
    The diagonals of S are made positive, so that the factors do not depend on the machine's QR.

    Args:
        C: (..., N, r). R: (..., r, K). Any floating dtype; computed in float64.

    Returns:
        Q_c (..., N, r), S_c (..., r, r), Q_r (..., K, r), S_r (..., r, r), float64; S upper
        triangular.

    Raises:
        ValueError: the columns of C or the rows of R are linearly dependent.
    """
    out = []
    for name, basis in (("columns", C), ("rows", R.mT)):
        q, s = torch.linalg.qr(basis.double())
        rank = int(torch.linalg.matrix_rank(s).min())
        if rank < s.shape[-1]:
            raise ValueError(
                f"basis='orthonormal' is not allowed: the {s.shape[-1]} chosen {name} of the "
                f"weight are linearly dependent (rank {rank}); choose others (selection, a "
                "smaller r, replace=False) or basis='raw'"
            )
        sign = torch.where(s.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(s.dtype)
        out += [q * sign[..., None, :], s * sign[..., None]]
    return tuple(out)


def orthonormal_folds(S_c: Tensor, S_r: Tensor) -> tuple[Tensor, Tensor]:
    """S_c^-1 and S_r^-T (..., r, r) of ``orthonormal_basis``'s factors: the folds of that basis."""
    unit = torch.eye(S_c.shape[-1], dtype=S_c.dtype, device=S_c.device)
    fold_c, fold_r = (torch.linalg.solve_triangular(S, unit, upper=True) for S in (S_c, S_r))
    return fold_c, fold_r.mT.contiguous()


def inverse_root(moment: Tensor, damping: float) -> Tensor:
    """(moment + lambda I)^(-1/2), symmetric, float64; lambda is ``damping`` of the mean diagonal.

    Of R Sigma R^T and C^T Gamma C it gives the whitened basis: with general inputs' second moment
    Sigma = E[x x^T] and that of the base model's own loss gradients at the outputs, Gamma =
    E[g g^T], a change delta_W moves the predictions by about tr(delta_W^T Gamma delta_W Sigma) / 2
    nats a token (the Kronecker-factored Fisher metric of K-FAC, arXiv 1503.05671). For
    delta_W = C A V B R with these two as A and B that is ||V||_F^2 / 2, but for the damping.

    Args:
        moment: (..., r, r), symmetric, positive semidefinite, not zero. damping: > 0.
    """
    moment = moment.double()
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    values = values.clamp_min(0) + damping * diagonal.mean(-1, keepdim=True)
    return (vectors * values.rsqrt()[..., None, :]) @ vectors.mT


def svd_sides(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """C = U_r Sigma_r / s and R = V_r^T of W's truncated SVD, as LoRA-XS (arXiv 2405.17604) but
    for s, the root mean square of the r singular values, by which ||C||_F = ||R||_F = sqrt(r).

    Two calls on one machine give the same bits: the randomised SVD has a seed of its own, and the
    largest element of each row of R is positive.

    Args:
        weight: W (N, K), floating point, not zero. r: 1 to min(N, K).

    Returns:
        C (N, r) and R (r, K), float64 where the SVD is exact, else float32 or W's wider dtype.
    """
    tall = weight.shape[0] >= weight.shape[1]
    short = _leading_directions(weight if tall else weight.T, r)  # (min(N, K), r)
    long = weight.to(short.dtype) @ short if tall else weight.T.to(short.dtype) @ short  # U Sigma
    sizes = torch.linalg.vector_norm(long, dim=0)  # the singular values
    mean = sizes.square().mean().sqrt()
    if tall:
        C, R = long / mean, short.T
    else:
        C, R = short * (sizes / mean), (long / sizes.clamp_min(torch.finfo(long.dtype).tiny)).T
    largest = R.gather(1, R.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(R.dtype)  # (r, 1)
    return C * sign.T, R * sign


def _leading_directions(tall: Tensor, r: int) -> Tensor:
    """The r leading right singular vectors (K, r) of W (N, K), N >= K."""
    if tall.shape[1] <= EXACT_SVD:
        wide = tall.double()
        return torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -r:].flip(1)
    wide = tall.to(torch.promote_types(tall.dtype, torch.float32))
    with torch.random.fork_rng([tall.device] if tall.is_cuda else []):  # it draws from the global
        torch.manual_seed(0)
        return torch.svd_lowrank(wide, q=min(2 * r, tall.shape[1]), niter=10)[2][:, :r]
