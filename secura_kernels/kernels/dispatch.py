"""Which form a layer runs in, by shape, and why."""

from dataclasses import asdict, dataclass

import torch

from ..smagnorm import SMagNorm
from . import chips, tuned
from .decode import MOST_TOKENS
from .tiles import Tile, programs, rows_of

# How much slower than the library's product ours is taken to be where nothing was measured.
ASSUMED_LOSS = 0.06


@dataclass(frozen=True)
class Plan:
    """``tile``: of the one-pass kernel; None where the library's product and an epilogue run."""

    tile: Tile | None
    reason: str

    @property
    def one_pass(self) -> bool:
        return self.tile is not None


def plan(M: int, N: int, K: int, r: int, dtype: torch.dtype, device: torch.device,
         norm: SMagNorm | None, *, input_gradient: bool = False, aligned: bool = True) -> Plan:
    """The form of ``(M, K) x (K, N)``, the base product of a layer (or of dX without a gate).

    One pass saves writing and reading the base output, 2 M N elements; the library's product is
    faster by some percent of 2 M N K operations. So one pass wins up to some K, unless measured.

    Args:
        input_gradient: it is dX = dY W, whose second operand is W by columns.
        aligned: rows of both operands lie on 16-byte boundaries.
    """
    if norm is not None and norm.ref == "max":
        return Plan(None, "library product: ref='max' needs the largest ratio of the whole matrix "
                          "before any output")
    if dtype == torch.float32:
        return Plan(None, "library product: float32 has no tensor-core form of ours")
    if not aligned:
        return Plan(None, "library product: rows are not on 16-byte boundaries")
    name, chip = "product" if norm is None else "product_gate", chips.chip_of(device)
    rank = chips.rank_block(r)
    candidates = rows_of(name, chip, dtype, rank)
    best = tuned.choice(device, tuned_name(name, K, input_gradient), dtype, M, N, rank)
    if best == tuned.LIBRARY:
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
    largest = 2 * chips.CHIPS[chip].flops_per_byte / ASSUMED_LOSS
    if largest < K:
        return Plan(None, f"library product: K > {largest:.0f}, where a product "
                          f"{ASSUMED_LOSS:.0%} slower costs more than the pass it saves "
                          "(predicted)")
    return Plan(filling[0], f"one pass: K <= {largest:.0f}, so the saved pass over y0 outweighs a "
                            f"product {ASSUMED_LOSS:.0%} slower (predicted)")


def tuned_name(name: str, K: int, input_gradient: bool) -> str:
    """What a product's choice is tuned under."""
    return f"{name}{' dX' * input_gradient} k{K}"
