"""Bytes and operations of every pass, as formulas; README.md beside this file derives them.

Bytes are *distinct* ones, each counted once: what device memory must move when a tile's re-reads
come from the L2 (a program's own results that it reads back are not counted). The tests count the
same from the loads and stores of the kernels themselves.
"""

from dataclasses import dataclass

from ..backends.host import padded_rank
from ..backends.triton.passes.core_gradient import programs_over_rows
from ..backends.triton.tiles import column_parts


@dataclass(frozen=True)
class Cost:
    """``read``, ``written``: bytes. ``flops``: of products; elementwise work counts nothing."""

    read: int
    written: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.read + other.read, self.written + other.written, self.flops + other.flops)


CORE = 4  # bytes of an element of the core, v, P and partial sums: float32
INDEX = 8


@dataclass(frozen=True)
class Layer:
    """A layer of M tokens, N outputs, K inputs and rank r; ``e``, ``g``: bytes of an element of its
    matrices and of its saved gate (bfloat16: 2 and 1). C and R are tied to W, no biases."""

    M: int
    N: int
    K: int
    r: int
    e: int = 2
    g: int = 1

    @property
    def h(self) -> int:
        """Bytes of h, dT or C, a row: padded to 16 ranks."""
        return padded_rank(self.r) * self.e

    def library(self, m: int, n: int, k: int) -> Cost:
        """(m, k) x (k, n) by the library."""
        return Cost((m * k + k * n) * self.e, m * n * self.e, 2 * m * n * k)

    def gather(self) -> Cost:
        """C = W[:, cols], padded."""
        return Cost(self.N * self.r * self.e + self.r * INDEX, self.N * self.h, 0)

    def down(self) -> Cost:
        """t = x R^T, h = alpha t core^T."""
        M, K, r = self.M, self.K, self.r
        return Cost(
            (M * K + r * K) * self.e + r * INDEX + r * r * CORE,
            M * (r * self.e + self.h),
            2 * M * r * (K + r),
        )

    def down_of_gradient(self) -> Cost:
        """v = dY C, dT = alpha v core, without a gate."""
        M, N, r = self.M, self.N, self.r
        return Cost(
            M * N * self.e + N * self.h + r * r * CORE, M * (r * CORE + self.h), 2 * M * r * (N + r)
        )

    def project(self) -> Cost:
        """t = y0[:, rows], h = alpha t core^T."""
        M, r = self.M, self.r
        return Cost(
            M * r * self.e + r * INDEX + r * r * CORE, M * (r * self.e + self.h), 2 * M * r * r
        )

    def product(self) -> Cost:
        """y = x W^T + h C^T, without a gate."""
        return self.library(self.M, self.N, self.K) + self._low_rank(self.N * self.h, self.N)

    def product_of_input_gradient(self) -> Cost:
        """dX = dY W + dT R; R is rows of W, already read."""
        return self.library(self.M, self.K, self.N) + self._low_rank(self.r * INDEX, self.K)

    def _low_rank(self, side: int, width: int) -> Cost:
        return Cost(self.M * self.h + side, 0, 2 * self.M * self.r * width)

    def product_gate(self) -> Cost:
        """The same with S-MagNorm and the saved gate."""
        return self.product() + Cost(0, self.M * self.N * self.g, 0)

    def epilogue(self) -> Cost:
        """y0 -> y in place, with the saved gate."""
        M, N = self.M, self.N
        return Cost(
            M * N * self.e + (M + N) * self.h, M * N * (self.e + self.g), 2 * M * N * self.r
        )

    def gate_backward(self) -> Cost:
        """dY, gate -> db and v in parts. No dadapter_bias."""
        M, N, r = self.M, self.N, self.r
        return Cost(
            M * N * (self.e + self.g) + N * self.h,
            M * N * self.e + self.parts * M * r * CORE,
            2 * M * N * r,
        )

    @property
    def parts(self) -> int:
        """Of v, as *gate backward* leaves it."""
        return column_parts(self.M, self.N)

    def core_gradient(self, spread: bool = True) -> Cost:
        """v, t -> partial sums of d_core; torch adds the partial sums. ``spread``: and dT into
        columns of G' that are in cache, from v in parts."""
        M, r = self.M, self.r
        sums = Cost(M * r * (CORE + self.e), programs_over_rows(M) * r * r * CORE, 2 * M * r * r)
        if not spread:
            return sums
        return sums + Cost(
            (self.parts - 1) * M * r * CORE + r * INDEX + r * r * CORE + M * r * self.e,
            M * r * self.e,
            2 * M * r * r,
        )

    def sum_of_parts(self) -> Cost:
        r = self.r
        return Cost(programs_over_rows(self.M) * r * r * CORE, r * r * CORE, 0)

    def effective_weight(self) -> Cost:
        """W, P -> W_eff; R is rows of W, already read."""
        N, K, r = self.N, self.K, self.r
        P = N * padded_rank(r) * CORE
        return Cost(N * K * self.e + P + r * INDEX, N * K * self.e, 2 * N * K * r)

    def forward(self, gate: bool, one_pass: bool) -> Cost:
        """The output-domain layer, with or without S-MagNorm."""
        if one_pass:
            return self.gather() + self.down() + (self.product_gate() if gate else self.product())
        epilogue = self.epilogue()
        if not gate:
            epilogue += Cost(0, -self.M * self.N * self.g, 0)
        return self.gather() + self.library(self.M, self.N, self.K) + self.project() + epilogue

    def backward(self, gate: bool) -> Cost:
        """Gradients of x and core. Without a gate dX is one pass."""
        core = self.core_gradient(spread=gate) + self.sum_of_parts()
        if gate:
            return (
                self.gather() + self.gate_backward() + core + self.library(self.M, self.K, self.N)
            )
        return self.gather() + self.down_of_gradient() + core + self.product_of_input_gradient()

    def saved_bytes(self, gate: bool) -> int:
        """Saved for the backward pass: t, and the gate."""
        return self.M * (self.r * self.e + self.N * self.g * gate)


@dataclass(frozen=True)
class Batch(Layer):
    """Rows that belong to A adapters of one layer, by I ids of M / I rows each. C is (N, r), not
    padded; each adapter has rows, and those of an id lie in one program's or fill several."""

    A: int = 1
    I: int = 1

    def own_core(self) -> Cost:
        """h = alpha t core^T, each row with its adapter's core."""
        return self._own_core(self.e)

    def own_core_of_gradient(self) -> Cost:
        """dT = alpha v core."""
        return self._own_core(CORE)

    def _own_core(self, p: int) -> Cost:
        M, r = self.M, self.r
        return Cost(M * r * p + self.A * r * r * CORE + self.I * INDEX, M * self.h, 2 * M * r * r)

    def batched_epilogue(self) -> Cost:
        """y0 -> y, with the adapters' biases and the saved gate."""
        M, N, r = self.M, self.N, self.r
        biases = self.A * N * CORE + self.I * INDEX
        return Cost(
            (M * N + N * r) * self.e + M * self.h + biases,
            M * N * (self.e + self.g),
            2 * M * N * r,
        )

    @property
    def adapter_parts(self) -> int:
        """Of the sums: a chunk of rows has one for each of its adapters. At most; an adapter that
        begins where a chunk does takes one less."""
        return programs_over_rows(self.M) + self.A - 1

    def core_parts(self) -> Cost:
        """v, t -> parts of each adapter's d_core."""
        M, r = self.M, self.r
        return Cost(
            M * r * (CORE + self.e) + self._order(),
            self.adapter_parts * r * r * CORE,
            2 * M * r * r,
        )

    def bias_parts(self) -> Cost:
        """G -> parts of each adapter's column sums."""
        M, N = self.M, self.N
        return Cost(M * N * self.e + self._order(), self.adapter_parts * N * CORE, 0)

    def sum_of_core_parts(self) -> Cost:
        return self._sum(self.r * self.r)

    def sum_of_bias_parts(self) -> Cost:
        return self._sum(self.N)

    def _sum(self, width: int) -> Cost:
        return Cost(
            self.adapter_parts * width * CORE + (self.A + 1) * INDEX, self.A * width * CORE, 0
        )

    def _order(self) -> int:
        """Bytes of the ids, their places in the order, and where each adapter begins."""
        return (2 * self.I + self.A + 1) * INDEX
