"""Calls by heart: what is recorded is repeated on other tensors, and nothing else is repeated."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from secura_kernels.backends import programs


def double(tensors: list[Tensor]) -> None:
    """As a kernel writes: 2 x into what was allocated for it."""
    x, out = tensors
    out.copy_(2 * x)


def launch(function, *tensors: Tensor) -> None:
    with torch.utils._python_dispatch._disable_current_modes():  # a kernel is no op of PyTorch's
        function(list(tensors))
    programs.note(function, list(tensors))


@pytest.fixture
def by_heart(monkeypatch):
    """Of an implementation: the same by heart, and the list of its real calls."""
    monkeypatch.setattr(programs, "state", lambda like: "here")

    def of(run):
        calls = []
        return programs.by_heart(lambda *args: calls.append(1) or run(*args)), calls

    return of


def everything(x: Tensor, index: Tensor, bias: Tensor | None, scale: float, impl: str):
    """Allocation, views, indices in lists, sums, products, in place and out of it."""
    out = x.new_empty(x.shape)
    launch(double, x, out)
    assert x.T.shape == x.shape[::-1]  # a view that is only looked at
    picked = out.T[index].T + out[:, index]
    y = picked.mul_(scale) @ out[index][: len(index)].to(torch.float64).float()
    if bias is not None:
        y.add_(bias)
    return y, x.new_zeros(3, dtype=torch.int64), out.sum(0)


@pytest.mark.parametrize("with_bias", [True, False])
def test_other_tensors_take_the_same_way(by_heart, with_bias):
    run, calls = by_heart(everything)
    for seed in range(3):
        torch.manual_seed(seed)
        x, index, bias = torch.randn(6, 6), torch.randint(6, (4,)), torch.randn(6)
        given = (x, index, bias if with_bias else None, 0.5, "triton")
        for found, expected in zip(run(*given), everything(*given), strict=True):
            torch.testing.assert_close(found, expected)
    assert len(calls) == 1


def test_what_the_host_s_work_follows_from_is_recorded_apart(by_heart, monkeypatch):
    run, calls = by_heart(everything)
    x, index, bias = torch.randn(6, 6), torch.randint(6, (4,)), torch.randn(6)
    wide = torch.randn(37)
    given = [
        (x, index, bias, 0.5, "triton"),
        (x, index, bias, 0.25, "triton"),  # a setting
        (x[:, :6].T.contiguous().T, index, bias, 0.5, "triton"),  # strides
        (x, index[:2], bias, 0.5, "triton"),  # a shape
        (wide[1:].view(6, 6), index, bias, 0.5, "triton"),  # alignment
        (x, index, None, 0.5, "triton"),  # what there is
        (x, index, x[0], 0.5, "triton"),
    ]
    for arguments in given * 2:
        for found, expected in zip(run(*arguments), everything(*arguments), strict=True):
            torch.testing.assert_close(found, expected)
    assert len(calls) == 6  # a row of x begins where a bias of its own may
    monkeypatch.setattr(programs, "state", lambda like: "elsewhere")
    run(*given[0])
    assert len(calls) == 7
    programs.forget()
    run(*given[0])
    assert len(calls) == 8


def test_one_tensor_twice_is_not_two(by_heart):
    def run(a: Tensor, b: Tensor, impl: str):
        out = a.new_empty(a.shape)
        launch(double, a, out)
        return (out + b,)

    heart, calls = by_heart(run)
    a, b = torch.ones(4), torch.full((4,), 5.0)
    assert torch.equal(heart(a, a, "triton")[0], torch.full((4,), 3.0))
    for _ in range(2):
        assert torch.equal(heart(a, b, "triton")[0], torch.full((4,), 7.0))
    assert len(calls) == 2


UNKNOWN = torch.ones(4)


@pytest.mark.parametrize(
    "run",
    [
        lambda x, impl: (x * x.sum().item(),),  # a value decides
        lambda x, impl: (x + UNKNOWN,),  # whose it is nobody knows
        lambda x, impl: (x.split(2)[0] + x.split(2)[1],),  # several results
        lambda x, impl: (x * 2,),  # nothing launched, below
    ],
    ids=["value", "unknown", "several", "no launch"],
)
def test_what_cannot_be_repeated_runs_as_it_is(by_heart, run, request):
    launches = "no launch" not in request.node.callspec.id

    def launching(x, impl):
        if launches:
            launch(double, x, x.new_empty(x.shape))
        return run(x, impl)

    heart, calls = by_heart(launching)
    for value in (1.0, 2.0, 3.0):
        x = torch.full((4,), value)
        assert torch.equal(heart(x, "triton")[0], run(x, "triton")[0])
    assert len(calls) == 3


def test_other_backends_and_kinds_of_tensors_are_left_alone(by_heart, monkeypatch):
    run, calls = by_heart(everything)
    index, bias = torch.randint(6, (4,)), torch.randn(6)

    class Kind(Tensor):
        pass

    x = torch.randn(6, 6)
    for tensor, impl in ((x, "reference"), (x, "cuda"), (x.as_subclass(Kind), "triton")):
        for _ in range(2):
            run(tensor, index, bias, 0.5, impl)
    assert len(calls) == 6
    monkeypatch.setattr(programs, "state", lambda like: None)
    run(x, index, bias, 0.5, "triton")
    run(x, index, bias, 0.5, "triton")
    assert len(calls) == 8


def test_an_error_is_raised_each_time_and_nothing_is_kept(by_heart):
    def failing(x: Tensor, impl: str):
        launch(double, x, x.new_empty(x.shape))
        raise ValueError("no")

    run, calls = by_heart(failing)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            run(torch.ones(3), "triton")
    assert len(calls) == 2 and getattr(programs._thread, "record", None) is None


def test_a_program_keeps_no_tensor_alive(by_heart):
    run, _ = by_heart(everything)
    tensors = [torch.randn(6, 6), torch.randint(6, (4,)), torch.randn(6)]
    found = run(*tensors, 0.5, "triton")
    watched = [weakref.ref(t) for t in (*tensors, *found)]
    del tensors, found
    gc.collect()
    assert not any(reference() is not None for reference in watched)
