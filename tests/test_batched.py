"""``cur_batched``: one batch, several adapters; each sample is its own single run."""

import math

import pytest
import torch
from batched_cases import ADAPTERS, batch, by_token
from devices import DEVICE, MARKS, poisoned_memory
from layer_cases import PRECISION_NORMS, relative_error, skip_where_low_precision_jumps

from secura_kernels import SMagNorm
from secura_kernels.functional.epilogue import cur_batched

pytestmark = MARKS

NORMS = {
    k: n
    for k, n in PRECISION_NORMS.items()
    if n is None or (n.domain == "output" and n.detach_gate)
}
FORMS = {"no gate": None, "gate": SMagNorm(), "max": SMagNorm(ref="max")}


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_memory():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_error_is_no_more_than_eager_single_runs(norm, dtype, impl):
    """Against float64, over all samples; a sample without an adapter is y0 to the bit."""
    skip_where_low_precision_jumps(norm, dtype)
    ours, eager = [], []
    for S, N, r, bias in ((1, 131, 3, True), (70, 67, 16, False), (33, 90, 150, True)):
        c = batch(S, N, r, dtype, bias)
        with torch.no_grad():
            y = c.ours(norm, impl=impl)
        assert y.dtype == dtype and y.shape == c.y0.shape and y.is_contiguous()
        for i, k in enumerate(ADAPTERS):
            if k < 0:
                assert torch.equal(y[i], c.y0[i])
                continue
            truth = c.single(i).eager(norm, torch.float64)[0]
            ours.append(relative_error(y[i], truth) ** 2)
            eager.append(relative_error(c.single(i).eager(norm)[0], truth) ** 2)
    assert math.sqrt(sum(ours) / len(ours)) <= math.sqrt(sum(eager) / len(ours)) + 1e-6


@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_equals_single_runs_in_every_layout(norm, impl):
    """Two, three and four dimensions; sliced, transposed and expanded operands."""
    c = batch()
    y = c.ours(norm, impl=impl)
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
    assert torch.equal(c.ours(norm, impl=impl, **strided), y) and torch.equal(c.y0, kept)
    one = dict(cores=c.cores[:1].expand(5, -1, -1), y0=c.y0[:1].expand(8, -1, -1))
    torch.testing.assert_close(
        c.ours(norm, impl=impl, **one)[[0, 2]],
        c.ours(norm, impl=impl, **{k: v.contiguous() for k, v in one.items()})[[0, 2]],
    )
    tokens = c.ours(norm, impl=impl, y0=c.y0[:, 0], t=c.t[:, 0])
    torch.testing.assert_close(tokens, c.ours(norm, impl=impl, y0=c.y0[:, :1], t=c.t[:, :1])[:, 0])
    more = batch(S=6)
    shape = dict(y0=more.y0.view(8, 2, 3, 45), t=more.t.view(8, 2, 3, 5))
    assert torch.equal(
        more.ours(norm, impl=impl, **shape).view(8, 6, 45), more.ours(norm, impl=impl)
    )


@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_nothing_to_do(norm, impl):
    for B, S in ((0, 3), (8, 0)):
        c = batch(S)
        y = c.ours(norm, impl=impl, y0=c.y0[:B], t=c.t[:B], adapter=c.adapter[:B])
        assert y.shape == (B, S, 45)
    c = batch()
    assert torch.equal(c.ours(norm, impl=impl, adapter=torch.full_like(c.adapter, -1)), c.y0)
    zero = c.ours(norm, impl=impl, cores=torch.zeros_like(c.cores), adapter_bias=None)
    assert torch.equal(zero, c.y0)


@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_samples_do_not_meet(norm, impl):
    """A NaN, a large change and a number out of range stay in their sample."""
    c = batch()
    y = c.ours(norm, impl=impl)
    y0, t, adapter = c.y0.clone(), c.t.clone(), c.adapter.clone()
    y0[3, 2, 1], t[0], y0[1, 0, 0] = torch.nan, 1e3, torch.nan
    adapter[5], adapter[4] = 99, 2**40
    again = c.ours(norm, impl=impl, y0=y0, t=t, adapter=adapter)
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


@pytest.mark.parametrize("norm", [None, SMagNorm()], ids=["no gate", "gate"])
def test_by_token(norm, impl):
    """Every token is what a sample of one token is."""
    c = batch(S=40, adapters=by_token(), N=70, r=17)
    y = c.ours(norm, impl=impl)
    rows = dict(y0=c.y0.flatten(0, 1), t=c.t.flatten(0, 1), adapter=c.adapter.flatten())
    assert torch.equal(y.flatten(0, 1), c.ours(norm, impl=impl, **rows))
    assert torch.equal(y[c.adapter < 0], c.y0[c.adapter < 0])
    torch.testing.assert_close(y, c.eager(norm)[0])
    more = dict(y0=c.y0.view(3, 5, 8, 70), t=c.t.view(3, 5, 8, 17), adapter=c.adapter.view(3, 5, 8))
    assert torch.equal(c.ours(norm, impl=impl, **more).view(3, 40, 70), y)


def test_autocast():
    c, norm = batch(), SMagNorm()
    low = {name: getattr(c, name).bfloat16() for name in ("y0", "t", "C")}
    for leaf in (False, True):
        c.cores.requires_grad_(leaf)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = c.ours(norm)
        assert y.dtype == torch.bfloat16 and torch.equal(y, c.ours(norm, **low))


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
            dict(
                y0=torch.zeros(3, 2, 12), t=torch.zeros(3, 2, 4), adapter=torch.zeros(3, 4).long()
            ),
            r"adapter.shape=\(3, 4\) is not allowed.*\(3,\), an id a sample, or \(3, 2\), an id",
        ),
        (
            dict(
                y0=torch.zeros(3, 2, 12),
                t=torch.zeros(3, 2, 4),
                adapter=torch.zeros(3, 2).long(),
                norm=SMagNorm(ref="max"),
            ),
            "norm.ref='max' is not allowed.*a number where adapter is given by token",
        ),
        (dict(check_ids=2), "check_ids=2 is not allowed"),
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


@pytest.mark.skipif(DEVICE == "cuda", reason="the assertion ends the process's use of the GPU")
def test_ids_out_of_range_are_found():
    c = batch(adapters=[0, 4, -1])
    kept = c.ours(None, check_ids=True)
    assert torch.equal(kept, c.ours(None))
    for wrong in (5, -2):
        ids = torch.tensor([0, wrong, -1])
        with pytest.raises(RuntimeError, match=r"every id must be in \[-1, 5\)"):
            c.ours(None, adapter=ids, check_ids=True)
