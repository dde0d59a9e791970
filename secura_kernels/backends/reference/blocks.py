"""What the output-domain and the weight-domain passes share."""

from collections.abc import Iterator

import torch

# Elements of one block of rows. The gate is a dozen elementwise passes: a block bounds what they
# hold at once, and 4 MiB of float32 stays in the last cache.
BLOCK_ELEMENTS = 2**20


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover ``rows`` in blocks of about BLOCK_ELEMENTS elements."""
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the gate and the r x r products are computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
