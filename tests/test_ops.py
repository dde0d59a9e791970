"""The registered ops: schema, fakes, FLOPs, the ``impl`` switch, what is saved, determinism."""

import pytest
import torch
from epilogue_cases import epilogue_case
from layer_cases import ALL_NORMS, case
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from secura_kernels import SMagNorm, cur_linear
from secura_kernels.backends.reference import linear
from secura_kernels.ops import pack_norm, resolve, why_unavailable
from secura_kernels.ops.linear import cur_linear_bwd, cur_linear_fwd
from secura_kernels.ops.registry import _warn_once
from secura_kernels.ops.weight import cur_weight_linear_bwd, cur_weight_linear_fwd


def op_arguments(c, norm):
    C, R = c.C_and_R
    sides = (c.cols, c.rows, None, None) if c.tied else (None, None, C, R)
    parameters = (c.core.detach(), *sides, c.adapter_bias.detach(), c.decay)
    settings = (c.alpha, pack_norm(norm), norm is None or norm.detach_gate)
    return parameters, settings


@pytest.mark.parametrize("norm", **ALL_NORMS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "stored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(norm, tied, dtype):
    c = case(dtype=dtype, tied=tied, task_gate=True)
    x, parameters, settings = c.x.detach(), *op_arguments(c, norm)
    edge = 0.0 if norm is None else 1.2
    if norm is not None and norm.domain == "weight":
        arguments = (x, c.W, c.bias, *parameters, *settings, edge, "auto")
        opcheck(cur_weight_linear_fwd, arguments)
        y, _ = cur_weight_linear_fwd(*arguments)
        opcheck(
            cur_weight_linear_bwd,
            (torch.randn_like(y), x, c.W, *parameters, *settings, [True, True, True], "auto"),
        )
        return
    parameters = (*parameters, None if norm is not None else c.task_gate)
    for save in (True, False):
        arguments = (x, c.W, c.bias, *parameters, *settings, edge, save, "auto")
        opcheck(cur_linear_fwd, arguments)
    y, t, saved, _ = cur_linear_fwd(x, c.W, c.bias, *parameters, *settings, edge, True, "auto")
    for needs in ([True, True, True], [False, True, False]):
        opcheck(
            cur_linear_bwd,
            (torch.randn_like(y), c.W, *parameters, t, saved, *settings, needs, "auto"),
        )


@pytest.mark.parametrize("norm", [None, SMagNorm()], ids=["no gate", "gate"])
def test_flops(norm):
    M, N, K, r = 64, 48, 32, 4
    c = case(M, N, K, r, torch.float32, adapter_bias=False)
    with FlopCounterMode(display=False) as counter:
        y = c.ours(norm)
    assert counter.get_total_flops() == 2 * M * (N * K + K * r + r * r + r * N)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    base, low_rank = 2 * M * N * K, 2 * M * (N * r + r * r + r * K)
    assert counter.get_total_flops() == base + low_rank + 2 * M * r * r


def test_flops_of_the_weight_domain():
    M, N, K, r = 64, 48, 32, 4
    c = case(M, N, K, r, torch.float32, adapter_bias=False)
    form = 2 * r * K * (r + N)
    with FlopCounterMode(display=False) as counter:
        y = c.ours(SMagNorm(domain="weight"))
    assert counter.get_total_flops() == form + 2 * M * N * K
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * (form + 2 * M * N * K) + 2 * N * r * (K + r)


def saved_for_backward(function) -> list[torch.Tensor]:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    return kept


@pytest.mark.parametrize(
    ("dtype", "gate_dtype"),
    [
        (torch.bfloat16, torch.uint8),
        (torch.float16, torch.int16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_saves_t_and_the_gate_and_not_x(dtype, gate_dtype):
    M, N, K, r = 33, 24, 40, 4
    c = case(M, N, K, r, dtype, bias=False, adapter_bias=False, decay=False)
    kept = saved_for_backward(lambda: c.ours(SMagNorm()))
    activations = {(t.shape, t.dtype) for t in kept if t.shape[:1] == (M,)}
    assert activations == {((M, r), dtype), ((M, N), gate_dtype)}
    assert all(t.untyped_storage().data_ptr() != c.x.untyped_storage().data_ptr() for t in kept)
    kept = saved_for_backward(lambda: c.ours(None))
    assert {t.shape for t in kept if t.shape[:1] == (M,)} == {(M, r)}


@pytest.mark.parametrize("norm", **ALL_NORMS)
def test_two_runs_are_bitwise_equal(norm):
    def run():
        torch.manual_seed(1)
        c = case(M=200, N=96, K=80, r=8, dtype=torch.float32)
        y = c.ours(norm)
        return y, *torch.autograd.grad(y, c.trained(), torch.randn_like(y))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_impl_switch():
    c = case()
    with pytest.raises(ValueError, match=r"impl='cutlass' is not allowed.*'auto'"):
        cur_linear(c.x, c.W, c.core, cols=c.cols, rows=c.rows, impl="cutlass")
    for impl in ("triton", "cuda"):  # neither has float64
        with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run here"):
            cur_linear(c.x, c.W, c.core, cols=c.cols, rows=c.rows, impl=impl)
    assert torch.equal(
        cur_linear(c.x, c.W, c.core, cols=c.cols, rows=c.rows, impl="reference"),
        cur_linear(c.x, c.W, c.core, cols=c.cols, rows=c.rows),
    )


def test_auto_is_triton_on_a_gpu_then_cuda_then_the_reference_with_the_reasons(monkeypatch):
    reasons = {"triton": None, "cuda": None}
    for package in reasons:
        monkeypatch.setattr(
            f"secura_kernels.backends.{package}.why_unavailable",
            lambda *_, package=package: reasons[package],
        )
    device, dtype = torch.device("cuda"), torch.bfloat16
    assert resolve("auto", device, dtype, 8) == "triton"
    assert resolve("auto", torch.device("cpu"), dtype, 8) == "reference"
    reasons["triton"] = "no luck"
    with pytest.warns(UserWarning, match="impl='auto' runs impl='cuda' on cuda: no luck"):
        assert resolve("auto", device, dtype, 8) == "cuda"
    reasons["cuda"] = "nor here"
    with pytest.warns(UserWarning, match="runs impl='reference' on cuda: no luck; nor here"):
        assert resolve("auto", device, dtype, 8) == "reference"
    monkeypatch.setattr("secura_kernels.ops.registry._is_installed", lambda name: False)
    assert why_unavailable("triton", device).startswith("triton is not installed")


@pytest.mark.parametrize("ref", [1.0, "max"])
def test_a_full_derivative_is_in_the_reference_alone(ref):
    norm = SMagNorm(ref=ref, detach_gate=False)
    with pytest.warns(UserWarning, match="runs impl='reference' on cuda: the gate's full derivat"):
        _warn_once.cache_clear()
        assert resolve("auto", torch.device("cuda"), torch.bfloat16, 8, norm) == "reference"
    c = case(dtype=torch.float32)
    for impl in ("triton", "cuda"):
        with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run here: the gate's full d"):
            c.ours(norm, impl=impl)
        with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run here: the gate's full d"):
            epilogue_case(dtype=torch.float32).ours(norm, impl=impl)


class LargestNew(TorchDispatchMode):
    """Elements of the largest tensor that is computed, views of ``known`` not counted."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self.known, self.elements = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() != self.known:
                self.elements = max(self.elements, t.numel())
        return out


def test_delta_weight_is_never_formed():
    M, N, K, r = 3, 200, 300, 4
    c = case(M, N, K, r, torch.float32, adapter_bias=False, decay=False)
    operands = c.operands(SMagNorm())
    with torch.no_grad(), LargestNew(c.W) as largest:
        y, t, saved, _ = linear.forward(c.x, operands, 0.0, True)
        linear.backward(y, operands, t, saved, (True, True, False))
    assert 0 < largest.elements <= r * max(N, K)
