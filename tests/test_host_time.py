"""What the host does once and not in every call; and that this lets no bad call through."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secura_kernels import CURLoRALinear, SECURALinear, cur_linear
from secura_kernels.functional import linear
from secura_kernels.ops import registry

pytest.importorskip("triton", reason="the launches are Triton's")
HOST = Path(__file__).parents[1] / "benchmarks" / "host"


def run(program: str) -> str:
    """In a process of its own, where kernels are compiled and not interpreted."""
    program = f"import sys; sys.path.insert(0, {str(HOST)!r})\n{program}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=_compiling(),
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _compiling() -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": root}


LAUNCHES = """
import json, torch
from unittest import mock
from nothing import launching_nothing
from torch import nn
from triton import knobs
from triton.runtime.jit import JITFunction
from secura_kernels import CURLoRALinear, SECURALinear
from secura_kernels.backends.operands import CurOperands
from secura_kernels.backends.triton import chips, dispatch
from secura_kernels.backends.triton.passes.core_gradient import core_gradient

asked, ask = [], JITFunction.run
JITFunction.run = lambda self, *a, **k: asked.append(self) or ask(self, *a, **k)
found = {}
with launching_nothing(90) as driver:
    for kind, more in ((CURLoRALinear, {}), (SECURALinear, dict(norm="calibrated"))):
        torch.manual_seed(0)
        linear = nn.Linear(80, 64).bfloat16()  # with a bias, for which x is read by a kernel
        layer = kind.from_linear(linear, 16, impl="triton", **more)

        def step(x):
            layer(x).sum().backward()
            count = len(asked), driver.launches
            asked.clear()
            driver.launches = 0
            return count

        x = torch.randn(16, 80).bfloat16().requires_grad_()
        misaligned = torch.randn(16 * 80 + 1).bfloat16()[1:].view(16, 80).requires_grad_()
        transposed = torch.randn(80, 16).bfloat16().T.requires_grad_()
        found[kind.__name__] = [step(t) for t in (
            x, x, misaligned, misaligned, transposed, x[:8].detach().requires_grad_(), x)]
    v, t, core = torch.randn(3, 16, 16)
    def of(core):
        return CurOperands.of_epilogue(core, x, None, None, 1.0, None)

    for operands in ((v, t, core), (t, v, core), (v, t, t), (t, v, v), (v, t, core)):
        core_gradient(*operands[:2], of(operands[2]))
    found["the same tensor twice"] = len(asked)
    asked.clear()
    driver.launches = 0
    with mock.patch.object(chips, "processors", lambda _: 1), \
            mock.patch.object(dispatch, "assumed_loss", lambda *_: -0.9):  # one pass, bulk copies
        layer = CURLoRALinear.from_linear(nn.Linear(256, 128).bfloat16(), 16, impl="triton")
        wide = torch.randn(80, 256).bfloat16().requires_grad_()
        found["one pass"] = [step(wide), step(wide.detach().clone().requires_grad_())]
        layer = CURLoRALinear.from_linear(linear, 16, impl="triton")
    driver.launches = 0
    knobs.runtime.launch_enter_hook.add(lambda *_: None)
    found["profiled"] = [step(x)]
print(json.dumps(found))
"""


def test_triton_is_asked_once_for_what_it_compiles():
    found = json.loads(run(LAUNCHES))
    assert found.pop("the same tensor twice") == 2  # is a launch of its own
    first, second = found.pop("one pass")
    assert first[0] > 0 and second == [0, first[1]]
    ((asked, launched),) = found.pop("profiled")
    assert asked == launched  # a profiler's hooks are called by Triton
    for counts in found.values():
        asked, launched = zip(*counts, strict=True)
        assert len(set(launched)) == 1 and launched[0] <= 5
        assert asked[1] == asked[3] == asked[6] == 0  # not in a second step, nor after others
    asked = [count for count, _ in found["CURLoRALinear"]]
    assert asked[0] == 5 and asked[2] and asked[4] and asked[5]  # where operands lie otherwise


BY_HEART = """
import json, torch
from nothing import launching_nothing
from torch import nn
from triton import knobs
from secura_kernels import CURLoRALinear, SECURALinear
from secura_kernels.backends import programs
from secura_kernels.backends.triton import interface, tune_cache

scheduled, launched = [], []
for name in ("rows", "columns"):  # each pass over a layer asks for one of them
    ask = getattr(interface, name)
    setattr(interface, name, lambda *a, ask=ask: scheduled.append(1) or ask(*a))
found = {}
with launching_nothing(90) as driver:
    launcher = driver.launcher_cls

    def launcher_cls(src, metadata):
        def run(*a):
            operands = [getattr(v, "base", v) for v in a]
            launched.append((src.fn.__name__, [  # alive, so that each has an id of its own
                v for v in operands if isinstance(v, torch.Tensor)]))
        return run

    driver.launcher_cls = launcher_cls
    for kind, more in ((CURLoRALinear, {}), (SECURALinear, dict(norm="calibrated")),
                       (SECURALinear, dict(norm="figure"))):
        layers = [kind.from_linear(nn.Linear(80, 64).bfloat16(), 16, impl="triton", **more)
                  for _ in range(2)]

        def step(layer, x):
            scheduled.clear(), launched.clear()
            y = layer(x)
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
            own = {id(v): "its own" for v in (layer.weight, x)}
            seen = {}
            return len(scheduled), [
                (name, [(tuple(v.shape), own.get(id(v)) or seen.setdefault(id(v), len(seen)))
                        for v in tensors])
                for name, tensors in launched]

        x = [torch.randn(16, 80).bfloat16().requires_grad_() for _ in layers]
        outcomes = [step(*pair) for pair in zip(layers, x)]
        tune_cache.forget()
        outcomes.append(step(layers[1], x[1]))
        knobs.runtime.launch_enter_hook.add(profiler := lambda *_: None)
        outcomes.append(step(layers[1], x[1])[:1])
        knobs.runtime.launch_enter_hook.remove(profiler)
        found[str(more)] = outcomes
print(json.dumps(found))
"""


def test_a_call_by_heart_launches_the_same_on_its_own_tensors():
    """And schedules nothing, until something that launches follow from has changed."""
    for (asked, first), (none, second), (again, third), (profiled,) in json.loads(
        run(BY_HEART)
    ).values():
        assert asked and asked == again == profiled and not none
        assert len(first) >= 4 and first == second == third
        assert any("its own" in operand for _, operands in second for operand in operands)


def test_the_benchmark_measures_every_layer(tmp_path):
    printed = run(
        f"sys.argv = ['run.py', '--rounds', '2', '--out', {str(tmp_path)!r}]\n"
        "import run; run.main()"
    )
    content = json.loads((tmp_path / "host.json").read_text())
    assert {row["rival"] for row in content["triton"]} == {
        "frozen",
        "LoRA (PEFT)",
        "CURLoRA",
        "CURLoRA, natural",
        "SECURA",
    }
    assert all(row["us"] > 0 for path in ("triton", "reference") for row in content[path])
    assert (tmp_path / "host.md").read_text().strip() == printed.strip()


def operands(dtype=torch.float32) -> dict:
    torch.manual_seed(0)
    W = torch.randn(20, 24, dtype=dtype)
    return dict(
        x=torch.randn(3, 24, dtype=dtype),
        weight=W,
        core=torch.randn(4, 4, dtype=dtype, requires_grad=True),
        cols=torch.arange(4),
        rows=torch.arange(4),
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(x=torch.randn(3, 24, dtype=torch.float64)), "x.dtype=torch.float64"),
        (dict(x=torch.randn(3, 23)), "x.shape"),
        (dict(x=torch.randn(())), "x.shape"),
        (dict(weight=torch.randn(20, 24, requires_grad=True)), "weight.requires_grad=True"),
        (dict(weight=torch.randn(20, 25)), "x.shape"),
        (dict(core=torch.randn(5, 5)), "cols.shape"),
        (dict(cols=torch.arange(4).int()), "cols.dtype"),
        (dict(rows=None), "either cols and rows, or C and R"),
        (dict(bias=torch.randn(19)), "bias.shape"),
        (dict(adapter_bias=torch.randn(19)), "adapter_bias.shape"),
        (dict(core=torch.randn(4, 4, device="meta")), "core.device='meta'"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_what_was_checked_once_lets_no_bad_call_through(changed, message):
    good = operands()
    for _ in range(2):
        cur_linear(**good)
        with pytest.raises(ValueError, match=message):
            cur_linear(**good | changed)
    assert cur_linear(**good).isfinite().all()


def test_a_good_call_is_checked_once(monkeypatch):
    checked, check = [], linear._check
    monkeypatch.setattr(linear, "_check", lambda *a: checked.append(a) or check(*a))
    monkeypatch.setattr(linear, "_checked", set())
    good = operands()
    for M in (3, 5, 7):
        cur_linear(**good | dict(x=torch.randn(M, 24)))
    assert len(checked) == 1
    cur_linear(**operands(torch.float64))
    assert len(checked) == 2


def test_ops_pass_the_dispatcher_where_something_watches():
    seen = []
    original = registry._runs[torch.ops.secura.cur_linear_fwd.default]

    def run(*args):
        seen.append(torch._C._len_torch_dispatch_stack())
        return original(*args)

    layer = CURLoRALinear.from_linear(nn.Linear(24, 20), 4)
    x = torch.randn(3, 24)
    plain = layer(x)
    with FlopCounterMode(display=False) as counter:
        watched = layer(x)
    assert torch.equal(plain, watched)
    assert torch.ops.secura.cur_linear_fwd in counter.get_flop_counts()["Global"]
    registry._runs[torch.ops.secura.cur_linear_fwd.default] = run
    try:
        layer(x)
        with FlopCounterMode(display=False):
            layer(x)
    finally:
        registry._runs[torch.ops.secura.cur_linear_fwd.default] = original
    assert seen == [0]  # past the dispatcher only where nothing watches


@pytest.mark.parametrize("norm", [None, "calibrated"])
def test_both_forms_of_a_function_give_the_same(norm):
    """With and without ``setup_context``, which transforms ask for: values, first and second
    derivatives."""
    torch.manual_seed(0)
    layer = SECURALinear.from_linear(nn.Linear(24, 20), 4, m=6, norm=norm).double()
    with torch.no_grad():
        layer.B.normal_(0, 0.3)
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)

    def loss(x):
        return layer(x).square().sum()

    eager = torch.autograd.grad(loss(x), x, create_graph=True)[0]
    assert torch.allclose(torch.func.grad(loss)(x), eager, atol=1e-12)
    second = torch.autograd.grad(eager.square().sum(), x)[0]
    transformed = torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(x)
    assert torch.allclose(transformed, second, atol=1e-11)
