"""Which form of a layer runs, with which tiles, and why a backend cannot."""

import pytest
import torch
from batched_cases import batch
from devices import DEVICE, MARKS
from epilogue_cases import epilogue_case
from layer_cases import case

from secura_kernels import SMagNorm, cur_linear
from secura_kernels.backends.triton import chips, dispatch, plan
from secura_kernels.backends.triton.launch import LARGEST_STRIDE, addressable

pytestmark = MARKS


def test_a_long_stride_is_copied():
    x = torch.randn(6, 4, device=DEVICE)
    assert addressable(x) is x
    far = torch.empty(2 * LARGEST_STRIDE + 4, device=DEVICE).as_strided((2, 4), (LARGEST_STRIDE, 1))
    assert addressable(far).is_contiguous()


def test_plans_and_their_reasons():
    device, bf16 = torch.device(DEVICE), torch.bfloat16
    with chips.pretend(90):

        def reason(M=8192, N=4096, K=4096, r=64, norm=None, dtype=bf16, **more):
            found = plan(M, N, K, r, dtype, torch.device("meta"), norm, **more)
            assert found.one_pass == found.reason.startswith("one pass")
            return found.reason

        assert reason(input_gradient=True) == (
            "one pass: 367 us against 404 by the library's product and an epilogue (predicted)"
        )
        assert reason().startswith("one pass: 399 us against 409")
        # A bias: t costs a reading of x in either form, so one pass loses nothing by it.
        assert reason(needs_down=True).startswith("one pass: 367 us against 404")
        # Above rank 64 it multiplies slower, and *down* reads slower.
        assert reason(r=150) == "library product: 460 us against 481 in one pass (predicted)"
        assert reason(r=150, needs_down=True).startswith("one pass: 418 us against 447")
        assert reason(norm=SMagNorm(), needs_down=True) == (
            "library product: 404 us against 488 in one pass (predicted)"
        )
        assert "ref='max' needs the largest" in reason(norm=SMagNorm(ref="max"))
        assert reason(M=dispatch.MOST_TOKENS).startswith("library product: for M <= 64")
        assert reason(M=256, N=512).startswith("library product: fewer tiles than the 132")
        assert reason(K=16384).startswith("library product: ")
        assert reason(dtype=torch.float32).startswith("library product: float32")
        odd = torch.empty(16, 4095, dtype=bf16)
        assert reason(input_gradient=True, operands=(odd, odd)).startswith(
            "library product: rows are not on 16-byte boundaries"
        )
    assert plan(100, 200, 64, 4, bf16, device, None).reason


def test_a_newer_chip_takes_the_rows_of_the_nearest_lower_one(monkeypatch):
    device, found = torch.device("cuda", 5), {}
    for capability in ((7, 5), (8, 6), (10, 3), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        found[capability] = chips._chip_of_gpu.__wrapped__(device)
    assert found == {(7, 5): None, (8, 6): 89, (10, 3): 100, (9, 0): 90}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (13, 0))
    with pytest.warns(UserWarning, match="capability 13.0, for which no tiles are shipped: those"):
        assert chips._chip_of_gpu.__wrapped__(device) == 120


def test_why_unavailable():
    c = case(4, 400, 300, 4, torch.float64, bias=False, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run here.*float64.*'reference'"):
        c.ours(None, impl="triton")
    wide = case(4, 400, 300, 257, torch.float32, bias=False, device=DEVICE)
    with pytest.raises(RuntimeError, match="rank is 257; the Triton kernels hold up to 256"):
        cur_linear(wide.x, wide.W, wide.core, cols=wide.cols, rows=wide.rows, impl="triton")


@pytest.mark.parametrize("named", ["triton", "cuda"])
@pytest.mark.parametrize("form", ["output", "weight", "epilogue", "batched"])
def test_a_full_derivative_is_in_the_reference_alone(form, named):
    gate = SMagNorm(domain="weight" if form == "weight" else "output", detach_gate=False)
    if form == "batched":
        c = batch(3)
    elif form == "epilogue":
        c = epilogue_case()
    else:
        c = case(4, 40, 30, 4, torch.float32, device=DEVICE)
    with pytest.raises(RuntimeError, match=f"impl='{named}' cannot run here: the gate's full"):
        c.ours(gate, impl=named)
    assert torch.equal(c.ours(gate), c.ours(gate, impl="reference"))
