"""The study's own tests: ``make test ARGS=benchmarks/forgetting/tests``."""

import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # tests side by side take a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
