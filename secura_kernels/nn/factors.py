"""C and R of an adapter, and the basis that the core lives in between them."""

import torch
from torch import Tensor

from ..bases import orthonormal_basis, orthonormal_folds, svd_sides
from ..ops import folded_core

# Folding S^-1 into the core magnifies rounding with cond(S); past these values the orthonormal
# bases themselves are stored instead. At 32 in bfloat16 the change is off by less than three times
# what stored bases are (tests/test_linear.py).
LARGEST_CONDITION = {torch.bfloat16: 2**5, torch.float16: 2**8}
LARGEST_CONDITION_WIDE = 2**14
CALIBRATED = {"whitened": "", "natural": ", task=batches"}  # bases that need it, and how


class Factors:
    """The part of ``Adapter`` that knows C and R: slices of W, or stored; with the r x r factors
    ("folds") that the basis multiplies the core by."""

    def C_and_R(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """C (N, r) and R (r, K)."""
        if self.C is not None:
            return self.C, self.R
        return self.slices(weight, self.cols, self.rows)

    def slices(self, weight: Tensor, cols: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """W's columns (N, r) and rows (r, K)."""
        return weight.index_select(1, cols), weight.index_select(0, rows)

    @torch.no_grad()
    def _set_basis(self, weight: Tensor) -> None:
        """Folds the r x r factors of the orthonormal bases into the core, or stores the bases
        where the factors are ill conditioned for the weight's dtype."""
        Q_c, S_c, Q_r, S_r = orthonormal_basis(*self.C_and_R(weight))
        worst = max(float(torch.linalg.cond(S).max()) for S in (S_c, S_r))
        if worst > LARGEST_CONDITION.get(weight.dtype, LARGEST_CONDITION_WIDE):
            self._store(Q_c, Q_r.mT, weight.dtype)
            return
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.fold_c, self.fold_r = (fold.to(wide) for fold in orthonormal_folds(S_c, S_r))

    def _store(self, C: Tensor, R: Tensor, dtype: torch.dtype) -> None:
        self.C, self.R = C.to(dtype).contiguous(), R.to(dtype).contiguous()
        if self.basis == "orthonormal":  # then C and R are orthonormal themselves
            self.fold_c = self.fold_r = None

    @torch.no_grad()
    def whiten(self, fold_c: Tensor, fold_r: Tensor, unit: float | Tensor) -> None:
        """Sets the folds of the whitened basis; what earlier stages have learned stays the change
        that it is.

        Args:
            fold_c, fold_r: (r, r), invertible. unit: ||V||_F^2 unit^2 / 2 is about the change of
                the base model's predictions, in nats a token.
        """
        earlier = self.long_core()
        if earlier is not None:
            between = folded_core((earlier,), self.fold_c, self.fold_r).double()
            earlier = torch.linalg.inv(fold_c) @ between @ torch.linalg.inv(fold_r)
            self.set_long_core(earlier.to(self.core_parameter().dtype))
        wide = torch.promote_types(self.core_parameter().dtype, torch.float32)
        self.fold_c, self.fold_r = fold_c.to(wide), fold_r.to(wide)
        self._set_unit(unit)

    def _set_unit(self, unit: float | Tensor) -> None:
        wide = torch.promote_types(self.core_parameter().dtype, torch.float32)
        unit = torch.as_tensor(unit, dtype=wide, device=self.cols.device)
        self.unit = unit.expand(self.stack).clone()
        self.shared_key, self.calibrated = None, True

    @torch.no_grad()
    def choose(self, cols: Tensor, rows: Tensor, weight: Tensor) -> None:
        """Other columns and rows of W, for a basis that is to be calibrated."""
        stored = self.C is not None
        self.cols, self.rows, self.C, self.R, self.stale = cols, rows, None, None, False
        if stored:
            self.untie(weight)

    def awaits_C_and_R(self) -> bool:
        """Whether those of the svd basis are yet to be loaded or computed: none, or zeros, which
        are places for a file's."""
        return self.basis == "svd" and (self.C is None or not self.C.any())

    def untied_C_and_R(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """C and R as ``untie`` would store them: orthonormal ones for that basis."""
        if self.C is not None and not self.awaits_C_and_R():
            return self.C, self.R
        return self._C_and_R_of(weight)

    def _C_and_R_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """C (N, r) and R (r, K) that the columns and rows of W give: orthonormal ones for that
        basis; those of W's truncated SVD for that one."""
        if self.basis == "svd":
            C, R = svd_sides(weight.detach(), self.r)
            return C.to(weight.dtype), R.to(weight.dtype)
        C, R = self.slices(weight, *(i.to(weight.device) for i in (self.cols, self.rows)))
        if self.basis == "orthonormal":
            C, _, Q_r, _ = orthonormal_basis(C, R)
            R = Q_r.mT
        return C.to(weight.dtype), R.to(weight.dtype)

    def untie(self, weight: Tensor) -> None:
        """Stores C and R, so that W may change."""
        if self.C is None or self.awaits_C_and_R():
            self._store(*self.untied_C_and_R(weight), weight.dtype)

    def has_C_and_R_of(self, weight: Tensor) -> bool:
        """Whether the stored C and R are what the columns and rows of W give: to the bit in the
        coarser dtype of the two; orthonormal ones to a rounding of each element, and where W is in
        another dtype to a rounding of the whole, which quantising W exceeds. Those of a natural
        or an svd basis are of no columns and rows."""
        if self.basis == "svd" or (self.basis == "natural" and self.calibrated):
            return False
        for here, stored in zip(self._C_and_R_of(weight), (self.C, self.R), strict=True):
            same = here.dtype == stored.dtype
            coarser = max(here.dtype, stored.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            eps = torch.finfo(coarser).eps if self.basis == "orthonormal" else 0.0
            stored = stored.to(here.device, coarser).double()
            off = here.to(coarser).double() - stored
            near = off.norm() <= eps * stored.norm()  # NaN: not
            if not near or (same and not (off.abs() <= 2 * eps * (stored.abs() + eps)).all()):
                return False
        return True

    @torch.no_grad()
    def derive(self, weight: Tensor) -> None:
        """Recomputes what derives from the weight and the indices."""
        self.shared_key, self.stale = None, False
        if self.C is not None:
            self._store(self.C, self.R, weight.dtype)
        elif self.basis == "orthonormal":
            self._set_basis(weight)
        if self.basis in CALIBRATED:  # a unit of zero is a place that no file has filled
            self.calibrated = self.unit is not None and bool(self.unit.any())
        if self.importance is not None:
            self.importance.measure(weight)
            self._watch()  # loading may have replaced the parameter
