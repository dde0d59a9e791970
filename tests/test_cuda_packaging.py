"""How the package is built, without csrc/ compiled and with; csrc/ is one small kernel here."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from cuda_sources import (
    OP,
    needed,
    torch_with_cuda,  # noqa: F401  a fixture
    write_tiny,
)

from secura_kernels import __version__
from secura_kernels.backends.cuda import compiler as builder
from secura_kernels.backends.cuda import toolchain

ROOT = Path(__file__).parents[1]
try:
    builder.tools()
    MISSING = ""
except RuntimeError as error:
    MISSING = str(error)
compiles = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the repository's packaged part, with the small source for csrc/."""
    copy = tmp_path / "checkout"
    shutil.copytree(
        ROOT / "secura_kernels",
        copy / "secura_kernels",
        ignore=shutil.ignore_patterns("__pycache__", "*.so"),
    )
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    write_tiny(copy / "csrc")
    return copy


def package(checkout: Path, hook: str, prelude: str = "", options: str = "", **env: str):
    """Runs what pip calls in ``checkout``, as pip does; returns the process and the new file.
    ``options``: of ``bdist_wheel``, as ``--config-setting=--build-option=`` gives them."""
    program = (
        f"import sys\n{prelude}\nfrom setuptools import build_meta\n"
        f"print('made', build_meta.{hook}('out', {{'--build-option': {options!r}}}))"
    )
    (checkout / "out").mkdir(exist_ok=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SECURA_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=checkout,
        env=clean | env,
        capture_output=True,
        text=True,
    )
    name = done.stdout.rpartition("made ")[2].strip()
    return done, checkout / "out" / name


def inside(wheel: Path) -> set[str]:
    return {
        name.removeprefix("secura_kernels/backends/cuda/")
        for name in zipfile.ZipFile(wheel).namelist()
    }


def test_wheel_is_pure_by_default(checkout):
    # Left by an earlier editable build.
    (checkout / "secura_kernels/backends/cuda" / builder.LIBRARY).write_bytes(b"")
    done, wheel = package(checkout, "build_wheel", SECURA_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert wheel.name.endswith("-py3-none-any.whl")
    assert {"csrc/ops.cpp", "csrc/passes.h", "csrc/twice.cu", "compiler.py"} <= inside(wheel)
    assert "secura_kernels/py.typed" in inside(wheel)
    assert not any(name.endswith((".so", ".o", ".log")) for name in inside(wheel))
    done, sdist = package(checkout, "build_sdist")
    assert done.returncode == 0, done.stderr
    shutil.unpack_archive(sdist, checkout / "unpacked")
    unpacked = checkout / "unpacked" / sdist.name.removesuffix(".tar.gz")
    assert (unpacked / "csrc/twice.cu").is_file() and not any(unpacked.rglob("*.so"))
    done, wheel = package(unpacked, "build_wheel")
    assert done.returncode == 0 and "csrc/twice.cu" in inside(wheel), done.stderr


def test_editable_is_pure_by_default(checkout):
    done, wheel = package(checkout, "build_editable")
    assert done.returncode == 0, done.stderr
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "__editable__.secura_kernels-0.1.0.pth" in inside(wheel)
    assert not (checkout / "secura_kernels/backends/cuda/csrc").exists()


# A compiler that writes an empty library.
PRETEND = """
import types
compiler, toolchain = (types.ModuleType(f"secura_build.{n}") for n in ("compiler", "toolchain"))
compiler.LIBRARY, toolchain.torch_cuda = "secura_cuda.so", lambda: None
compiler.compile_library = lambda source, library, arches, build: library.write_bytes(b"")
sys.modules |= {module.__name__: module for module in (compiler, toolchain)}
"""


@pytest.mark.parametrize("manylinux", ["", "manylinux_2_28_x86_64"])
def test_tags_of_a_wheel_with_the_library(checkout, manylinux):
    """One platform, every Python: the library has no symbol of Python. ``--plat-name`` is for who
    compiled in an image of that manylinux; PyPI takes no plain linux tag."""
    done, wheel = package(
        checkout,
        "build_wheel",
        PRETEND,
        f"--plat-name={manylinux}" if manylinux else "",
        SECURA_BUILD_CUDA="1",
    )
    assert done.returncode == 0, done.stderr
    platform = manylinux or sysconfig.get_platform().replace("-", "_")
    assert wheel.name == f"secura_kernels-{__version__}-py3-none-{platform}.whl"
    assert builder.LIBRARY in inside(wheel)
    files = zipfile.ZipFile(wheel)
    (name,) = (n for n in files.namelist() if n.endswith(".dist-info/WHEEL"))
    stated = files.read(name).decode().splitlines()
    assert f"Tag: py3-none-{platform}" in stated and "Root-Is-Purelib: false" in stated


@compiles
def test_wheel_with_the_library(checkout):
    done, wheel = package(
        checkout, "build_wheel", SECURA_BUILD_CUDA="1", SECURA_CUDA_ARCHES="80,90a"
    )
    assert done.returncode == 0, done.stderr
    assert "-py3-none-linux_" in wheel.name
    assert {builder.LIBRARY, "csrc/ops.cpp", "compiler.py"} <= inside(wheel)
    assert not any(name.endswith((".o", ".log")) for name in inside(wheel))
    done, wheel = package(checkout, "build_wheel")  # without it again
    assert wheel.name.endswith("any.whl") and builder.LIBRARY not in inside(wheel)


@compiles
def test_editable_with_the_library(checkout):
    done, wheel = package(
        checkout, "build_editable", SECURA_BUILD_CUDA="1", SECURA_CUDA_ARCHES="80"
    )
    assert done.returncode == 0, done.stderr
    assert (checkout / "secura_kernels/backends/cuda" / builder.LIBRARY).is_file()
    assert builder.LIBRARY not in inside(wheel)


@compiles
@pytest.mark.usefixtures("torch_with_cuda")
def test_torchs_builder_where_torch_has_cuda(checkout):
    """``CUDAExtension`` and ``BuildExtension``."""
    (checkout / "csrc/ops.cpp").write_text(OP)
    settings = dict(SECURA_BUILD_CUDA="1", SECURA_CUDA_ARCHES="80")
    done, wheel = package(checkout, "build_wheel", **settings)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "building 'secura_cuda' extension" in done.stdout + done.stderr
    assert "-py3-none-linux_" in wheel.name
    assert {name for name in inside(wheel) if name.endswith((".so", ".o", ".log"))} == {
        builder.LIBRARY
    }
    name = f"secura_kernels/backends/cuda/{builder.LIBRARY}"
    library = zipfile.ZipFile(wheel).extract(name, checkout)
    assert needed(library) <= {"libtorch_cpu", "libc10"}
    (checkout / "csrc/twice.cu").write_text("void twice() { unknown_name = 1; }\n")
    done, _ = package(checkout, "build_editable", **settings)
    assert done.returncode == 1 and "unknown_name" in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("SECURA_BUILD_CUDA=1: ")


@compiles
@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_packaging_says_why_it_cannot_compile(checkout, hook):
    """Of pip's isolated build, which has no torch, of chips that are none, and of a toolkit for
    another torch. One sentence each, no traceback."""
    done, _ = package(checkout, hook, "sys.modules['torch'] = None", SECURA_BUILD_CUDA="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "SECURA_BUILD_CUDA=1 compiles against the torch that is installed, and there is none, or "
        "pip's isolated build does not see it: pip install 'torch>=2.11' 'setuptools>=77' ninja, "
        "then SECURA_BUILD_CUDA=1 pip install --no-build-isolation ."
    )
    done, _ = package(checkout, hook, SECURA_BUILD_CUDA="1", SECURA_CUDA_ARCHES="sm_80")
    assert done.returncode == 1
    assert "SECURA_CUDA_ARCHES=['sm_80'] is not allowed" in done.stderr
    done, _ = package(
        checkout, hook, "import torch; torch.version.cuda = '11.8'", SECURA_BUILD_CUDA="1"
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("SECURA_BUILD_CUDA=1: the CUDA kernels cannot be compiled here: ")
    assert last.endswith(
        "set CUDA_HOME to the folder of a CUDA 11 toolkit, or install a torch for "
        f"CUDA {toolchain.tools().version.partition('.')[0]}"
    )
