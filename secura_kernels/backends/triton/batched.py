"""*batched*: the change of a batch whose samples belong to different adapters, in one pass.

A program owns a tile of one sample. It forms h from the sample's core block by block of ranks,
where it is needed: nothing but y0, t, C and the cores is read, nothing but y written. A negative
adapter copies y0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...settings import SMagNorm
from ..host import NO_GATE, GateNumbers, cdiv, contiguous
from .chips import rank_block
from .launch import WIDE_STEP, Launch, addressable, dot_precision, launched, wide_precision
from .passes.down import _times_core
from .passes.factors import _factor_tile
from .passes.gate import _apply_gate, _gate, _relative_magnitude
from .passes.tile_ops import _at_row, _divided_by_largest, _raise_largest, _store, _vector
from .tiles import tile_for


@triton.jit(do_not_specialize=["S"])
def _batched_kernel(
    y0_ptr,
    t_ptr,
    cores_ptr,
    adapter_ptr,
    factor_ptr,
    adapter_bias_ptr,
    y_ptr,
    largest_ptr,
    S,
    N,
    R,
    A,
    stride_yb,
    stride_ys,
    stride_yn,
    stride_ca,
    stride_cj,
    stride_ck,
    stride_fl,
    stride_fr,
    slope,
    offset,
    eps,
    beta,
    alpha,
    GATE: tl.constexpr,
    FIND_LARGEST: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    rows, columns = tl.cdiv(S, BLOCK_M), tl.cdiv(N, BLOCK_N)
    sample = tl.program_id(0) // (rows * columns)
    m0, n0 = (tl.program_id(0) // columns % rows) * BLOCK_M, (tl.program_id(0) % columns) * BLOCK_N
    m, M = tl.arange(0, BLOCK_M), S - m0
    n = n0 + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    row = tl.cast(sample, tl.int64) * S + m0
    t_ptr, y_ptr = _at_row(t_ptr, row, R), _at_row(y_ptr, row, N)
    y0_ptr = _at_row(_at_row(_at_row(y0_ptr, sample, stride_yb), m0, stride_ys), n0, stride_yn)
    y0_ptr += (m * stride_ys)[:, None] + (tl.arange(0, BLOCK_N) * stride_yn)[None, :]
    adapter = tl.load(adapter_ptr + sample)
    if adapter < 0:
        if not FIND_LARGEST:
            _store(tl.load(y0_ptr, mask=inside, other=0.0), m, M, n, N, y_ptr)
    else:
        adapter = tl.minimum(adapter, A - 1)  # an undefined one must not be read out of bounds
        core_ptr = _at_row(cores_ptr, adapter, stride_ca)
        d = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r0 in tl.range(0, RANK, BLOCK_R, num_stages=1):
            r = r0 + tl.arange(0, BLOCK_R)
            h = _times_core(
                t_ptr, core_ptr, stride_cj, stride_ck, m, M, r, R, alpha, BLOCK_R, STEP, WIDE
            )  # [BLOCK_M, BLOCK_R]
            factor = _factor_tile(
                factor_ptr, None, stride_fl, stride_fr, n0, tl.arange(0, BLOCK_N), N, r, R
            )
            d = tl.dot(h.to(factor.dtype), tl.trans(factor), d, input_precision=PRECISION)
        if adapter_bias_ptr is not None:
            d += _vector(_at_row(adapter_bias_ptr, adapter, N), n, N, 0.0)[None, :]
        b = tl.load(y0_ptr, mask=inside, other=0.0).to(tl.float32)
        if FIND_LARGEST:
            _raise_largest(_relative_magnitude(b, d, eps), m, M, n, N, largest_ptr + sample)
        elif GATE:
            if largest_ptr is not None:
                slope = _divided_by_largest(slope, largest_ptr + sample)
            s = _gate(b, d, slope, offset, eps, beta)[1]
            _store(_apply_gate(b, d, s, beta, 1.0), m, M, n, N, y_ptr)
        else:
            _store(b + d, m, M, n, N, y_ptr)


def forward(
    y0: Tensor,
    t: Tensor,
    cores: Tensor,
    adapter: Tensor,
    C: Tensor,
    adapter_bias: Tensor | None,
    alpha: float,
    norm: SMagNorm | None,
) -> Tensor:
    """y (B, S, N); arguments as of ``reference.batched.forward``."""
    y0, cores, C = addressable(y0), addressable(cores), addressable(C)
    t, adapter, adapter_bias = contiguous(t, adapter, adapter_bias)
    y = y0.new_empty(y0.shape)
    gate = NO_GATE if norm is None else GateNumbers.of(norm, y0.dtype)
    inputs = (y0, t, cores, adapter, C, adapter_bias, y, alpha, norm is not None, gate)
    largest = None
    if norm is not None and norm.ref == "max":
        largest = y0.new_zeros(len(y0), dtype=torch.int32)
        _launch_batched(*inputs, largest, find_largest=True)
    _launch_batched(*inputs, largest, find_largest=False)
    return y


@launched(_batched_kernel)
def _launch_batched(
    y0: Tensor,
    t: Tensor,
    cores: Tensor,
    adapter: Tensor,
    C: Tensor,
    adapter_bias: Tensor | None,
    y: Tensor,
    alpha: float,
    gated: bool,
    gate: GateNumbers,
    largest: Tensor | None,
    *,
    find_largest: bool,
) -> Launch:
    (B, S, N), (A, r, _) = y0.shape, cores.shape
    tile, rank = tile_for("batched", y0, S, N, r), rank_block(r)
    return Launch(
        B * cdiv(S, tile.m) * cdiv(N, tile.n),
        tile,
        dict(
            y0_ptr=y0,
            t_ptr=t,
            cores_ptr=cores,
            adapter_ptr=adapter,
            factor_ptr=C,
            adapter_bias_ptr=adapter_bias,
            y_ptr=y,
            largest_ptr=largest,
            S=S,
            N=N,
            R=r,
            A=A,
            stride_yb=y0.stride(0),
            stride_ys=y0.stride(1),
            stride_yn=y0.stride(2),
            stride_ca=cores.stride(0),
            stride_cj=cores.stride(1),
            stride_ck=cores.stride(2),
            stride_fl=C.stride(0),
            stride_fr=C.stride(1),
            slope=gate.slope,
            offset=gate.offset,
            eps=gate.eps,
            beta=gate.beta,
            alpha=alpha,
            GATE=gated,
            FIND_LARGEST=find_largest,
            RANK=rank,
            BLOCK_R=min(rank, 64),
            STEP=min(rank, WIDE_STEP),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            PRECISION=dot_precision(y0.dtype),
            WIDE=wide_precision(y0.dtype),
        ),
    )
