import os

if "PYTEST_XDIST_WORKER" in os.environ:  # tests side by side take a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter; Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Poisoned memory comes with deterministic algorithms, for which cuBLAS wants a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "triton", "cuda"])
def impl(request):
    """Each backend, made to run here."""
    if request.param == "cuda":
        from cuda_host import load_cuda

        load_cuda()
    return request.param


@pytest.fixture
def products(monkeypatch):
    """How many layers each shared product of fused projections had gradients of."""
    from secura_kernels.ops import projections

    seen, plain = [], projections._side_by_side
    monkeypatch.setattr(
        projections, "_side_by_side", lambda parts: (seen.append(len(parts)), plain(parts))[1]
    )
    return seen


def exists(item) -> bool:
    """A gate's full derivative is in the reference alone."""
    arguments = item.callspec.params if hasattr(item, "callspec") else {}
    full = not getattr(arguments.get("norm"), "detach_gate", True)
    return not (full and arguments.get("impl") in ("triton", "cuda"))


# Files of few long tests, which would leave one of several workers busy at the end.
SLOW = (
    "test_kernel_code",
    "test_cuda_code",
    "test_cuda",
    "test_distributed",
    "test_examples",
    "test_examples_training",
)


def pytest_collection_modifyitems(items):
    items[:] = filter(exists, items)
    items.sort(key=lambda item: item.path.stem not in SLOW)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no NVIDIA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
