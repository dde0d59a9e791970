"""Which form a layer takes: one pass, or the library's product and an epilogue over it."""

import torch
from torch import Tensor

from ..kernel_host import cdiv
from ..smagnorm import SMagNorm

TILE = 128  # of the one-pass kernel, both ways
# How much slower than cuBLAS the one-pass kernel's product is taken to be, by the major number of
# the compute capability: mma.sync is an A100's own instruction, and leaves half of an H100 unused.
# Assumed; nothing was measured yet.
ASSUMED_LOSS = {8: 0.25, 12: 0.25, 9: 0.67, 10: 1.5}
LOSS_IN_FLOAT32 = 1.0
# Operations that a chip does while it moves one byte, in 16 bits and in float32.
BALANCE, BALANCE_IN_FLOAT32 = 200, 13


def one_pass(M: int, N: int, K: int, like: Tensor, norm: SMagNorm | None) -> bool:
    """Whether y (M, N) of a product over K is better written once. One pass saves writing and
    reading the base output, 2 M N elements; a slower product costs more the longer K is.

    Args:
        like: a tensor of the layer's dtype and device.
    """
    if norm is not None and norm.ref == "max":
        return False  # max(rho) of the whole matrix comes before any output
    major, processors = 8, 1
    if like.device.type == "cuda":
        chip = torch.cuda.get_device_properties(like.device)
        major, processors = chip.major, chip.multi_processor_count
    if M <= 64 or cdiv(M, TILE) * cdiv(N, TILE) < processors:
        return False  # the library splits K over the chip
    if like.dtype == torch.float32:
        loss, balance = LOSS_IN_FLOAT32, BALANCE_IN_FLOAT32
    elif major in ASSUMED_LOSS:
        loss, balance = ASSUMED_LOSS[major], BALANCE
    else:
        return False  # sm_75: the library has tensor cores for 16 bits there, the kernel has not
    return 2 * K * loss <= balance * 2 * like.element_size()
