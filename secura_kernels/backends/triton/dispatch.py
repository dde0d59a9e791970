"""Which form a layer runs in, by shape, and why."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ...settings import SMagNorm
from . import chips, tune_cache
from .passes.bulk_copies import has_descriptor
from .passes.decode import MOST_TOKENS
from .tiles import INSTRUCTIONS, Tile, programs, rows_of

# Where nothing was tuned, taken from an H100 (benchmarks/results/nvidia-h100-80gb-hbm3): the gate's
# exposed time in special functions an element; and by rank, up to HIGH_RANK and above, what *down*
# and an epilogue without a gate reach of a copy's bandwidth.
GATE_IN_SPECIAL = 12
HIGH_RANK = 64
DOWN_OF_COPY = (0.7, 0.35)
EPILOGUE_OF_COPY = (0.8, 0.45)


def assumed_loss(gate: bool, r: int, bulk: bool) -> float:
    """Our product's time over the library's, less 1, on an H100. ``bulk``: where there is no gate,
    all operands come by bulk copies (``bulk_product.py``)."""
    if gate or not bulk:
        return 0.09
    return 0.055 if r <= HIGH_RANK else 0.2


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
        M,
        N,
        K,
        r,
        chips.CHIPS[chip],
        gate=gate,
        low_rank_too=not (input_gradient or needs_down),
        bulk=candidates[0].bulk,
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
    M: int,
    N: int,
    K: int,
    r: int,
    chip: chips.Chip,
    *,
    gate: bool,
    low_rank_too: bool,
    bulk: bool,
) -> tuple[float, float]:
    """Seconds in one pass, and by the library's product and the epilogue over it, in 16 bits.

    One pass writes and reads y0 no more, 4 M N bytes, but multiplies slower and has the gate's
    instructions to itself; the epilogue has the longer of those and its memory. ``low_rank_too``: t
    costs a reading of x in one pass, and r columns of y0 (a sector of 32 bytes an element) after
    the library's product. ``bulk``: as of ``assumed_loss``.
    """
    high = r > HIGH_RANK
    product = 2 * M * N * K / chip.flops
    ours = (
        1 + assumed_loss(gate, r, bulk)
    ) * product + gate * GATE_IN_SPECIAL * M * N / chip.special
    if gate:
        epilogue = max(M * N * 5 / chip.bandwidth, INSTRUCTIONS["epilogue"] * M * N / chip.issued)
    else:
        epilogue = M * N * 4 / (EPILOGUE_OF_COPY[high] * chip.bandwidth)
    library = product + epilogue
    if low_rank_too:
        ours += 2 * M * K / (DOWN_OF_COPY[high] * chip.bandwidth)
        library += 32 * M * r / chip.bandwidth
    return ours, library


def tuned_name(name: str, K: int, input_gradient: bool, needs_down: bool) -> str:
    """What a product's choice is tuned under."""
    return f"{name}{' dX' * input_gradient}{' after down' * needs_down} k{K}"
