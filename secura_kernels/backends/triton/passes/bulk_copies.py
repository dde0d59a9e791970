"""What the bulk-copy engine (TMA) of sm_90 and later can reach, and how it is told."""

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def has_descriptor(a: Tensor, b: Tensor) -> bool:  # of nothing there is none
    """Whether both operands of a b^T can be read, b by rows or by columns."""
    return a.shape[0] > 0 and has_aligned_rows(a) and reachable(b)


def reachable(matrix: Tensor) -> bool:
    """By rows or by columns."""
    return has_aligned_rows(matrix) or has_aligned_rows(matrix.T)


def has_aligned_rows(matrix: Tensor) -> bool:
    """Rows contiguous, apart, and on 16-byte boundaries."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.data_ptr() % 16 == 0
        and matrix.stride(0) * matrix.element_size() % 16 == 0
    )


def described(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """(rows, columns) blocks of a matrix, or of its transpose where that has the contiguous rows,
    as (columns, rows)."""
    if matrix.stride(1) == 1:
        return TensorDescriptor.from_tensor(matrix, [rows, columns])
    return TensorDescriptor(
        matrix, list(matrix.shape[::-1]), list(matrix.stride()[::-1]), [columns, rows]
    )
