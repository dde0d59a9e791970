"""The change of one frozen weight, alpha C core R: indices, trained core, gate; not the weight.

An adapter holds nothing of W but what it was told to store, so that one weight can serve many
adapters. Methods that need W are given it as ``weight`` (N, K).
"""

from dataclasses import asdict

import torch
from torch import Tensor, nn

from .checks import check_choice, check_int, check_number, fail
from .functional import cur_linear_and_moved
from .importance import ImportanceState
from .reference import cabr_core, delta_weight
from .reference.weight_domain import effective_weight
from .selection import BASES, check_indices, check_weight, orthonormal_basis
from .smagnorm import ImportanceDecay, SMagNorm

A_INITS = ("published", "truncated_svd")
# Folding S^-1 into the core magnifies rounding with cond(S); past these values the orthonormal
# bases themselves are stored instead. At 32 in bfloat16 the change is off by less than three times
# what stored bases are (tests/test_modules.py).
LARGEST_CONDITION = {torch.bfloat16: 2**5, torch.float16: 2**8}
LARGEST_CONDITION_WIDE = 2**14


class Adapter(nn.Module):
    """What CURLoRA's and SECURA's changes share.

    Args:
        weight: W (N, K), read only. cols, rows: (r,) int64. Others: see ``CURLoRALinear``.
    """

    def __init__(
        self,
        weight: Tensor,
        cols: Tensor,
        rows: Tensor,
        *,
        alpha: float = 1.0,
        basis: str = "raw",
        norm: SMagNorm | str | dict | None = None,
        importance_decay: ImportanceDecay | None = None,
    ) -> None:
        super().__init__()
        check_weight(weight)
        check_indices("cols", cols, weight.shape[1])
        check_indices("rows", rows, weight.shape[0])
        if cols.shape != rows.shape:
            raise fail("rows.shape", tuple(rows.shape), f"{tuple(cols.shape)}, the shape of cols")
        check_choice("basis", basis, BASES)
        norm = SMagNorm.of(norm)
        if importance_decay is not None and not isinstance(importance_decay, ImportanceDecay):
            raise fail("importance_decay", importance_decay, "an ImportanceDecay or None")
        if importance_decay is not None and norm is None:
            raise fail("importance_decay", importance_decay, "None without a norm, whose gate it "
                                                             "counts")
        self.out_features, self.in_features = weight.shape
        self.r = cols.numel()
        self.alpha = check_number("alpha", alpha, "a finite number", -torch.inf)
        self.basis, self.norm = basis, norm
        self.importance_decay = importance_decay

        self.register_buffer("cols", cols.to(weight.device, copy=True))
        self.register_buffer("rows", rows.to(weight.device, copy=True))
        for name in ("C", "R"):  # only where they are not slices of W
            self.register_buffer(name, None)
        for name in ("fold_c", "fold_r"):  # derived, never saved
            self.register_buffer(name, None, persistent=False)
        self.register_parameter("adapter_bias", None)
        if basis == "orthonormal":
            self._set_basis(weight)
        self.importance = None
        if importance_decay is not None:
            self.importance = ImportanceState(weight, self.r, importance_decay)

    # What a subclass says of its trained core.

    def trained_core(self) -> Tensor:
        """What is trained, as (r, r): U, or A^T B^T; between orthonormal bases with that basis."""
        raise NotImplementedError

    def core_parameter(self) -> nn.Parameter:
        """The parameter that is zero at the start: U, or B."""
        raise NotImplementedError

    def long_core(self) -> Tensor | None:
        """The core (r, r) accumulated by M2 stages; None before the first."""
        raise NotImplementedError

    def accumulate(self) -> None:
        """Adds the trained core to the long-term one (M2)."""
        raise NotImplementedError

    # The forward pass.

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
        """(..., K) -> (..., N): x W^T + bias, changed."""
        y, moved = cur_linear_and_moved(
            x, weight, self.core(), **self.operands(), bias=bias, impl=impl, **self._gate())
        self._count(moved, weight if self.norm and self.norm.domain == "weight" else y)
        return y

    def _gate(self) -> dict:
        importance = self.importance
        counting = importance is not None and self.training
        return dict(alpha=self.alpha, norm=self.norm, adapter_bias=self.adapter_bias,
                    decay=None if importance is None else importance.factor,
                    edge=self.importance_decay.edge if counting else 0.0)

    def _count(self, moved: Tensor, gated: Tensor) -> None:
        if self.importance is not None and self.training:
            self.importance.add(moved, gated.numel())

    def core(self, trained: Tensor | None = None) -> Tensor:
        """The core (r, r) between C and R, differentiable: S_c^-1 V S_r^-T for a folded basis."""
        with torch.autocast(self.cols.device.type, enabled=False):
            core = self.trained_core() if trained is None else trained
            if self.fold_c is None:
                return core
            return self.fold_c.to(core.dtype) @ core @ self.fold_r.to(core.dtype)

    # C and R.

    def operands(self) -> dict[str, Tensor | None]:
        """What C and R are: indices while tied to W, else the stored matrices."""
        tied = self.C is None
        return dict(cols=self.cols if tied else None, rows=self.rows if tied else None,
                    C=self.C, R=self.R)

    def sides(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """C (N, r) and R (r, K)."""
        if self.C is not None:
            return self.C, self.R
        return weight.index_select(1, self.cols), weight.index_select(0, self.rows)

    @torch.no_grad()
    def _set_basis(self, weight: Tensor) -> None:
        """Folds the r x r factors of the orthonormal bases into the core, or stores the bases
        where the factors are ill conditioned for the weight's dtype."""
        Q_c, S_c, Q_r, S_r = orthonormal_basis(*self.sides(weight))
        worst = max(float(torch.linalg.cond(S)) for S in (S_c, S_r))
        if worst > LARGEST_CONDITION.get(weight.dtype, LARGEST_CONDITION_WIDE):
            self._store(Q_c, Q_r.T, weight.dtype)
            return
        wide = torch.promote_types(weight.dtype, torch.float32)
        unit = torch.eye(self.r, dtype=S_c.dtype, device=S_c.device)
        self.fold_c = torch.linalg.solve_triangular(S_c, unit, upper=True).to(wide)
        self.fold_r = torch.linalg.solve_triangular(S_r, unit, upper=True).T.contiguous().to(wide)

    def _store(self, C: Tensor, R: Tensor, dtype: torch.dtype) -> None:
        self.C, self.R = C.to(dtype).contiguous(), R.to(dtype).contiguous()
        self.fold_c = self.fold_r = None

    def untied_sides(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """C and R as ``untie`` would store them: orthonormal ones for that basis."""
        C, R = self.sides(weight)
        if self.C is None and self.basis == "orthonormal":
            C, _, Q_r, _ = orthonormal_basis(C, R)
            R = Q_r.T
        return C.to(weight.dtype), R.to(weight.dtype)

    def untie(self, weight: Tensor) -> None:
        """Stores C and R, so that W may change."""
        if self.C is None:
            self._store(*self.untied_sides(weight), weight.dtype)

    @torch.no_grad()
    def derive(self, weight: Tensor) -> None:
        """Recomputes what derives from the weight and the indices."""
        if self.C is not None:
            self._store(self.C, self.R, weight.dtype)
        else:
            self.fold_c = self.fold_r = None
            if self.basis == "orthonormal":
                self._set_basis(weight)
        if self.importance is not None:
            self.importance.measure(weight)

    # The change as a matrix.

    @torch.no_grad()
    def delta(self, weight: Tensor, trained: Tensor | None = None) -> Tensor:
        """delta_W (N, K) of a trained core, float32 (float64 for a float64 weight)."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        core = self.core(trained).to(wide)
        return delta_weight(core, *(side.to(wide) for side in self.sides(weight)), self.alpha)

    def changed(self, weight: Tensor, base: Tensor, trained: Tensor) -> Tensor:
        """base + delta_W of a trained core, rounded once; C and R those of ``weight``."""
        return self.delta(weight, trained).add_(base).to(base.dtype)

    @torch.no_grad()
    def effective(self, weight: Tensor) -> Tensor:
        """W_eff (N, K): S-MagNorm of W and delta_W, for a gate in the weight domain."""
        factor = None if self.importance is None else self.importance.factor
        return effective_weight(weight, core=self.core(), decay=factor, alpha=self.alpha,
                                norm=self.norm, **self.operands())[0]

    # State.

    def settings(self) -> dict:
        """What an adapter and a saved state must agree on, as JSON values."""
        decay = self.importance_decay
        return dict(alpha=self.alpha, basis=self.basis,
                    norm=None if self.norm is None else self.norm.to_dict(),
                    importance_decay=None if decay is None else asdict(decay))

    def late_shapes(self) -> dict[str, tuple[int, int]]:
        """Saved tensors that exist only once bases are stored or a stage has been taken."""
        return {"C": (self.out_features, self.r), "R": (self.r, self.in_features)}

    def __setstate__(self, values: dict) -> None:
        super().__setstate__(values)  # of a copy, whose parameters have lost their hooks
        if self.importance is not None:
            self.importance.watch(self.core_parameter())


class CURLoRAAdapter(Adapter):
    """CURLoRA's change: U (r, r) is trained, zero at the start. See ``CURLoRALinear``."""

    def __init__(self, weight: Tensor, cols: Tensor, rows: Tensor, **settings) -> None:
        super().__init__(weight, cols, rows, **settings)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.U = nn.Parameter(torch.zeros(self.r, self.r, dtype=dtype, device=weight.device))
        self.register_buffer("U_long", None)
        if self.importance is not None:
            self.importance.watch(self.U)

    def trained_core(self) -> Tensor:
        return self.U

    def core_parameter(self) -> nn.Parameter:
        return self.U

    def long_core(self) -> Tensor | None:
        return self.U_long

    def late_shapes(self) -> dict[str, tuple[int, int]]:
        return super().late_shapes() | {"U_long": (self.r, self.r)}

    def accumulate(self) -> None:
        self.U_long = self.U.detach() + (0 if self.U_long is None else self.U_long)


class SECURAAdapter(Adapter):
    """SECURA's change: A (m, r) and B (r, m) are trained, and a bias. See ``SECURALinear``."""

    def __init__(
        self,
        weight: Tensor,
        cols: Tensor,
        rows: Tensor,
        *,
        m: int | None = None,
        norm: SMagNorm | str | dict | None = "calibrated",
        a_init: str = "published",
        adapter_bias: bool = True,
        **settings,
    ) -> None:
        super().__init__(weight, cols, rows, norm=norm, **settings)
        if m is None:
            m = min(max(self.r + 1, self.r * 4 // 3), self.in_features)
        self.m = check_int("m", m, self.r + 1, self.in_features,
                           f", above r={self.r} and at most K={self.in_features}")
        check_choice("a_init", a_init, A_INITS)
        check_choice("adapter_bias", adapter_bias, (True, False))
        A = self._start(weight, a_init)
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(A.new_zeros(self.r, self.m))
        if adapter_bias:
            self.adapter_bias = nn.Parameter(A.new_zeros(self.out_features))
        for name in ("A_long", "B_long"):
            self.register_buffer(name, None)
        if self.importance is not None:
            self.importance.watch(self.B)

    @torch.no_grad()
    def _start(self, weight: Tensor, a_init: str) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if a_init == "published":
            return weight[:self.r, :self.m].T.to(dtype).contiguous()
        devices = [weight.device] if weight.is_cuda else []
        with torch.random.fork_rng(devices):  # the randomised SVD draws from the global generator
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(weight.to(dtype), q=self.r)
        return ((U[:self.r] * S) @ V[:self.m].T).T.contiguous()

    def settings(self) -> dict:
        return super().settings() | dict(adapter_bias=self.adapter_bias is not None)

    def trained_core(self) -> Tensor:
        return cabr_core(self.A, self.B)

    def core_parameter(self) -> nn.Parameter:
        return self.B

    def long_core(self) -> Tensor | None:
        return None if self.B_long is None else cabr_core(self.A_long, self.B_long)

    def late_shapes(self) -> dict[str, tuple[int, int]]:
        return super().late_shapes() | {"A_long": (self.m, self.r), "B_long": (self.r, self.m)}

    def accumulate(self) -> None:
        """B_long <- B_long + B, A_long <- A."""
        self.B_long = self.B.detach() + (0 if self.B_long is None else self.B_long)
        self.A_long = self.A.detach().clone()
