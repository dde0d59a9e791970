"""What an adapter learned before its basis was changed: C_past R_past, which no longer trains."""

import torch
import torch.nn.functional as F
from torch import Tensor


class Past:
    """The part of ``Adapter`` that moves from one natural basis to the next."""

    @torch.no_grad()
    def move_on(
        self,
        C: Tensor,
        R: Tensor,
        unit: float,
        weight: Tensor,
        learned: bool,
        gate: Tensor | None = None,
    ) -> None:
        """Takes the natural basis C (N, r), R (r, K). What has been learned so far joins the past,
        the core is zero, and the outputs stay what they are.

        Args:
            unit: ||V||_F^2 unit^2 / 2 is about the change of the base model's predictions, in nats
                a token. learned: False where there is nothing that is to join. gate: (r, 2), see
                ``task_gate.py``.
        """
        if learned:
            self.gate_past = self.all_gates()
            left, core, right = self.factors(weight)
            wide = torch.promote_types(core.dtype, torch.float32)
            self.C_past = (left.to(wide) @ core.to(wide)).to(weight.dtype)
            self.R_past = right.to(weight.dtype).contiguous()
        self.core_parameter().zero_()
        self.set_long_core(None)
        self.C, self.R = C.to(weight.dtype).contiguous(), R.to(weight.dtype).contiguous()
        self.gate = gate
        self._set_unit(unit)

    def add_past(self, y: Tensor, x: Tensor) -> Tensor:
        """(..., N): y and the past change of x (..., K)."""
        if self.C_past is None:
            return y
        t = self.gated_past(F.linear(x, self.R_past.to(x.dtype))).to(y.dtype)
        flat, C = y.reshape(-1, y.shape[-1]), self.C_past.to(y.dtype)
        z = torch.addmm(flat, t.reshape(len(flat), -1), C.T)  # y is read once
        return z.to(y.dtype).view(y.shape)  # autocast has a dtype of its own

    def past_delta(self) -> Tensor | float:
        """The past change of W (N, K), all gates open; float32 (float64 for float64 ones)."""
        if self.C_past is None:
            return 0.0
        wide = torch.promote_types(self.C_past.dtype, torch.float32)
        return self.C_past.to(wide) @ self.R_past.to(wide)

    def forget_past(self) -> None:
        self.C_past = self.R_past = self.gate_past = None
