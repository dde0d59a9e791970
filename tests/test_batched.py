"""``cur_batched``: one batch, several adapters; each sample is its own single run."""

import math
from dataclasses import dataclass

import pytest
import torch
from devices import DEVICE, MARKS, poisoned_memory
from epilogue_cases import EVERY_IMPL, EpilogueCase
from layer_cases import PRECISION_NORMS, relative_error, skip_where_low_precision_jumps
from torch import Tensor
from torch.library import opcheck

from secura_kernels import SMagNorm
from secura_kernels.backends.reference import batched as reference
from secura_kernels.backends.triton import batched as triton_mixed
from secura_kernels.backends.triton.launch import instead_of_launching
from secura_kernels.functional.epilogue import cur_batched
from secura_kernels.ops import pack_norm
from secura_kernels.ops.batched import cur_batched as op

pytestmark = MARKS

NORMS = {
    k: n
    for k, n in PRECISION_NORMS.items()
    if n is None or (n.domain == "output" and n.detach_gate)
}
FORMS = {"no gate": None, "gate": SMagNorm(), "max": SMagNorm(ref="max")}
ADAPTERS = [3, -1, 0, 4, 2, 1, -1, 3]  # five, one of them twice, and the base


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_memory():
        yield


@dataclass
class Batch:
    """y0 (B, S, N), t (B, S, r), C (N, r), cores (5, r, r), adapter_bias (5, N) or None."""

    y0: Tensor
    t: Tensor
    cores: Tensor
    C: Tensor
    adapter_bias: Tensor | None
    adapter: Tensor
    alpha: float = 0.7

    def ours(self, norm, impl="auto", **changes):
        tensors = (
            dict(
                y0=self.y0,
                t=self.t,
                cores=self.cores,
                adapter=self.adapter,
                C=self.C,
                adapter_bias=self.adapter_bias,
            )
            | changes
        )
        return cur_batched(**tensors, alpha=self.alpha, norm=norm, impl=impl)

    def single(self, i: int) -> EpilogueCase:
        k = self.adapter[i]
        bias = self.C.new_zeros(len(self.C)) if self.adapter_bias is None else self.adapter_bias[k]
        return EpilogueCase(self.y0[i], self.t[i], self.cores[k], self.C, bias, None, self.alpha)


def batch(S=7, N=45, r=5, dtype=torch.float32, bias=True, adapters=ADAPTERS) -> Batch:
    """Sizes of a trained adapter's: a change of a third of the base."""

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape).to(DEVICE, dtype)

    B = len(adapters)
    return Batch(
        normal(B, S, N, dtype=dtype),
        normal(B, S, r, dtype=dtype),
        normal(5, r, r) * 0.3 / r,
        normal(N, r, dtype=dtype),
        0.1 * normal(5, N) if bias else None,
        torch.tensor(adapters, device=DEVICE),
    )


@EVERY_IMPL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_error_is_no_more_than_eager_single_runs(norm, dtype, impl):
    """Against float64, over all samples; a sample without an adapter is y0 to the bit."""
    skip_where_low_precision_jumps(norm, dtype)
    ours, eager = [], []
    for S, N, r, bias in ((1, 131, 3, True), (70, 67, 16, False), (33, 90, 150, True)):
        c = batch(S, N, r, dtype, bias)
        with torch.no_grad():
            y = c.ours(norm, impl)
        assert y.dtype == dtype and y.shape == c.y0.shape and y.is_contiguous()
        for i, k in enumerate(ADAPTERS):
            if k < 0:
                assert torch.equal(y[i], c.y0[i])
                continue
            truth = c.single(i).eager(norm, torch.float64)[0]
            ours.append(relative_error(y[i], truth) ** 2)
            eager.append(relative_error(c.single(i).eager(norm)[0], truth) ** 2)
    assert math.sqrt(sum(ours) / len(ours)) <= math.sqrt(sum(eager) / len(ours)) + 1e-6


@EVERY_IMPL
@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_equals_single_runs_in_every_layout(norm, impl):
    """Two, three and four dimensions; sliced, transposed and expanded operands."""
    c = batch()
    y = c.ours(norm, impl)
    for i in (0, 2, 7):
        torch.testing.assert_close(y[i], c.single(i).ours(norm, impl=impl))
    kept = c.y0.clone()
    strided = dict(
        y0=c.y0.transpose(0, 2).contiguous().transpose(0, 2),
        t=torch.stack([c.t, c.t], 3)[..., 0],
        cores=c.cores.mT.contiguous().mT,
        C=c.C.T.contiguous().T,
        adapter=torch.stack([c.adapter, c.adapter], 1)[:, 0],
        adapter_bias=torch.stack([c.adapter_bias] * 2, 2)[..., 0],
    )
    assert torch.equal(c.ours(norm, impl, **strided), y) and torch.equal(c.y0, kept)
    one = dict(cores=c.cores[:1].expand(5, -1, -1), y0=c.y0[:1].expand(8, -1, -1))
    torch.testing.assert_close(
        c.ours(norm, impl, **one)[[0, 2]],
        c.ours(norm, impl, **{k: v.contiguous() for k, v in one.items()})[[0, 2]],
    )
    tokens = c.ours(norm, impl, y0=c.y0[:, 0], t=c.t[:, 0])
    torch.testing.assert_close(tokens, c.ours(norm, impl, y0=c.y0[:, :1], t=c.t[:, :1])[:, 0])
    more = batch(S=6)
    shape = dict(y0=more.y0.view(8, 2, 3, 45), t=more.t.view(8, 2, 3, 5))
    assert torch.equal(more.ours(norm, impl, **shape).view(8, 6, 45), more.ours(norm, impl))


@EVERY_IMPL
@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_nothing_to_do(norm, impl):
    for B, S in ((0, 3), (8, 0)):
        c = batch(S)
        y = c.ours(norm, impl, y0=c.y0[:B], t=c.t[:B], adapter=c.adapter[:B])
        assert y.shape == (B, S, 45)
    c = batch()
    assert torch.equal(c.ours(norm, impl, adapter=torch.full_like(c.adapter, -1)), c.y0)
    zero = c.ours(norm, impl, cores=torch.zeros_like(c.cores), adapter_bias=None)
    assert torch.equal(zero, c.y0)


@EVERY_IMPL
@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_samples_do_not_meet(norm, impl):
    """A NaN, a large change and a number out of range stay in their sample."""
    c = batch()
    y = c.ours(norm, impl)
    y0, t, adapter = c.y0.clone(), c.t.clone(), c.adapter.clone()
    y0[3, 2, 1], t[0], y0[1, 0, 0] = torch.nan, 1e3, torch.nan
    adapter[5], adapter[4] = 99, 2**40
    again = c.ours(norm, impl, y0=y0, t=t, adapter=adapter)
    for i in (2, 6, 7):
        assert torch.equal(again[i], y[i])
    assert again[3, 2, 1].isnan() and torch.equal(again[1].isnan(), y0[1].isnan())
    assert torch.equal(again[1, 1:], y0[1, 1:])


@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_more_than_one_block_of_rows(norm, monkeypatch):
    from secura_kernels.backends.reference import blocks

    c = batch()
    whole = c.ours(norm)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 200)
    assert len(list(blocks.row_blocks(8 * 7, 45))) > 10
    torch.testing.assert_close(c.ours(norm), whole)


@EVERY_IMPL
@pytest.mark.parametrize(
    "norm",
    [*FORMS.values(), SMagNorm(detach_gate=False), SMagNorm(ref="max", detach_gate=False)],
    ids=[*FORMS, "full", "full max"],
)
def test_gradients_of_the_plain_formula(norm, impl):
    c = batch()
    leaves = [c.y0, c.t, c.cores, c.adapter_bias]
    for leaf in leaves:
        leaf.requires_grad_()
    y = c.ours(norm, impl)
    singles = torch.stack(
        [
            c.y0[i] if k < 0 else c.single(i).ours(norm, impl="reference")
            for i, k in enumerate(ADAPTERS)
        ]
    )
    dy = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(singles, leaves, dy), strict=True
    ):
        torch.testing.assert_close(a, b)


@EVERY_IMPL
def test_op(impl):
    for norm in FORMS.values():
        c = batch(S=3, dtype=torch.bfloat16)
        opcheck(
            op,
            (c.y0, c.t, c.cores, c.adapter, c.C, c.adapter_bias, 0.7, pack_norm(norm), True, impl),
        )
    torch.compiler.reset()
    compiled = torch.compile(
        lambda y0, t: c.ours(norm, impl, y0=y0, t=t), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(c.y0, c.t), c.ours(norm, impl))
    cores = torch.stack([c.cores, 2 * c.cores])
    got = torch.vmap(lambda each: c.ours(norm, impl, cores=each))(cores)
    assert torch.equal(got, torch.stack([c.ours(norm, impl, cores=each) for each in cores]))


def test_func_grad_over_vmap():
    c, norm = batch(), SMagNorm()
    many = torch.stack([c.cores, 2 * c.cores])

    def total(cores):
        return torch.vmap(lambda each: c.ours(norm, cores=each))(cores).sum()

    leaf = many.clone().requires_grad_()
    expected = torch.autograd.grad(sum(c.ours(norm, cores=each).sum() for each in leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(total)(many), expected)


def test_autocast():
    c, norm = batch(), SMagNorm()
    low = {name: getattr(c, name).bfloat16() for name in ("y0", "t", "C")}
    for leaf in (False, True):
        c.cores.requires_grad_(leaf)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = c.ours(norm)
        assert y.dtype == torch.bfloat16 and torch.equal(y, c.ours(norm, **low))


def test_the_host_never_reads_which_adapter():
    from torch._subclasses.fake_tensor import FakeTensorMode

    meta = batch()
    arguments = [
        v.to("meta") for v in (meta.y0, meta.t, meta.cores, meta.adapter, meta.C, meta.adapter_bias)
    ]
    for norm in FORMS.values():
        with instead_of_launching(lambda *_: None):
            assert triton_mixed.forward(*arguments, 0.7, norm).shape == (8, 7, 45)
        with FakeTensorMode() as mode:
            fake = [
                mode.from_tensor(v)
                for v in (meta.y0, meta.t, meta.cores, meta.adapter, meta.C, meta.adapter_bias)
            ]
            assert reference.forward(*fake, 0.7, norm).shape == (8, 7, 45)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(y0=torch.zeros(12), t=torch.zeros(4)), r"y0.shape=\(12,\) is not allowed"),
        (dict(cores=torch.zeros(4, 4)), r"cores='torch.float32 \(4, 4\)' is not allowed.*A >= 1"),
        (dict(cores=torch.zeros(0, 4, 4)), r"cores='torch.float32 \(0, 4, 4\)' is not allowed"),
        (dict(cores=torch.zeros(2, 3, 3)), r"cores='torch.float32 \(2, 3, 3\)' is not allowed"),
        (dict(adapter=torch.zeros(3)), "adapter.dtype=torch.float32 is not allowed"),
        (dict(adapter=torch.zeros(2, dtype=torch.int64)), r"adapter.shape=\(2,\) is not allowed"),
        (
            dict(adapter_bias=torch.zeros(12)),
            r"adapter_bias.shape=\(12,\) is not allowed.*\(2, 12\)",
        ),
        (dict(norm=SMagNorm(domain="weight")), "norm.domain='weight' is not allowed"),
        (dict(impl="fast"), "impl='fast' is not allowed"),
    ],
)
def test_bad_arguments(changes, message):
    good = dict(
        y0=torch.zeros(3, 12),
        t=torch.zeros(3, 4),
        cores=torch.zeros(2, 4, 4),
        adapter=torch.tensor([0, -1, 1]),
        C=torch.zeros(12, 4),
    )
    assert torch.equal(cur_batched(**good), good["y0"])
    with pytest.raises(ValueError, match=message):
        cur_batched(**good | changes)
