"""Small CUDA sources, and CUDA toolkits that only look like one, for the tests of the building."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from secura_kernels.backends.cuda import toolchain

ROOT = Path(__file__).parents[1]

TINY = {
    "passes.h": "void twice(const float* x, float* y, long n);\n",
    "twice.cu": """
#include "passes.h"
__global__ void twice_kernel(const float* x, float* y, long n) {
  const long i = blockIdx.x * long(blockDim.x) + threadIdx.x;
  if (i < n) y[i] = 2 * x[i];
}
void twice(const float* x, float* y, long n) {
  twice_kernel<<<(n + 255) / 256, 256>>>(x, y, n);
}
""",
    "ops.cpp": """
#include "passes.h"
void run() { twice(nullptr, nullptr, 0); }
""",
}
# torch's headers take most of the time.
OP = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include "passes.h"
using torch::stable::Tensor;
Tensor run(const Tensor& x) {
  Tensor y = torch::stable::empty_like(x);
  twice(static_cast<const float*>(x.data_ptr()), static_cast<float*>(y.data_ptr()), x.numel());
  return y;
}
STABLE_TORCH_LIBRARY(secura_tiny, m) { m.def("twice(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(secura_tiny, CUDA, m) { m.impl("twice", TORCH_BOX(&run)); }
"""


def write_tiny(folder: Path, op: bool = False) -> Path:
    """The sources, with a torch op or without."""
    folder.mkdir(parents=True)
    for name, text in (TINY | {"ops.cpp": OP} if op else TINY).items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def torch_with_cuda(tmp_path, monkeypatch) -> None:
    """A torch that says it is built with nvcc's CUDA, here and in new processes, and has what
    torch's builder links to: on a CPU build of torch all of its way to compile can be tried so."""
    if torch.version.cuda is not None:
        return
    cuda = ".".join(toolchain.tools().version.split(".")[:2])
    (tmp_path / "sitecustomize.py").write_text(
        f"import torch\ntorch.version.cuda = {cuda!r}\n"
        "torch.cuda._is_compiled = lambda: True\ntorch.cuda.is_available = lambda: False\n"
    )
    for name in ("c10_cuda", "torch_cuda"):
        subprocess.run(
            ["g++", "-shared", "-x", "c++", "/dev/null", "-o", str(tmp_path / f"lib{name}.so")],
            check=True,
        )
    for name, folders in {"PYTHONPATH": [ROOT], "LIBRARY_PATH": []}.items():
        monkeypatch.setenv(name, os.pathsep.join(map(str, [tmp_path, *folders])))
    monkeypatch.setattr(torch.version, "cuda", cuda)


def needed(library: Path) -> set[str]:
    """The libraries that it names, but for the C and C++ runtimes."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is missing")
    text = subprocess.check_output(["readelf", "-d", library], text=True)
    assert "RUNPATH" not in text and "RPATH" not in text
    names = set(re.findall(r"\(NEEDED\).*\[(.+?)\.so", text))
    return {name for name in names if re.match("libtorch|libc10|libcu|libpython", name)}


def fake_toolkit(
    folder: Path,
    version: str = "13.0",
    chips: str = "75 80 86 89 90 100 120",
    compiles: str = 'echo "made by {version}" > "$out"',
) -> Path:
    """A CUDA_HOME whose nvcc says that it is of ``version`` and knows ``chips``; of each call that
    compiles or links it writes the host compiler and the arguments to ``folder``/calls.

    Args:
        compiles: what it does then, in sh; $out is the file that it was asked for.
    """
    nvcc = folder / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    known = "\n".join(f"compute_{chip}" for chip in chips.split())
    nvcc.write_text(f"""#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.1"; exit ;;
  --list-gpu-arch) echo "{known}"; exit ;;
  --dryrun) exit ;;
esac
echo "$NVCC_CCBIN $*" >> {shlex.quote(str(folder / "calls"))}
while [ $# -gt 0 ]; do
  case "$1" in -o) out=$2 ;; -MF) : > "$2" ;; esac
  shift
done
{compiles.format(version=version)}
""")
    nvcc.chmod(0o755)
    return folder
