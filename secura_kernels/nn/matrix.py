"""The change of an adapter as a matrix: what it adds to W, and W with it."""

import torch
from torch import Tensor

from ..backends.reference import delta_weight
from ..backends.reference.weight import effective_weight


class MatrixForm:
    """The part of ``Adapter`` that forms (N, K) matrices, for merging, stages and files."""

    @torch.no_grad()
    def delta(self, weight: Tensor, trained: Tensor | None = None) -> Tensor:
        """delta_W (N, K) of a trained core, float32 (float64 for a float64 weight)."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        core = self.core(trained).to(wide)
        return delta_weight(core, *(side.to(wide) for side in self.C_and_R(weight)), self.alpha)

    @torch.no_grad()
    def effective(self, weight: Tensor, first: Tensor | None = None) -> Tensor:
        """W_eff (N, K): S-MagNorm of W and delta_W, for a gate in the weight domain. ``first``: see
        ``linear``."""
        return effective_weight(self.operands(weight, first=first))[0]

    def is_linear(self) -> bool:
        """Whether the layer is a linear map of x, so that it can be merged: not where something is
        being learned through a gate on outputs, or was through one for tokens of the task."""
        return not self.has_gated() and (
            self.norm is None
            or self.norm.domain == "weight"
            or not any(p.any() for p in self.learned_parameters())
        )

    @torch.no_grad()
    def merged_matrix(self, weight: Tensor, onto: Tensor | None = None) -> Tensor:
        """W (N, K) with all that was learned, stages included; float32, or float64 for a float64
        one. ``is_linear`` must hold.

        Args:
            onto: what the change is added to in the place of W, where it is a sum (no gate).
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        if self.norm is not None and self.norm.domain == "weight":
            return self.effective(self.stage_matrix(weight), weight).to(wide)
        return self.whole_delta(weight).add_(weight if onto is None else onto)

    def whole_delta(self, weight: Tensor) -> Tensor:
        """delta_W (N, K) of what is trained, of earlier stages and earlier bases."""
        return self.delta(weight, self._whole_core()) + self.past_delta()

    def stage_matrix(self, weight: Tensor) -> Tensor:
        """The matrix (N, K) that a gate divides: W and, after stages, what they have left."""
        earlier = self.long_core()
        if earlier is None:
            return weight
        return self.delta(weight, earlier).add_(weight).to(weight.dtype)

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """C (N, q), core (q, q), R (q, K) with delta_W = C core R, M2 stages and the past included;
        q = r without a past. Detached, and all task gates open."""
        (C, R), core = self.C_and_R(weight), self.alpha * self.core(self._whole_core())
        if self.C_past is None:
            return C, core, R
        unit = torch.eye(len(self.R_past), dtype=core.dtype, device=core.device)
        return (
            torch.cat([self.C_past, C], 1),
            torch.block_diag(unit, core),
            torch.cat([self.R_past, R]),
        )
