"""What the output-domain and the weight-domain passes share."""

from collections.abc import Iterator

import torch
from torch import Tensor

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


def chosen_columns(weight: Tensor, cols: Tensor | None, C: Tensor | None) -> Tensor:
    """C (N, r): the stored one, or W[:, cols] while C is tied to W."""
    return weight.index_select(1, cols) if C is None else C


def chosen_rows(weight: Tensor, rows: Tensor | None, R: Tensor | None) -> Tensor:
    """R (r, K): the stored one, or W[rows, :] while R is tied to W."""
    return weight.index_select(0, rows) if R is None else R
