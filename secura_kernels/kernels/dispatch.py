"""Which form a layer runs in, by shape, and why."""

from dataclasses import dataclass

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
         norm: SMagNorm | None) -> Plan:
    """The form of ``(M, K) x (K, N)``, the base product of a layer (or of dX without a gate).

    One pass saves writing and reading the base output, 2 M N elements; the library's product is
    faster by some percent of 2 M N K operations. So one pass wins up to some K, unless measured.
    """
    if norm is not None and norm.ref == "max":
        return Plan(None, "library product: ref='max' needs the largest ratio of the whole matrix "
                          "before any output")
    if dtype == torch.float32:
        return Plan(None, "library product: float32 has no tensor-core form of ours")
    name, chip = "product" if norm is None else "product_gate", chips.chip_of(device)
    candidates = rows_of(name, chip, dtype, chips.rank_block(r))
    rank = chips.rank_block(r)
    best = tuned.choice(device, f"{name} k{K}", dtype, M, N, rank)
    if best is not None:
        if best < len(candidates):
            return Plan(candidates[best], f"one pass: fastest of {len(candidates) + 1} when tuned "
                                          "on this GPU")
        return Plan(None, "library product: faster than one pass when tuned on this GPU")
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
