"""The change of a batch whose rows belong to different adapters: forward and explicit backward."""

import torch
from torch import Tensor

from ...settings import SMagNorm
from ..gate_code import saved_dtype
from .blocks import row_blocks, wide_dtype
from .by_adapter import Blocks, blocks_of, core_sums, of_each_row, sums, times_cores
from .gate import (
    apply_gate,
    decode,
    encode,
    gate_gradient,
    inverse_gate,
    relative_magnitude,
    split_gradient,
)


def forward(
    y0: Tensor,
    t: Tensor,
    cores: Tensor,
    adapter: Tensor,
    C: Tensor,
    adapter_bias: Tensor | None,
    alpha: float,
    norm: SMagNorm | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Each row by its own core, as ``epilogue.forward`` would. Differentiable throughout.

    Args:
        y0: (M, N); t: (M, r); C: (N, r); of one dtype. cores: (A, r, r), any float dtype.
        adapter: (I,) int64, which core, each for M / I rows in a row; negative: none, and the rows
            keep y0 to the bit.
        adapter_bias: (A, N), any float dtype. save: whether a backward pass will follow.

    Returns:
        y (M, N), contiguous; and s (M, N), coded as in ``gate.encode``, or nothing (0,).
        ``ref="max"`` is the maximum over the rows of one id.
    """
    if not y0.numel():
        kept = y0.shape if save and norm is not None else (0,)
        dtype = y0.dtype if norm is None else saved_dtype(y0.dtype)
        return y0.clone(memory_format=torch.contiguous_format), y0.new_empty(kept, dtype=dtype)
    (M, N), A, wide = y0.shape, len(cores), wide_dtype(y0.dtype)
    ids = of_each_row(adapter, M, A)
    h, Ct = _project(t, cores, blocks_of(ids, A), alpha), C.T
    bias = None if adapter_bias is None else _with_none(adapter_bias)

    def base_and_change(block: slice) -> tuple[Tensor, Tensor]:
        b, d = y0[block].to(wide), (h[block] @ Ct).to(wide)
        return b, d if bias is None else d.add_(bias[ids[block]])

    if norm is None and bias is None:
        return torch.addmm(y0, h, Ct).contiguous(), y0.new_empty(0)
    blocks = list(row_blocks(M, N))
    largest = None
    if norm is not None and norm.ref == "max":
        of_rows = [
            relative_magnitude(*base_and_change(block), norm.eps).amax(1) for block in blocks
        ]
        largest = torch.cat(of_rows).view(len(adapter), -1).amax(1, keepdim=True)
        largest = largest.expand(-1, M // len(adapter)).reshape(M, 1)
    parts, codes = [], []
    for block in blocks:
        if norm is None:
            out = torch.add(*base_and_change(block))  # rounded once
        else:
            b, d = base_and_change(block)
            s = inverse_gate(b, d, norm, None if largest is None else largest[block])
            if save:
                codes.append(encode(s, norm, y0.dtype))
            out = apply_gate(b, d, s.detach() if norm.detach_gate else s, norm, None)
        parts.append(out.to(y0.dtype))
    return _whole(parts), _whole(codes) if codes else y0.new_empty(
        0, dtype=y0.dtype if norm is None else saved_dtype(y0.dtype)
    )


def _whole(parts: list[Tensor]) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()


def _project(t: Tensor, cores: Tensor, blocks: Blocks, alpha: float) -> Tensor:
    """h = alpha t core^T (M, r) in t's dtype, computed wide."""
    wide = wide_dtype(t.dtype)
    return (alpha * times_cores(t.to(wide), cores.to(wide), blocks)).to(t.dtype)


def _with_none(adapter_bias: Tensor) -> Tensor:
    """(A + 1, N): the last row, which the id -1 takes, is zero."""
    return torch.cat([adapter_bias, adapter_bias.new_zeros(1, adapter_bias.shape[1])])


def backward(
    dy: Tensor,
    cores: Tensor,
    adapter: Tensor,
    C: Tensor,
    adapter_bias: Tensor | None,
    t: Tensor,
    saved: Tensor,
    alpha: float,
    norm: SMagNorm | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of y0 (M, N), t (M, r), cores (A, r, r) and adapter_bias (A, N); None where
    ``needs`` is False. ``saved``: s coded, or y0 itself where the gate is not detached.

    With the gate's constant s, G = dy * s (s = beta = 1 without a gate), v = G C, and sums over the
    rows of each adapter::

        dy0 = beta G      dt = alpha v core      dcore = alpha v^T t      dadapter_bias = sum of G

    Plain differentiable operations throughout, so that it can be differentiated again. Without a
    gate dy0 is dy itself.
    """
    if not dy.numel():
        likes = (dy, t, cores, adapter_bias)
        return tuple(  # type: ignore[return-value]
            torch.zeros_like(like) if need else None
            for like, need in zip(likes, needs, strict=True)
        )
    A, wide = len(cores), wide_dtype(dy.dtype)
    ids = of_each_row(adapter, len(dy), A)
    blocks = blocks_of(ids, A)
    db, dd, scale = _gradients_of_base_and_change(
        dy, cores, adapter, ids, blocks, C, adapter_bias, t, saved, alpha, norm
    )
    dt = dcores = dbias = None
    if needs[1] or needs[2]:
        v = (dd @ C).to(wide) * scale
    if needs[1]:
        dt = (alpha * times_cores(v, cores.to(wide).mT, blocks)).to(dy.dtype)
    if needs[2]:
        dcores = (alpha * core_sums(v, t.to(wide), blocks, A)).to(cores.dtype)
    if needs[3]:
        dbias = (sums(dd.to(wide), ids, A) * scale).to(adapter_bias.dtype)  # type: ignore[union-attr]
    return db if needs[0] else None, dt, dcores, dbias


def _gradients_of_base_and_change(
    dy, cores, adapter, ids, blocks, C, adapter_bias, t, saved, alpha, norm
) -> tuple[Tensor, Tensor, float]:
    """As of ``epilogue``: (M, N) gradients of b and d; d's is to be multiplied by the number."""
    if norm is None:
        return dy, dy, 1.0
    wide = wide_dtype(dy.dtype)
    grad = dy.to(wide)
    if norm.detach_gate:
        db = (grad * decode(saved, norm, wide)).mul_(norm.base_weight).to(dy.dtype)
        return db, db, 1 / norm.base_weight
    b, d = saved.to(wide), (_project(t, cores, blocks, alpha) @ C.T).to(wide)
    if adapter_bias is not None:
        d = d + _with_none(adapter_bias)[ids]
    if norm.ref == "max":  # which is of one id's rows
        pairs = [
            _of_full_gate(*part, norm)
            for part in zip(*(x.chunk(len(adapter)) for x in (grad, b, d)), strict=True)
        ]
        db, dd = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    else:
        db, dd = _of_full_gate(grad, b, d, norm)
    return db.to(dy.dtype), dd.to(dy.dtype), 1.0


def _of_full_gate(grad: Tensor, b: Tensor, d: Tensor, norm: SMagNorm) -> tuple[Tensor, Tensor]:
    largest = relative_magnitude(b, d, norm.eps).amax() if norm.ref == "max" else None
    s = inverse_gate(b, d, norm, largest)
    db, dd = split_gradient(grad, s, norm, None)
    more_db, more_dd = gate_gradient(grad, b, d, s, norm, None, largest)
    return db + more_db, dd + more_dd
