"""Where the kernels are tested: the GPU where there is one, else Triton's interpreter."""

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# On a GPU machine `pytest -m gpu` picks every kernel test.
MARKS = [pytest.mark.gpu] if GPU else []
