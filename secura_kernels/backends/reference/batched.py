"""The change of a batch whose samples belong to different adapters; differentiable throughout."""

import torch
from torch import Tensor

from ...settings import SMagNorm
from .blocks import row_blocks, wide_dtype
from .gate import apply_gate, inverse_gate, relative_magnitude


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
    """Each sample by its own core, as ``update.forward`` would.

    Args:
        y0: (B, S, N); t: (B, S, r); C: (N, r); of one dtype. cores: (A, r, r), any float dtype.
        adapter: (B,) int64, which core; negative: none, and the sample keeps y0 to the bit.
        adapter_bias: (A, N), any float dtype.

    Returns:
        y (B, S, N), contiguous. ``ref="max"`` is the maximum over the sample's own (S, N).
    """
    if not y0.numel():
        return y0.clone(memory_format=torch.contiguous_format)
    (B, S, N), wide = y0.shape, wide_dtype(y0.dtype)
    chosen = adapter.clamp(0, cores.shape[0] - 1)
    chosen_cores = cores.index_select(0, chosen).to(wide).mT
    h = (alpha * (t.to(wide) @ chosen_cores)).to(t.dtype)
    # A change of zero leaves y0 as it is, with a gate as without.
    none = (adapter < 0)[:, None]
    h = h.masked_fill(none[:, :, None], 0).reshape(B * S, -1)
    base, Ct = y0.reshape(B * S, N), C.T
    sample = torch.arange(B, device=y0.device).repeat_interleave(S)  # of each row
    if adapter_bias is not None:
        bias = adapter_bias.index_select(0, chosen).masked_fill(none, 0)  # [B, N]

    def base_and_change(block: slice) -> tuple[Tensor, Tensor]:
        b, d = base[block].to(wide), (h[block] @ Ct).to(wide)
        return b, d if adapter_bias is None else d + bias.index_select(0, sample[block])

    blocks = list(row_blocks(B * S, N))
    largest = None
    if norm is not None and norm.ref == "max":
        of_rows = [
            relative_magnitude(*base_and_change(block), norm.eps).amax(1) for block in blocks
        ]
        largest = torch.cat(of_rows).view(B, S).amax(1)[sample, None]
    parts = []
    for block in blocks:
        if norm is None and adapter_bias is None:
            out = torch.addmm(base[block], h[block], Ct)
        elif norm is None:
            out = torch.add(*base_and_change(block))  # rounded once
        else:
            b, d = base_and_change(block)
            s = inverse_gate(b, d, norm, None if largest is None else largest[block])
            out = apply_gate(b, d, s.detach() if norm.detach_gate else s, norm, None)
        parts.append(out.to(y0.dtype))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous().view(B, S, N)
