"""Where the kernels are tested: the GPU where there is one, else Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# On a GPU machine `pytest -m gpu` picks every kernel test.
MARKS = [pytest.mark.gpu] if GPU else []
# For what the reference, which the fixture ``impl`` has too, is not asked.
KERNELS = pytest.mark.parametrize("impl", ["triton", "cuda"], indirect=True)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, so a value that nothing wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
