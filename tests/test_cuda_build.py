"""How csrc/ is compiled, cached and packaged, on a source folder of one small kernel."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

from secura_kernels.backends.cuda import compiler as builder

ROOT = Path(__file__).parents[1]
try:
    builder.tools()
    MISSING = ""
except RuntimeError as error:
    MISSING = str(error)
compiles = pytest.mark.skipif(bool(MISSING), reason=MISSING)

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
""",
}


def write_tiny(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, text in TINY.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """The sources, under a name that needs quoting; the user's cache is an empty folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_tiny(tmp_path / "tiny source")


@pytest.fixture
def no_tools(tmp_path, monkeypatch):
    """A machine without a CUDA toolkit and a compiler."""
    def remove():
        for name in ("CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(builder, "DEFAULT_CUDA", tmp_path)

    return remove


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """The library of the small source, and the log."""
    if MISSING:
        pytest.skip(MISSING)
    folder = tmp_path_factory.mktemp("built")
    library = folder / builder.LIBRARY
    log = builder.compile_library(write_tiny(folder / "src"), library, ["80"], progress=False)
    return library, log.read_text()


def test_library_has_the_op_and_needs_little_of_torch(built):
    library, log = built
    program = ("import sys, torch\ntorch.ops.load_library(sys.argv[1])\n"
               "print(torch.ops.secura_tiny.twice.default._schema)")
    done = subprocess.run([sys.executable, "-c", program, str(library)], capture_output=True,
                          text=True)
    assert done.stdout.strip() == "secura_tiny::twice(Tensor x) -> Tensor", done.stderr
    assert "twice_kernel" in log and "registers" in log and "0 bytes spill stores" in log


def test_library_links_only_libtorch_cpu(built):
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("readelf and nm (binutils) are missing")
    needed = subprocess.check_output(["readelf", "-d", built[0]], text=True)
    assert "[libtorch_cpu.so]" in needed and "RUNPATH" not in needed
    for other in ("libtorch_cuda", "libtorch_python", "libpython", "libcudart"):
        assert other not in needed
    # A second CUDA runtime in the process would take over the calls.
    assert " cuda" not in subprocess.check_output(["nm", "-D", built[0]], text=True)


@compiles
@pytest.mark.gpu
def test_op_runs(built):
    major, minor = torch.cuda.get_device_capability()
    if major != 8:
        pytest.skip(f"compiled for sm_80, this is sm_{major}{minor}")
    torch.ops.load_library(built[0])
    x = torch.randn(1000, device="cuda")
    assert torch.equal(torch.ops.secura_tiny.twice(x), 2 * x)


@compiles
def test_build_is_cached_and_found_without_nvcc(tiny, no_tools, capsys):
    assert builder.cached(["80"], source=tiny) is None
    library = builder.build(["80"], source=tiny, progress=True)
    assert "compiling secura_kernels CUDA kernels: 100%" in capsys.readouterr().err
    assert library.is_file() and library.with_suffix(".log").is_file()
    assert library.is_relative_to(os.environ["XDG_CACHE_HOME"])
    no_tools()
    assert builder.build(["80", "80"], source=tiny) == library
    assert builder.cached(["80"], source=tiny) == library
    assert capsys.readouterr().err == ""
    assert builder.cached(["86"], source=tiny) is None
    (tiny / "passes.h").write_text(TINY["passes.h"] + "// changed\n")
    assert builder.cached(["80"], source=tiny) is None


@compiles
def test_build_dir_compiles_only_what_changed(tiny, tmp_path):
    def run() -> str:
        return builder.compile_library(tiny, tmp_path / "lib.so", ["80"], tmp_path / "objects",
                                       progress=False).read_text()

    assert "twice.cu.o" in run()
    (tiny / "ops.cpp").write_text(TINY["ops.cpp"] + "// changed\n")
    log = run()
    assert "-o ops.cpp.o" in log and "-o twice.cu.o" not in log


@compiles
def test_failed_compile_names_the_error_and_the_log(tiny, tmp_path):
    library = tmp_path / "lib.so"
    (tiny / "twice.cu").write_text("void twice() { unknown_name = 1; }\n")
    with pytest.raises(RuntimeError, match="unknown_name") as caught:
        builder.compile_library(tiny, library, ["80"], progress=False)
    assert str(library.with_suffix(".log")) in str(caught.value)
    assert "unknown_name" in library.with_suffix(".log").read_text()
    assert not library.exists()


@compiles
def test_undefined_symbol_fails_at_link_time(tiny, tmp_path):
    """Such as one that only libtorch_cuda has."""
    (tiny / "twice.cu").write_text("\n")
    with pytest.raises(RuntimeError, match=r"undefined reference to .*twice"):
        builder.compile_library(tiny, tmp_path / "lib.so", ["80"], progress=False)


@compiles
def test_two_processes_at_once_compile_once(tiny):
    program = ("import sys; from pathlib import Path\n"
               "from secura_kernels.backends.cuda import compiler\n"
               "print(compiler.build(['80'], source=Path(sys.argv[1]), progress=False))")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen([sys.executable, "-c", program, str(tiny)], env=env, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    ends = [process.communicate(timeout=100) for process in both]
    assert ends[0][0] == ends[1][0] != "" and not any(process.returncode for process in both)
    assert sum("compiling" in trouble.partition("waiting")[0] for _, trouble in ends) == 1
    assert Path(ends[0][0].strip()).is_file()


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ctrl_c_ends_the_compilers_and_leaves_no_library(tiny, tmp_path, monkeypatch):
    """nvcc and g++ are stand-ins here: the compiler notes its process and sleeps."""
    if shutil.which("ninja") is None:
        pytest.skip("ninja is missing")
    notes = tmp_path / "pids"
    fake = tmp_path / "cuda/bin/nvcc"
    fake.parent.mkdir(parents=True)
    fake.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit\necho $$ >> "{notes}"\n'
                    "exec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("NVCC_CCBIN", "g++")

    def interrupt():
        while not notes.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        builder.build(["80"], source=tiny, progress=False)
    assert time.monotonic() - start < 15
    while any(map(is_running, notes.read_text().split())):
        assert time.monotonic() - start < 15
        time.sleep(0.02)
    assert builder.cached(["80"], source=tiny) is None


def test_missing_tools_are_named_together(tiny, tmp_path, no_tools):
    no_tools()
    with pytest.raises(RuntimeError, match="missing") as caught:
        builder.compile_library(tiny, tmp_path / "lib.so", ["80"])
    for part in ("nvcc", "CUDA_HOME", "g++"):
        assert part in str(caught.value)


@pytest.mark.parametrize("bad", ["80", ["sm_80"], "abc", ["abc"], [], ["70"], ["80a"], [90], 80])
def test_bad_arches(tiny, tmp_path, bad):
    for call in (lambda: builder.build(bad, source=tiny),
                 lambda: builder.cached(bad, source=tiny),
                 lambda: builder.compile_library(tiny, tmp_path / "lib.so", bad)):
        with pytest.raises(ValueError, match="is not allowed: it must be a list") as e:
            call()
        assert str(e.value).startswith(f"arches={bad!r} ")


def test_arches_of_the_visible_gpus(tiny, monkeypatch):
    found = [(9, 0), (8, 0), (9, 0), (7, 0), (7, 5), (10, 0), (12, 0)]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: found[i])
    assert builder._visible_arches() == ["75", "80", "90a", "100a", "120a"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"no NVIDIA GPU .*arches="):
        builder.build(source=tiny)
    assert builder.cached(source=tiny) is None


def test_sources(tiny, tmp_path, monkeypatch):
    assert builder.sources() == ROOT / "csrc"
    package = tmp_path / "site-packages/secura_kernels/backends/cuda"
    monkeypatch.setattr(builder, "HERE", package)
    with pytest.raises(FileNotFoundError, match="CUDA sources are missing"):
        builder.sources()
    assert write_tiny(package / "csrc") == builder.sources()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the repository's packaged part, with the small source for csrc/."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / "secura_kernels", copy / "secura_kernels",
                    ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    write_tiny(copy / "csrc")
    return copy


def package(checkout: Path, hook: str, prelude: str = "", **env: str):
    """Runs what pip calls in ``checkout``, as pip does; returns the process and the new file."""
    program = (f"import sys\n{prelude}\nfrom setuptools import build_meta\n"
               f"print('made', build_meta.{hook}('out'))")
    (checkout / "out").mkdir(exist_ok=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SECURA_")}
    done = subprocess.run([sys.executable, "-c", program], cwd=checkout, env=clean | env,
                          capture_output=True, text=True)
    name = done.stdout.rpartition("made ")[2].strip()
    return done, checkout / "out" / name


def inside(wheel: Path) -> set[str]:
    return {name.removeprefix("secura_kernels/backends/cuda/")
            for name in zipfile.ZipFile(wheel).namelist()}


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


@compiles
def test_wheel_with_the_library(checkout):
    done, wheel = package(checkout, "build_wheel", SECURA_BUILD_CUDA="1",
                          SECURA_CUDA_ARCHES="80,90a")
    assert done.returncode == 0, done.stderr
    assert "-py3-none-linux_" in wheel.name
    assert {builder.LIBRARY, "csrc/ops.cpp", "compiler.py"} <= inside(wheel)
    assert not any(name.endswith((".o", ".log")) for name in inside(wheel))
    done, wheel = package(checkout, "build_wheel")  # without it again
    assert wheel.name.endswith("any.whl") and builder.LIBRARY not in inside(wheel)


@compiles
def test_editable_with_the_library(checkout):
    done, wheel = package(checkout, "build_editable", SECURA_BUILD_CUDA="1",
                          SECURA_CUDA_ARCHES="80")
    assert done.returncode == 0, done.stderr
    assert (checkout / "secura_kernels/backends/cuda" / builder.LIBRARY).is_file()
    assert builder.LIBRARY not in inside(wheel)


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_packaging_says_why_it_cannot_compile(checkout, hook):
    """Of pip's isolated build, which has no torch, and of chips that are none."""
    done, _ = package(checkout, hook, "sys.modules['torch'] = None", SECURA_BUILD_CUDA="1")
    assert done.returncode == 1
    assert "SECURA_BUILD_CUDA=1 pip install --no-build-isolation ." in done.stderr
    done, _ = package(checkout, hook, SECURA_BUILD_CUDA="1", SECURA_CUDA_ARCHES="sm_80")
    assert done.returncode == 1
    assert "SECURA_CUDA_ARCHES=['sm_80'] is not allowed" in done.stderr
