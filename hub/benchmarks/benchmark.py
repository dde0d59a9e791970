"""``kernels benchmark`` runs this: each function beside the same in plain PyTorch.

The runner compares the two (``torch.allclose``, atol 1e-2); values are of the size of 0.1, so that
bfloat16's own rounding stays below. What it is off by from float64 is checked before, in ``setup``.
"""

import copy
from collections.abc import Callable

import torch
from kernels.benchmark import Benchmark
from torch import Tensor
from torch.nn import functional as F


class CURLayer(Benchmark):
    """1024 tokens, 2048 to 2048 features, rank 64; bfloat16 on a GPU, float32 on a CPU."""

    seed = 0

    def setup(self) -> None:
        M, N, K, r = 1024, 2048, 2048, 64
        to = dict(
            device=self.device, dtype=torch.float32 if self.device == "cpu" else torch.bfloat16
        )
        self.x, self.weight = torch.randn(M, K, **to) / 10, torch.randn(N, K, **to) / K**0.5
        self.bias = torch.randn(N, **to) / 10
        self.core = torch.randn(r, r, device=self.device)
        self.cols, self.rows = self.kernel.select(self.weight, r)
        self.C, self.R = self.weight[:, self.cols], self.weight[self.rows]
        self.y0, self.t = F.linear(self.x, self.weight, self.bias), self.x @ self.R.T
        for name in ("cur_linear", "cur_epilogue", "gated_epilogue"):
            self.check(getattr(self, f"benchmark_{name}"), getattr(self, f"verify_{name}"))

    def check(self, run: Callable, plain: Callable) -> None:
        """Raises AssertionError where the kernel is further from float64 than plain PyTorch is."""
        exact = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(exact, name, value.double())
        truth = getattr(exact, plain.__name__)()
        run()
        ours, eager = (float((y - truth).norm() / truth.norm()) for y in (self.out, plain()))
        assert ours <= eager + 1e-6, f"{run.__name__}: off by {ours:.2e}, PyTorch by {eager:.2e}"

    def delta(self) -> Tensor:
        return self.t @ self.core.to(self.t.dtype).T @ self.C.T

    def benchmark_cur_linear(self) -> None:
        self.out = self.kernel.cur_linear(
            self.x, self.weight, self.core, cols=self.cols, rows=self.rows, bias=self.bias
        )

    def verify_cur_linear(self) -> Tensor:
        h = (self.x @ self.R.T) @ self.core.to(self.x.dtype).T
        return F.linear(self.x, self.weight, self.bias) + h @ self.C.T

    def benchmark_cur_epilogue(self) -> None:
        self.out = self.kernel.cur_epilogue(self.y0, self.t, self.core, self.C)

    def verify_cur_epilogue(self) -> Tensor:
        return self.y0 + self.delta()

    def benchmark_gated_epilogue(self) -> None:
        self.out = self.kernel.cur_epilogue(
            self.y0, self.t, self.core, self.C, norm=self.kernel.SMagNorm()
        )

    def verify_gated_epilogue(self) -> Tensor:
        norm, d = self.kernel.SMagNorm(), self.delta()
        rho = d.abs() / (self.y0.abs() + norm.eps)
        gate = 1 + torch.sigmoid(norm.scale * (norm.shift - rho / norm.ref))
        return (norm.base_weight * self.y0 + d) / gate
