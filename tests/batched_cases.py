"""Random cases of ``cur_batched``, with the methods that the checks of ``layer_cases`` call."""

from dataclasses import dataclass, fields, replace

import torch
from devices import DEVICE
from epilogue_cases import EpilogueCase
from layer_cases import rounded_again
from torch import Tensor

from secura_kernels.backends import reference
from secura_kernels.functional.epilogue import cur_batched

ADAPTERS = [3, -1, 0, 4, 2, 1, -1, 3]  # five, one of them twice, and the base


@dataclass
class Batch:
    """y0 (B, S, N), t (B, S, r), C (N, r), cores (5, r, r), adapter_bias (5, N) or None; adapter
    (B,) or (B, S)."""

    y0: Tensor
    t: Tensor
    cores: Tensor
    C: Tensor
    adapter_bias: Tensor | None
    adapter: Tensor
    alpha: float = 0.7
    quantities = ("y", "dy0", "dt", "dcores", "dadapter_bias")

    @property
    def dtype(self) -> torch.dtype:
        return self.y0.dtype

    def trained(self) -> list[Tensor]:
        found = [self.y0, self.t, self.cores, self.adapter_bias]
        return [v for v in found if v is not None]

    def training(self) -> "Batch":
        for value in self.trained():
            value.requires_grad_()
        return self

    def rounded_again(self) -> "Batch":
        changed = {
            f.name: rounded_again(
                value, value.dtype if f.name in ("cores", "adapter_bias") else self.dtype
            )
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and value.is_floating_point()
        }
        return replace(self, **changed)

    def ours(self, norm, *trained, impl="auto", **changes):
        names = [n for n in ("y0", "t", "cores", "adapter_bias") if getattr(self, n) is not None]
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors |= dict(zip(names, trained, strict=False)) | changes
        return cur_batched(**tensors, norm=norm, impl=impl)

    def single(self, i: int) -> EpilogueCase:
        k = self.adapter[i]
        bias = self.C.new_zeros(len(self.C)) if self.adapter_bias is None else self.adapter_bias[k]
        return EpilogueCase(self.y0[i], self.t[i], self.cores[k], self.C, bias, None, self.alpha)

    def eager(self, norm, dtype=None):
        """Each id's rows by the plain formula, in ``dtype`` (its own by default), on leaves of its
        own."""
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in self.trained()]
        y0, t, cores, *bias = leaves
        C, ids = self.C.to(y0.dtype), self.adapter.flatten().tolist()
        rows = y0.reshape(len(ids), -1, y0.shape[-1])
        parts = [
            y
            if k < 0
            else reference.cur_epilogue(
                y,
                p,
                cores[k],
                C,
                alpha=self.alpha,
                norm=norm,
                adapter_bias=bias[0][k] if bias else None,
            )
            for y, p, k in zip(rows, t.reshape(len(ids), -1, t.shape[-1]), ids, strict=True)
        ]
        return torch.stack(parts).view(y0.shape), leaves


def batch(S=7, N=45, r=5, dtype=torch.float32, bias=True, adapters=ADAPTERS) -> Batch:
    """Sizes of a trained adapter's: a change of a third of the base. ``adapters``: of each sample,
    or of each token."""

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape).to(DEVICE, dtype)

    B, wide = len(adapters), torch.promote_types(dtype, torch.float32)
    return Batch(
        normal(B, S, N, dtype=dtype),
        normal(B, S, r, dtype=dtype),
        normal(5, r, r, dtype=wide) * 0.3 / r,
        normal(N, r, dtype=dtype),
        0.1 * normal(5, N, dtype=wide) if bias else None,
        torch.as_tensor(adapters, device=DEVICE),
    )


def by_token(B=3, S=40, seed=0) -> Tensor:
    """Packed sequences of several lengths, one without an adapter; an adapter that has no token
    (2); and a row in which every token has another than its neighbour."""
    lengths = torch.tensor([7, 1, 20, 12]) if S == 40 else torch.tensor([S])
    packed = torch.tensor([4, 0, -1, 3])[: len(lengths)].repeat_interleave(lengths)
    mixed = torch.tensor([0, 1, 3, 4, -1]).repeat(S)[:S]
    return torch.stack([packed, packed.flip(0), mixed, *[packed] * (B - 3)])[:B]
