"""Which form a layer takes: one pass, or the library's product and an epilogue over it."""

import torch
from torch import Tensor

from ...settings import SMagNorm
from ..host import cdiv

TILE = 128  # of the one-pass kernel, both ways
# How much slower than cuBLAS the one-pass kernel's product is taken to be, by the major number of
# the compute capability. Measured on an H100 (benchmarks/results/nvidia-h100-80gb-hbm3/passes.csv:
# 0.65 to 0.84); assumed elsewhere: by its instructions an A100 loses 0.6, and a B200, whose library
# takes another unit, more than an H100.
ASSUMED_LOSS = {8: 0.6, 12: 0.6, 9: 0.75, 10: 2.7}
LOSS_IN_FLOAT32 = 1.0
# Operations that a chip does while it moves one byte, in 16 bits and in float32.
BALANCE, BALANCE_IN_FLOAT32 = 200, 13


def one_pass(a: Tensor, b: Tensor, norm: SMagNorm | None) -> bool:
    """Whether y (M, N), gated or not, is better written once than as the library's product a b^T
    and an epilogue. One pass saves writing and reading the base output, 2 M N elements; a slower
    product costs more the longer K is.

    Args:
        a: (M, K). b: (N, K).
    """
    if norm is not None and norm.ref == "max":
        return False  # max(rho) of the whole matrix comes before any output
    if not (_in_chunks(a) and (_in_chunks(b) or (norm is None and _in_chunks(b.T)))):
        return False  # the kernel would read it element by element
    (M, K), N = a.shape, b.shape[0]
    major, processors = 8, 1
    if a.device.type == "cuda":
        chip = torch.cuda.get_device_properties(a.device)
        major, processors = chip.major, chip.multi_processor_count
    if M <= 64 or cdiv(M, TILE) * cdiv(N, TILE) < processors:
        return False  # the library splits K over the chip
    if a.dtype == torch.float32:
        loss, balance = LOSS_IN_FLOAT32, BALANCE_IN_FLOAT32
    elif major in ASSUMED_LOSS:
        loss, balance = ASSUMED_LOSS[major], BALANCE
    else:
        return False  # sm_75: the library has tensor cores for 16 bits there, the kernel has not
    return 2 * K * loss <= balance * 2 * a.element_size()


def _in_chunks(matrix: Tensor) -> bool:
    """Rows contiguous, and on 16-byte boundaries."""
    return (
        matrix.stride(1) == 1
        and matrix.data_ptr() % 16 == 0
        and matrix.stride(0) * matrix.element_size() % 16 == 0
    )
