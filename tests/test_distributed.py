"""Two processes give what one gives: DDP, FSDP1 and 2, tensor parallelism, Trainer; gloo, CPU."""

import importlib.util

import parallel_calibration
import parallel_data
import parallel_experts
import parallel_fsdp1
import parallel_projections
import parallel_tensor
import pytest
import torch.distributed as dist
from parallel import run
from parallel_deepspeed import zero3

pytestmark = [
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"
    ),
]
pytest.importorskip("peft", reason="peft is not installed")
PARTS = (
    parallel_data,
    parallel_fsdp1,
    parallel_calibration,
    parallel_tensor,
    parallel_experts,
    parallel_projections,
)
CHECKS = {check.__name__: check for part in PARTS for check in part.CHECKS}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Of all checks: starting processes and importing takes longer than most of them."""
    return run(CHECKS, tmp_path_factory.mktemp("ranks"), seconds=240)


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name, errors):
    assert errors[name] is None, errors[name]


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
def test_deepspeed_zero3(tmp_path):
    (error,) = run({"zero3": zero3}, tmp_path, seconds=120).values()
    assert error is None, error
