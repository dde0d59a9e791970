"""*core gradient*: alpha v^T t (r, r) in float32, split over M and added in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernel_host import cdiv
from .chips import rank_block
from .launch import launch, wide_precision
from .tiles import tile_for

ROWS_PER_PROGRAM = 256


@triton.jit(do_not_specialize=["M"])
def _core_gradient_kernel(
    v_ptr, t_ptr, part_ptr, M, R, stride_vm, stride_tm, alpha,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, WIDE: tl.constexpr,
):
    blocks = tl.cdiv(R, BLOCK_R)
    part = tl.program_id(0) // (blocks * blocks)
    i = (tl.program_id(0) // blocks % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for m0 in range(0, ROWS, BLOCK_M):
        m = (part * ROWS + m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        v = tl.load(v_ptr + m[None, :] * stride_vm + i[:, None],
                    mask=(m < M)[None, :] & (i < R)[:, None], other=0.0)
        t = tl.load(t_ptr + m[:, None] * stride_tm + j[None, :],
                    mask=(m < M)[:, None] & (j < R)[None, :], other=0.0)
        acc = tl.dot(v.to(tl.float32), t.to(tl.float32), acc, input_precision=WIDE)
    tl.store(part_ptr + part.to(tl.int64) * R * R + i[:, None] * R + j[None, :], alpha * acc,
             mask=(i < R)[:, None] & (j < R)[None, :])


def core_gradient(v: Tensor, t: Tensor, core: Tensor, alpha: float, layer: Tensor) -> Tensor:
    """alpha v^T t (r, r) in core's dtype; v, t: (M, r), rows contiguous. ``layer``: a tensor of the
    layer's dtype."""
    M, r = t.shape[0], core.shape[0]
    tile = tile_for("core_gradient", layer, M, r, r)
    block = min(rank_block(r), 64)
    parts = cdiv(M, ROWS_PER_PROGRAM)
    part = core.new_empty(parts, r, r, dtype=torch.float32)
    launch(_core_gradient_kernel, parts * cdiv(r, block) ** 2, tile, v.device, v_ptr=v, t_ptr=t,
           part_ptr=part, M=M, R=r, stride_vm=v.stride(0), stride_tm=t.stride(0), alpha=alpha,
           ROWS=ROWS_PER_PROGRAM, BLOCK_M=tile.m, BLOCK_R=block, WIDE=wide_precision(layer.dtype))
    return part.sum(0).to(core.dtype)
