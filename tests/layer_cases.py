"""Every form of the layer, by name, and one random case of each: shared by the tests."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from secura_kernels import SMagNorm, cur_linear
from secura_kernels.backends import reference
from secura_kernels.backends.operands import CurOperands
from secura_kernels.bases import svd_sides

NORMS = {"no gate": None} | {
    f"{preset}, {domain}, ref {ref}, {'detached' if detach else 'full'}": SMagNorm.preset(
        preset, domain=domain, ref=ref, detach_gate=detach
    )
    for preset, domain, ref, detach in product(
        ("calibrated", "published", "figure"), ("output", "weight"), (1.0, "max"), (True, False)
    )
}
ALL_NORMS = dict(argvalues=list(NORMS.values()), ids=list(NORMS))
# Those that there are kernels of.
DETACHED = {name: norm for name, norm in NORMS.items() if norm is None or norm.detach_gate}


@dataclass
class Case:
    """Random arguments of one layer; W (N, K), x (M, K), duplicates among cols and rows. ``sides``:
    a stored C (N, r) and R (r, K) that are no slices of W."""

    x: Tensor
    W: Tensor
    bias: Tensor | None
    core: Tensor
    cols: Tensor
    rows: Tensor
    adapter_bias: Tensor | None
    decay: Tensor | None
    alpha: float = 0.7
    tied: bool = True
    sides: tuple[Tensor, Tensor] | None = None
    task_gate: Tensor | None = None

    @property
    def C_and_R(self) -> tuple[Tensor, Tensor]:
        if self.sides is not None:
            return self.sides
        return self.W[:, self.cols], self.W[self.rows, :]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of y and of the gradients of ``trained``."""
        return QUANTITIES[: 1 + len(self.trained())]

    def trained(self) -> list[Tensor]:
        found = [self.x, self.core, self.adapter_bias]
        return [t for t in found if t is not None]

    def rounded_again(self) -> "Case":
        return replace(
            self, x=rounded_again(self.x, self.dtype), W=rounded_again(self.W, self.dtype)
        )

    def ours(self, norm, x=None, core=None, adapter_bias=None, impl="auto"):
        C, R = self.C_and_R
        where = dict(cols=self.cols, rows=self.rows) if self.tied else dict(C=C, R=R)
        return cur_linear(
            self.x if x is None else x,
            self.W,
            self.core if core is None else core,
            bias=self.bias,
            alpha=self.alpha,
            norm=norm,
            decay=self.decay,
            task_gate=self.task_gate,
            impl=impl,
            adapter_bias=self.adapter_bias if adapter_bias is None else adapter_bias,
            **where,
        )

    def operands(self, norm) -> CurOperands:
        C, R = (None, None) if self.tied else self.C_and_R
        cols, rows = (self.cols, self.rows) if self.tied else (None, None)
        return CurOperands(
            self.W,
            self.bias,
            self.core,
            cols,
            rows,
            C,
            R,
            self.adapter_bias,
            self.decay,
            self.alpha,
            norm,
            self.task_gate,
        )

    def eager(self, norm, dtype=None):
        """The plain formula, in ``dtype`` (its own by default), on leaves of its own."""

        def to(t):
            return None if t is None else t.detach().to(dtype or t.dtype)

        leaves = [
            None if t is None else to(t).requires_grad_()
            for t in (self.x, self.core, self.adapter_bias)
        ]
        C, R = self.C_and_R
        y = reference.cur_linear(
            leaves[0],
            to(self.W),
            to(self.bias),
            leaves[1],
            to(C),
            to(R),
            alpha=self.alpha,
            norm=norm,
            adapter_bias=leaves[2],
            decay=to(self.decay),
            task_gate=to(self.task_gate),
        )
        return y, [leaf for leaf in leaves if leaf is not None]


def case(
    M=7,
    N=12,
    K=10,
    r=4,
    dtype=torch.float64,
    *,
    tied=True,
    bias=True,
    adapter_bias=True,
    decay=True,
    core_dtype=None,
    task_gate=False,
    device="cpu",
) -> Case:
    core_dtype = core_dtype or torch.promote_types(dtype, torch.float32)
    cols, rows = torch.randint(K, (r,)), torch.randint(N, (r,))
    cols[-1], rows[-1] = cols[0], rows[0]
    return Case(
        x=torch.randn(M, K).to(device, dtype).requires_grad_(),
        W=(torch.randn(N, K) / K**0.5).to(device, dtype),
        bias=torch.randn(N).to(device, dtype) if bias else None,
        core=torch.randn(r, r).to(device, core_dtype).requires_grad_(),
        cols=cols.to(device),
        rows=rows.to(device),
        adapter_bias=(
            torch.randn(N).to(device, core_dtype).requires_grad_() if adapter_bias else None
        ),
        decay=torch.where(torch.rand(N) > 0.5, 0.9, 1.0).to(device) if decay else None,
        tied=tied,
        task_gate=(torch.randn(r, 2) / r).to(device, core_dtype) if task_gate else None,
    )


def relative_error(a: Tensor, truth: Tensor) -> float:
    """|a - truth| / |truth| in the Frobenius norm."""
    difference = torch.linalg.vector_norm(a.detach().double() - truth.detach().double())
    return float(difference / torch.linalg.vector_norm(truth.detach().double()).clamp_min(1e-30))


# The forms whose precision is compared. "published" and "figure" jump where d leaves 0, so a d that
# rounds to 0 costs a third of the value, in eager PyTorch as here: float32 only, where no d does.
PRECISION_NORMS = {
    "no gate": None,
    "output": SMagNorm(),
    "output, max": SMagNorm(ref="max"),
    "output, full": SMagNorm(detach_gate=False),
    "weight": SMagNorm(domain="weight"),
    "weight, full": SMagNorm(domain="weight", detach_gate=False),
    "published": SMagNorm.preset("published"),
    "figure": SMagNorm.preset("figure"),
}
QUANTITIES = ("y", "dx", "dcore", "dadapter_bias")


def skip_where_low_precision_jumps(norm: SMagNorm | None, dtype: torch.dtype) -> None:
    if norm is not None and not norm.continuous and dtype != torch.float32:
        pytest.skip("the preset jumps at d = 0, which low precision reaches")


def check_no_more_than_eager(
    cases: Iterable[Case], norm: SMagNorm | None, impl: str, beside: dict[str, float] | None = None
) -> None:
    """Errors of y and of every gradient against float64, pooled over the cases, are no more than
    the eager formula's in the same dtype, plus 1e-6. ``beside``: independent errors, by quantity,
    that ours may have beside eager's; squares add."""
    found: dict[str, list[tuple[float, float]]] = {}
    for c in cases:
        truth, true_leaves = c.eager(norm, torch.float64)
        dy = torch.randn_like(truth).to(c.dtype)
        y, (eager, leaves) = c.ours(norm, impl=impl), c.eager(norm)
        triples = zip(
            (y, *torch.autograd.grad(y, c.trained(), dy)),
            (eager, *torch.autograd.grad(eager, leaves, dy)),
            (truth, *torch.autograd.grad(truth, true_leaves, dy.double())),
            strict=True,
        )
        for name, (ours, plain, true) in zip(c.quantities, triples, strict=True):
            pair = relative_error(ours, true), relative_error(plain, true)
            found.setdefault(name, []).append(pair)
    # A full derivative jumps where d changes sign: an element whose d is under its own rounding
    # costs its whole slope, in eager PyTorch as here, so one case in some is far off: medians.
    full = norm is not None and not norm.detach_gate
    pooled = statistics.median if full else _root_mean_square
    for name, pairs in found.items():
        ours, eager = (pooled([p[i] for p in pairs]) for i in (0, 1))
        eager = math.hypot(eager, (beside or {}).get(name, 0.0))
        assert ours <= eager + 1e-6, f"{name}: {ours:.3e}, eager {eager:.3e}"


def _root_mean_square(values: list[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))


def compare(c: Case, norm, impl, dy=None):
    """y and gradients, case by case, are off by no more than a few times what the plain formula in
    this dtype is, and what one more rounding of x, W and dy would do, the worst of three: a sum
    that cancels scatters, and ref="max" hangs on the one element whose base is nearest to 0."""
    y = c.ours(norm, impl=impl)
    dy = torch.randn_like(y) if dy is None else dy

    def plain(case, dy, dtype=None):
        value, leaves = case.eager(norm, dtype)
        return value, *torch.autograd.grad(value, leaves, dy.to(value.dtype))

    truth = plain(c, dy, torch.float64)
    assert y.shape == truth[0].shape and y.dtype == c.dtype and y.is_contiguous()
    again = [plain(c.rounded_again(), rounded_again(dy, c.dtype), torch.float64) for _ in range(3)]
    ours = y, *torch.autograd.grad(y, c.trained(), dy)
    for name, value, eager, true, *moved in zip(
        c.quantities, ours, plain(c, dy), truth, *again, strict=True
    ):
        error = relative_error(value, true)
        allowed = (
            3 * (relative_error(eager, true) + max(relative_error(m, true) for m in moved)) + 1e-6
        )
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


def rounded_again(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In float64, off at random by what one more rounding to ``dtype`` would do."""
    wide, step = tensor.detach().double(), torch.finfo(dtype).eps / 2
    return wide * (1 + step * torch.randn_like(wide))


def small_change(
    *shape: int, dtype: torch.dtype, tied: bool, biases: bool, device="cpu", **settings
) -> Case:
    """A case whose core is as small as a trained one's."""
    settings = dict(decay=False) | settings
    c = case(*shape, dtype, tied=tied, bias=biases, adapter_bias=biases, device=device, **settings)
    with torch.no_grad():
        c.core.mul_(0.3 / shape[-1])
    return c


def between_singular_directions(c: Case) -> Case:
    """The case with the svd basis's C and R, as a layer stores them."""
    sides = svd_sides(c.W, c.core.shape[0])
    return replace(c, tied=False, sides=tuple(side.to(c.W.dtype) for side in sides))


def check_derivatives(c, norm: SMagNorm | None) -> None:
    """y, first and second derivatives are those of the eager formula; float64. ``c``: a ``Case``,
    or another with its methods."""
    y, (z, leaves) = c.ours(norm), c.eager(norm)
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, c.trained(), dy, retain_graph=True)
    differentiable = torch.autograd.grad(y, c.trained(), dy, create_graph=True)
    expected = torch.autograd.grad(z, leaves, dy, create_graph=True)
    for a, b, e in zip(first, differentiable, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(b, e, rtol=1e-10, atol=1e-10)
    directions = [torch.randn_like(e) for e in expected]

    def second(gradients, inputs):
        total = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
        return torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)

    for a, b in zip(second(differentiable, c.trained()), second(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
