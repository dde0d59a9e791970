"""Which form a layer runs in, by shape, and why."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ...settings import SMagNorm
from . import chips, tune_cache
from .passes.decode import MOST_TOKENS
from .passes.product import has_descriptor
from .tiles import INSTRUCTIONS, Tile, programs, rows_of

# Where nothing was tuned, taken from an H100 (benchmarks/results/nvidia-h100-80gb-hbm3): our
# product's time over the library's, less 1; the gate's exposed time in special functions an
# element; the bandwidth of *down* over a copy's.
ASSUMED_LOSS = 0.08
GATE_IN_SPECIAL = 12
DOWN_OF_COPY = 0.5


@dataclass(frozen=True)
class Plan:
    """``tile``: of the one-pass kernel; None where the library's product and an epilogue run."""

    tile: Tile | None
    reason: str

    @property
    def one_pass(self) -> bool:
        return self.tile is not None


def plan(
    M: int,
    N: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    norm: SMagNorm | None,
    *,
    input_gradient: bool = False,
    needs_down: bool = False,
    operands: tuple[Tensor, Tensor] | None = None,
) -> Plan:
    """The form of ``(M, K) x (K, N)``, the base product of a layer (or of dX without a gate): what
    was faster when tuned, else what is predicted to be.

    Args:
        input_gradient: it is dX = dY W, whose second operand is W by columns.
        needs_down: t comes from x in either form (a bias, or a stored R), not from y0.
        operands: what will be multiplied, to see whether rows lie on 16-byte boundaries.
    """
    if norm is not None and norm.ref == "max":
        return Plan(
            None,
            "library product: ref='max' needs the largest ratio of the whole matrix "
            "before any output",
        )
    found = _plan(
        M,
        N,
        K,
        r,
        dtype,
        device,
        chips.chip_of(device),
        norm is not None,
        input_gradient,
        needs_down,
    )
    if found.one_pass and operands is not None and not has_descriptor(*operands):
        return Plan(None, "library product: rows are not on 16-byte boundaries")
    return found


@tune_cache.remembered
def _plan(
    M: int,
    N: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    chip: int,
    gate: bool,
    input_gradient: bool,
    needs_down: bool,
) -> Plan:
    if dtype == torch.float32:
        return Plan(None, "library product: float32 has no tensor-core form of ours")
    name = "product_gate" if gate else "product"
    rank = chips.rank_block(r)
    candidates = rows_of(name, chip, dtype, rank)
    tuned = tuned_name(name, K, input_gradient, needs_down)
    best = tune_cache.choice(device, tuned, dtype, M, N, rank)
    if best == tune_cache.LIBRARY:
        return Plan(None, "library product: faster than one pass when tuned on this GPU")
    for tile in candidates:
        if best == asdict(tile):
            return Plan(tile, f"one pass: fastest of {len(candidates) + 1} when tuned on this GPU")
    if M <= MOST_TOKENS:
        return Plan(None, f"library product: for M <= {MOST_TOKENS} it splits K over the chip")
    enough = chips.processors(device)
    filling = [tile for tile in candidates if programs(name, tile, M, N) >= enough]
    if not filling:
        return Plan(None, f"library product: fewer tiles than the {enough} processors")
    ours, library = predict(
        M, N, K, r, chips.CHIPS[chip], gate=gate, low_rank_too=not (input_gradient or needs_down)
    )
    if library <= ours:
        return Plan(
            None,
            f"library product: {1e6 * library:.0f} us against {1e6 * ours:.0f} in "
            "one pass (predicted)",
        )
    return Plan(
        filling[0],
        f"one pass: {1e6 * ours:.0f} us against {1e6 * library:.0f} by the "
        "library's product and an epilogue (predicted)",
    )


def predict(
    M: int, N: int, K: int, r: int, chip: chips.Chip, *, gate: bool, low_rank_too: bool
) -> tuple[float, float]:
    """Seconds in one pass, and by the library's product and the epilogue over it, in 16 bits.

    One pass writes and reads y0 no more, 4 M N bytes, but multiplies slower and has the gate's
    instructions to itself; the epilogue has the longer of those and its memory. ``low_rank_too``: t
    costs a reading of x in one pass, and r columns of y0 (a sector of 32 bytes an element) after
    the library's product.
    """
    product = 2 * M * N * K / chip.flops
    ours = (1 + ASSUMED_LOSS) * product + gate * GATE_IN_SPECIAL * M * N / chip.special
    library = product + max(
        M * N * (4 + gate) / chip.bandwidth, gate * INSTRUCTIONS["epilogue"] * M * N / chip.issued
    )
    if low_rank_too:
        ours += 2 * M * K / (DOWN_OF_COPY * chip.bandwidth)
        library += 32 * M * r / chip.bandwidth
    return ours, library


def tuned_name(name: str, K: int, input_gradient: bool, needs_down: bool) -> str:
    """What a product's choice is tuned under."""
    return f"{name}{' dX' * input_gradient}{' after down' * needs_down} k{K}"
