"""Random cases of ``cur_epilogue``, with the methods that the checks of ``forms`` call."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from layer_cases import NORMS, case, rounded_again
from torch import Tensor

from secura_kernels.backends import reference
from secura_kernels.backends.operands import CurOperands
from secura_kernels.functional.epilogue import cur_epilogue

OUTPUT_NORMS = {
    name: norm for name, norm in NORMS.items() if norm is None or norm.domain == "output"
}


@dataclass
class EpilogueCase:
    """Arguments of one update of y0 (M, N); t (M, r), C (N, r)."""

    y0: Tensor
    t: Tensor
    core: Tensor
    C: Tensor
    adapter_bias: Tensor | None
    decay: Tensor | None
    alpha: float = 0.7
    task_gate: Tensor | None = None
    quantities = ("y", "dy0", "dt", "dcore", "dadapter_bias")

    @property
    def dtype(self) -> torch.dtype:
        return self.y0.dtype

    def trained(self) -> list[Tensor]:
        return [self.y0, self.t, self.core, self.adapter_bias]

    def rounded_again(self) -> "EpilogueCase":
        """The core and the bias too: h and d are rounded once more on the way than they are."""
        again = {name: rounded_again(getattr(self, name), self.dtype) for name in ("y0", "t", "C")}
        return replace(
            self,
            **again,
            core=rounded_again(self.core, self.core.dtype),
            adapter_bias=rounded_again(self.adapter_bias, self.adapter_bias.dtype),
        )

    def ours(self, norm, *trained, impl="auto"):
        y0, t, core, adapter_bias = trained or self.trained()
        return cur_epilogue(
            y0,
            t,
            core,
            self.C,
            alpha=self.alpha,
            norm=norm,
            decay=self.decay,
            adapter_bias=adapter_bias,
            task_gate=self.task_gate,
            impl=impl,
        )

    def operands(self, norm) -> CurOperands:
        return CurOperands.of_epilogue(
            self.core, self.C, self.adapter_bias, self.decay, self.alpha, norm, self.task_gate
        )

    def eager(self, norm, dtype=None):
        """The plain formula, in ``dtype`` (its own by default), on leaves of its own."""
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in self.trained()]
        y0, t, core, adapter_bias = leaves
        decay, gate = (
            None if v is None else v.to(dtype or v.dtype) for v in (self.decay, self.task_gate)
        )
        return reference.cur_epilogue(
            y0,
            t,
            core,
            self.C.to(y0.dtype),
            alpha=self.alpha,
            norm=norm,
            adapter_bias=adapter_bias,
            decay=decay,
            task_gate=gate,
        ), leaves


def epilogue_case(
    M=7,
    N=12,
    K=10,
    r=4,
    dtype=torch.float64,
    *,
    decay=True,
    small=False,
    task_gate=False,
    device="cpu",
) -> EpilogueCase:
    """``small``: a core as small as a trained one's."""
    c = case(M, N, K, r, dtype, decay=decay, task_gate=task_gate, device=device)
    C, R = c.C_and_R
    with torch.no_grad():
        y0, t = F.linear(c.x, c.W, c.bias), c.x @ R.T
        if small:
            c.core.mul_(0.3 / r)
    return EpilogueCase(
        y0.requires_grad_(),
        t.requires_grad_(),
        c.core,
        C,
        c.adapter_bias,
        c.decay,
        task_gate=c.task_gate,
    )
