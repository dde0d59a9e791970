"""Tile configurations as data: one table per chip, and how one is picked for a shape.

Every row is compiled for its chip in the tests (``inspect.py``): no spill, shared memory within the
chip's limit, the tensor-core instruction of the chip. ``python -m secura_kernels tune`` measures
the rows of a pass on the GPU at hand and keeps the fastest in the user's cache (``tune_cache.py``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ..host import cdiv
from . import chips, tune_cache


@dataclass(frozen=True)
class Tile:
    """One configuration of a pass.

    ``m``, ``n``: rows and columns of the matrix that a program produces or walks over, ``k``: the
    step of its loop; a pass that has no such step leaves the field at 0. ``max_rank``: the largest
    rank (as a power of two) whose matrices fit. ``parts``: column parts of a gate's epilogue.
    ``group``: rows of tiles that are walked together, for the L2. ``tma``: operands by bulk copies.
    ``bulk``: a product without a gate is ``bulk_product.py``'s. ``persistent``: as many programs as
    processors, each walking over several tiles.
    """

    m: int
    n: int = 0
    k: int = 0
    warps: int = 4
    stages: int = 2
    max_rank: int = 256
    parts: int = 1
    group: int = 8
    tma: bool = False
    bulk: bool = False
    persistent: bool = False


# Bandwidth-bound passes and the small ones: the same rows serve every chip.
_COMMON = {
    "gather": (Tile(16, warps=4),),
    "down": (
        Tile(32, k=64, warps=4, stages=5, max_rank=64),
        Tile(16, k=128, warps=4, stages=3, max_rank=64),
        Tile(64, k=32, warps=8, stages=3),
        Tile(32, k=32, warps=8, stages=3),
        Tile(16, k=64, warps=4, stages=2),
    ),
    "project": (Tile(32, warps=4, max_rank=64), Tile(16, warps=4, max_rank=64), Tile(32, warps=8)),
    "epilogue": (
        Tile(64, 64, warps=4, max_rank=64),
        Tile(32, 64, warps=4, max_rank=64),
        Tile(64, 64, warps=8),
        Tile(16, 64, warps=4),
    ),
    "gate_backward": (
        Tile(64, 64, warps=4, stages=3, max_rank=64),
        Tile(32, 64, warps=4, stages=3, max_rank=64),
        Tile(32, 64, warps=8, stages=2),
        Tile(16, 64, warps=8, stages=2),
    ),
    "core_gradient": (Tile(16, warps=8, max_rank=64), Tile(16, warps=4)),
    "effective_weight": (Tile(64, 64, warps=4),),
    "weight_core_gradient": (Tile(64, 32, warps=4, max_rank=64), Tile(32, 32, warps=8)),
    "decode": (Tile(64, k=64, warps=8, stages=2), Tile(32, k=64, warps=4, stages=2)),
    "own_core": (Tile(32, warps=4, max_rank=16), Tile(16, warps=4)),
    "core_parts": (Tile(16, warps=8, max_rank=64), Tile(16, warps=4)),
    "bias_parts": (Tile(16, 128, warps=4),),
    "sum_of_parts": (Tile(1, 1024, warps=4),),
}
_COMMON["batched_epilogue"] = (
    *_COMMON["epilogue"][:2],
    Tile(32, 64, warps=4),
    Tile(16, 64, warps=4),
)
_AMPERE = _COMMON | {
    "gate_backward": _COMMON["gate_backward"][1:],
    "product": (Tile(128, 128, 32, warps=8, stages=4), Tile(64, 64, 32, warps=4, stages=4)),
    "product_gate": (
        Tile(128, 128, 32, warps=8, stages=4, parts=4),
        Tile(64, 64, 32, warps=4, stages=4, parts=2),
    ),
}
# Where cp.async copies the operands of a loop, Triton before 3.7.1 has no fence.proxy.async between
# the copies and WGMMA or tcgen05, which read shared memory through the other proxy: the PTX memory
# model lets them read what was there before. So loops over 64 rows and more take their factor by
# bulk copies, which need no fence, or take no copies ahead (one stage).
_HOPPER = _COMMON | {
    "epilogue": (Tile(64, 64, warps=4), Tile(32, 64, warps=4)),
    "batched_epilogue": (Tile(64, 64, warps=4), Tile(32, 64, warps=4)),
    "gate_backward": (
        Tile(32, 128, warps=4, stages=3, max_rank=64),
        Tile(32, 64, warps=4, stages=3, max_rank=64),
        Tile(64, 32, warps=4, stages=3, tma=True),
    ),
    "gate_backward_and_bias": (
        Tile(64, 64, warps=4, stages=3, max_rank=64, tma=True),
        Tile(32, 64, warps=4, stages=3, max_rank=64),
        Tile(64, 32, warps=4, stages=3, tma=True),
    ),
    "down": (
        Tile(64, k=128, warps=4, stages=4, max_rank=64, tma=True),
        *_COMMON["down"][:2],
        Tile(128, k=64, warps=8, stages=4, tma=True),
        Tile(64, k=64, warps=4, stages=4, tma=True),
        Tile(32, k=64, warps=4, stages=3),
        Tile(16, k=64, warps=4, stages=2),
    ),
    "project": (*_COMMON["project"][:2], Tile(32, warps=4)),
    "core_gradient": (Tile(16, warps=4),),
    "weight_core_gradient": (Tile(64, 32, warps=4, stages=1),),
    "decode": tuple(replace(tile, stages=1) for tile in _COMMON["decode"]),
    "product": (
        Tile(128, 256, 64, 8, 3, max_rank=64, group=4, tma=True, bulk=True, persistent=True),
        Tile(128, 128, 64, 8, 4, max_rank=64, tma=True, bulk=True),
        Tile(64, 128, 64, 4, 4, max_rank=64, tma=True, bulk=True),
        Tile(128, 256, 64, 8, 3, group=4, tma=True, bulk=True, persistent=True),
        Tile(128, 128, 64, 8, 3, tma=True, bulk=True),
        Tile(64, 128, 64, 4, 4, tma=True, bulk=True),
    ),
    "product_gate": (
        Tile(128, 256, 64, warps=8, stages=3, parts=8, max_rank=64, tma=True, persistent=True),
        Tile(128, 256, 64, warps=8, stages=3, parts=8, max_rank=64, tma=True),
        Tile(128, 128, 64, warps=8, stages=4, parts=4, max_rank=64, tma=True),
        Tile(64, 128, 64, warps=4, stages=4, parts=8, max_rank=64, tma=True),
        Tile(128, 128, 64, warps=8, stages=4, parts=4, tma=True, persistent=True),
        Tile(128, 128, 64, warps=8, stages=4, parts=4, tma=True),
        Tile(64, 128, 64, warps=4, stages=4, parts=8, tma=True),
    ),
}
# Triton 3.6 fails to compile an *epilogue* in taller tiles, which take tcgen05: "parent layout must
# have at least rank >= 2", in its pass over tensor memory.
_BLACKWELL = _HOPPER | {
    "product": (
        Tile(128, 256, 64, warps=8, stages=3, max_rank=64, tma=True, persistent=True),
        Tile(128, 256, 64, warps=8, stages=3, max_rank=64, tma=True),
        Tile(128, 128, 64, warps=8, stages=4, max_rank=64, tma=True),
        Tile(64, 128, 64, warps=4, stages=4, max_rank=64, tma=True),
        Tile(128, 128, 64, warps=8, stages=3, tma=True, persistent=True),
        Tile(128, 128, 64, warps=8, stages=3, tma=True),
        Tile(64, 128, 64, warps=4, stages=4, tma=True),
    ),
    "core_gradient": (Tile(32, warps=8),),
    "weight_core_gradient": (
        Tile(64, 32, warps=4, stages=1, max_rank=64),
        Tile(32, 32, warps=8, stages=1),
    ),
    "decode": (Tile(64, k=64, warps=8, stages=1), Tile(32, k=32, warps=4, stages=1)),
    "epilogue": (Tile(32, 128, warps=4), Tile(32, 64, warps=4)),
    "batched_epilogue": (
        Tile(32, 128, warps=4, max_rank=64),
        Tile(32, 64, warps=4, max_rank=64),
        *_HOPPER["batched_epilogue"],
    ),
    "core_parts": (Tile(16, warps=4),),
}
# Blocks of which small matrices have several, and not too many: each operation is a numpy call.
_INTERPRETER = {name: (Tile(64, 64, 64, parts=2, group=2),) for name in _HOPPER}
_INTERPRETER["sum_of_parts"] = _COMMON["sum_of_parts"]  # of which 64 columns would be thousands
_SMALL_BLACKWELL = _AMPERE | {
    "gate_backward": (
        Tile(64, 64, warps=4, stages=2, max_rank=64),
        *_COMMON["gate_backward"][2:],
    ),
    "decode": (Tile(64, k=64, warps=8, stages=2), Tile(32, k=32, warps=4, stages=2)),
    "own_core": (
        Tile(32, warps=4, max_rank=16),
        Tile(16, warps=4, max_rank=64),
        Tile(16, warps=8),
    ),
}
TABLES = {
    80: _AMPERE,
    89: _AMPERE,
    90: _HOPPER,
    100: _BLACKWELL,
    120: _SMALL_BLACKWELL,
    chips.INTERPRETER: _INTERPRETER,
}
# float32 layers: twice the bytes a tile, and products in float32 units. Their base products are the
# library's (``dispatch``), so the one-pass kernel has no row here.
_FLOAT32 = {
    "gather": (Tile(64, warps=4, max_rank=64), Tile(32, warps=8)),
    "down": (Tile(32, k=32, warps=8, stages=2, max_rank=64), Tile(16, k=32, warps=8, stages=2)),
    "project": (Tile(16, warps=8),),
    "epilogue": (Tile(32, 64, warps=8), Tile(16, 32, warps=4)),
    "gate_backward": (Tile(16, 64, warps=4, stages=2, max_rank=64), Tile(16, 32, warps=8)),
    "core_gradient": (Tile(16, warps=8, max_rank=64), Tile(16, warps=16)),
    "effective_weight": (Tile(32, 64, warps=8),),
    "weight_core_gradient": (Tile(16, 32, warps=8),),
    "decode": (Tile(32, k=32, warps=8),),
    "own_core": (Tile(16, warps=4, max_rank=64), Tile(16, warps=8)),
    "batched_epilogue": (Tile(32, 64, warps=8), Tile(16, 32, warps=4)),
    "core_parts": (Tile(16, warps=8, max_rank=64), Tile(16, warps=4)),
    "bias_parts": (Tile(16, 128, warps=4),),
    "sum_of_parts": (Tile(1, 1024, warps=4),),
}
_SMALL_BLACKWELL_FLOAT32 = _FLOAT32 | {
    "epilogue": (Tile(32, 32, warps=4), Tile(16, 32, warps=4)),
    "gate_backward": (
        Tile(16, 32, warps=4, stages=2, max_rank=64),
        _FLOAT32["gate_backward"][1],
    ),
}
# Instructions an element that a pass may issue, with the first of its rows in 16 bits at ranks up
# to 64 (``tools/inspect_triton.py``): all of the epilogues, the loop of *gate backward*, the inner
# one of *bias parts*, and in *product_gate* what follows the loop over K. An H100 issues 49 in the
# time that the bytes of an epilogue or *gate backward* take, 19 in that of *bias parts*.
INSTRUCTIONS = {
    "epilogue": 40,
    "batched_epilogue": 46,
    "gate_backward": 25,
    "bias_parts": 14,
    "product_gate": 40,
}
_TWO_DIMENSIONAL = ("product", "product_gate", "epilogue", "effective_weight", "batched_epilogue")


def rows_of(name: str, chip: int, dtype: torch.dtype, rank: int) -> tuple[Tile, ...]:
    """Configurations of a pass that hold ``rank`` (a power of two), the largest tiles first."""
    table = TABLES[chip]
    if dtype == torch.float32 and chip != chips.INTERPRETER:
        table = _SMALL_BLACKWELL_FLOAT32 if chip == 120 else _FLOAT32
    name = name if name in table else name.removesuffix("_and_bias")
    fitting = [tile for tile in table[name] if rank <= tile.max_rank]
    smallest = min(tile.max_rank for tile in fitting)
    return tuple(tile for tile in fitting if tile.max_rank == smallest)


FILLED = 0.95  # of a chip's processors: those left over cost no more than smaller tiles do
PROGRAMS = {False: 512, True: 256}  # of *gate backward*, of 64 rows each; with column sums
FEWEST_COLUMNS = 256  # of a part: fewer do not pay for a v of its own


def column_parts(M: int, N: int, bias: bool = False) -> int:
    """Into how many parts *gate backward* splits the columns of a (M, N) matrix; ``bias``: with the
    adapter bias's column sums."""
    return max(1, min(cdiv(PROGRAMS[bias], max(1, cdiv(M, 64))), N // FEWEST_COLUMNS))


def programs(name: str, tile: Tile, rows: int, columns: int) -> int:
    across = cdiv(columns, tile.n) if name in _TWO_DIMENSIONAL else 1
    if name.startswith("gate_backward"):
        across = column_parts(rows, columns, name.endswith("bias"))
    return cdiv(rows, tile.m) * across


_used: Tile | None = None


@contextmanager
def use(tile: Tile) -> Iterator[None]:
    """Every pass uses ``tile``, to compile or time it."""
    global _used
    _used = tile
    try:
        yield
    finally:
        _used = None


def is_forced() -> bool:
    return _used is not None


def tile_for(
    name: str, like: Tensor, rows: int, columns: int, r: int, dtype: torch.dtype | None = None
) -> Tile:
    """The configuration of a pass over a (rows, columns) matrix of a layer in ``dtype``, by default
    that of ``like``.

    The tuned one where this shape was tuned on this GPU; else the largest tile of which there are
    enough to fill the chip, else the smallest.
    """
    if _used is not None:
        return _used
    return _tile_for(
        name,
        like.device,
        chips.chip_of(like.device),
        dtype or like.dtype,
        rows,
        columns,
        chips.rank_block(r),
    )


@tune_cache.remembered
def _tile_for(
    name: str,
    device: torch.device,
    chip: int,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    rank: int,
) -> Tile:
    candidates = rows_of(name, chip, dtype, rank)
    best = tune_cache.choice(device, name, dtype, rows, columns, rank)
    for tile in candidates:
        if best == asdict(tile):
            return tile
    enough = FILLED * chips.processors(device)
    filling = (tile for tile in candidates if programs(name, tile, rows, columns) >= enough)
    return next(filling, candidates[-1])
