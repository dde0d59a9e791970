"""The two adapters: CURLoRA's core U, and SECURA's core A^T B^T with its bias."""

import torch
from torch import Tensor, nn

from ..backends.reference import cabr_core
from ..checks import check_choice, check_int, fail
from .adapter import Adapter

A_INITS = ("published", "truncated_svd")


class CURLoRAAdapter(Adapter):
    """CURLoRA's change: U (r, r) is trained, zero at the start. See ``CURLoRALinear``."""

    def __init__(self, weight: Tensor, cols: Tensor, rows: Tensor, **settings) -> None:
        super().__init__(weight, cols, rows, **settings)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        U = torch.zeros(*self.stack, self.r, self.r, dtype=dtype, device=weight.device)
        self.U = nn.Parameter(U)
        self.register_buffer("U_long", None)
        self._watch()

    def core_parameters(self) -> tuple[Tensor, ...]:
        return (self.U,)

    def core_parameter(self) -> nn.Parameter:
        return self.U

    @staticmethod
    def trained_cores(adapters: list[Adapter]) -> Tensor:
        return torch.stack([a.U for a in adapters])

    def long_core(self) -> Tensor | None:
        return self.U_long

    def set_long_core(self, core: Tensor | None) -> None:
        self.U_long = core

    def optional_groups(self) -> list[dict[str, tuple[int, ...]]]:
        return [*super().optional_groups(), {"U_long": (*self.stack, self.r, self.r)}]

    def accumulate(self, kind: str) -> None:
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
        a_init: str = "published",
        adapter_bias: bool = True,
        **settings,
    ) -> None:
        super().__init__(weight, cols, rows, **settings)
        if self.r >= self.in_features:
            raise fail(
                "r",
                self.r,
                f"less than K={self.in_features}: SECURA's m is above r and at "
                "most K (CURLoRA takes r up to min(N, K))",
            )
        if m is None:
            m = min(max(self.r + 1, self.r * 4 // 3), self.in_features)
        self.m = check_int(
            "m",
            m,
            self.r + 1,
            self.in_features,
            f", above r={self.r} and at most K={self.in_features}",
        )
        check_choice("a_init", a_init, A_INITS)
        check_choice("adapter_bias", adapter_bias, (True, False))
        A = self._start(weight, a_init)
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(A.new_zeros(*self.stack, self.r, self.m))
        if adapter_bias:
            self.adapter_bias = nn.Parameter(A.new_zeros(*self.stack, self.out_features))
        for name in ("A_long", "B_long", "core_long"):
            self.register_buffer(name, None)
        self._watch()

    @torch.no_grad()
    def _start(self, weight: Tensor, a_init: str) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if a_init == "published":
            # A copy, even where the slice lies in memory as A would: A is trained, W is not.
            return weight[..., : self.r, : self.m].mT.to(
                dtype, copy=True, memory_format=torch.contiguous_format
            )
        devices = [weight.device] if weight.is_cuda else []
        with torch.random.fork_rng(devices):  # the randomised SVD draws from the global generator
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(weight.to(dtype), q=self.r)
        return ((U[..., : self.r, :] * S[..., None, :]) @ V[..., : self.m, :].mT).mT.contiguous()

    def settings(self) -> dict:
        return super().settings() | dict(adapter_bias=self.adapter_bias is not None)

    def core_parameters(self) -> tuple[Tensor, ...]:
        return self.A, self.B

    def core_parameter(self) -> nn.Parameter:
        return self.B

    @staticmethod
    def trained_cores(adapters: list[Adapter]) -> Tensor:
        A, B = (torch.stack([getattr(a, name) for a in adapters]) for name in ("A", "B"))
        return A.mT @ B.mT

    def long_core(self) -> Tensor | None:
        if self.core_long is not None:
            return self.core_long
        return None if self.B_long is None else cabr_core(self.A_long, self.B_long)

    def set_long_core(self, core: Tensor | None) -> None:
        self.core_long, self.A_long, self.B_long = core, None, None

    def optional_groups(self) -> list[dict[str, tuple[int, ...]]]:
        return [
            *super().optional_groups(),
            {"core_long": (*self.stack, self.r, self.r)},
            {"A_long": (*self.stack, self.m, self.r), "B_long": (*self.stack, self.r, self.m)},
        ]

    def accumulate(self, kind: str) -> None:
        """M1: core_long <- core_long + A^T B^T. M2: B_long <- B_long + B, A_long <- A."""
        if (self.B_long if kind == "m1" else self.core_long) is not None:
            other = "m2" if kind == "m1" else "m1"
            raise RuntimeError(
                f"stage_{kind} after stage_{other}: an adapter takes one kind of stage"
            )
        if kind == "m1":
            core = self.trained_core().detach()
            self.core_long = core + (0 if self.core_long is None else self.core_long)
        else:
            self.B_long = self.B.detach() + (0 if self.B_long is None else self.B_long)
            self.A_long = self.A.detach().clone()
