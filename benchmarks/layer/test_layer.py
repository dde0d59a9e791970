"""The same cases for pytest-benchmark: ``pytest benchmarks/`` (``-k``, ``--benchmark-*``)."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from rivals import rivals
from shapes import DTYPES, select
from timing import Clock, Inputs, step

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
CASES = (
    select(["llama-3.1-8b"], ["q_proj", "down_proj"], [512, 8192], [16, 64], ["bfloat16"])
    if GPU
    else select(["square"], ["1536"], [512], [16], ["float32"])
)
RIVALS = (
    "frozen",
    "CURLoRA, triton",
    "SECURA, triton",
    "CURLoRA, reference",
    "SECURA, reference",
    "SECURA, weight domain, reference",
    "CURLoRA, dense",
    "SECURA, dense",
    "LoRA (PEFT)",
    "DoRA (PEFT)",
)


@pytest.fixture(scope="module", params=CASES, ids=str)
def contenders(request):
    case = request.param
    torch.manual_seed(0)
    linear = torch.nn.Linear(case.K, case.N, bias=False, device=DEVICE, dtype=DTYPES[case.dtype])
    return rivals(linear, case.r, compiled=False)[0], Inputs.random(case, DEVICE)


@pytest.mark.parametrize("name", RIVALS)
def test_forward_and_backward(benchmark, contenders, name):
    found, inputs = contenders
    if name not in found:
        pytest.skip(f"{name} cannot run here")
    clock = Clock(DEVICE)

    def run():
        step(found[name].layer, *inputs[0], clock)
        if GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=10, warmup_rounds=3)
