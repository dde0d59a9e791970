"""The CUDA kernels compiled for the CPU: csrc/ with the simulated GPU of tests/host."""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from secura_kernels.backends import cuda
from secura_kernels.backends.cuda import commands, compiler

HOST = Path(__file__).parent / "host"
BUILD = Path(__file__).parents[1] / "build"
SANITIZE = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# g++ then calls the simulated GPU at each access of the kernels [host/global_memory.cpp].
WATCH = "-fsanitize=thread"
SCHEDULES = ("forward", "reversed", "random")


@functools.cache
def load_cuda() -> None:
    """Makes impl="cuda" run: on the GPU that is here, else on the simulated one, compiled with the
    flags of SECURA_HOST_FLAGS."""
    if not torch.cuda.is_available():
        cuda.load(host_library(*os.environ.get("SECURA_HOST_FLAGS", "-O2").split()))
        return
    if compiler.cached() is None:
        need_tools()
    cuda.load(cuda.build(progress=False))


def need_tools() -> None:
    """Skips the test where nvcc or another tool is missing."""
    try:
        compiler.tools()
    except RuntimeError as error:
        pytest.skip(str(error))


def host_command() -> list[str]:
    """g++ with the simulated GPU's headers; skips the test where it is missing or too old."""
    path = shutil.which("g++") if sys.platform == "linux" else None
    if path is None:
        pytest.skip("no g++ on Linux")
    version = subprocess.run([path, "-dumpversion"], capture_output=True, text=True).stdout
    needed = 12 if platform.machine() == "x86_64" else 13  # knows _Float16
    if int(version.split(".")[0]) < needed:
        pytest.skip(f"g++ {version.strip()} is older than {needed}")
    # Kernels look at shared memory as one type and another; #pragma unroll is nvcc's.
    return [
        path,
        "-std=c++20",
        "-fno-strict-aliasing",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        f"-I{HOST}",
        f"-I{compiler.sources()}",
    ]


def host_library(*flags: str) -> Path:
    """The library, compiled once for these sources and flags; its ops are registered for the CPU.

    Args:
        flags: more of them, such as -O2 or ``SANITIZE``.
    """
    import fcntl  # of Unix only

    root = Path(torch.__file__).parent
    command = [
        *host_command(),
        *flags,
        "-fPIC",
        "-DSECURA_DISPATCH_KEY=CPU",
        f"-DTORCH_TARGET_VERSION={commands.TORCH_TARGET}",
        f"-isystem{root / 'include'}",
        commands.stamp(compiler.sources()),
    ]
    sources = sorted(compiler.sources().iterdir())
    digest = hashlib.sha256(" ".join([torch.__version__, *command]).encode())
    for path in [*sources, *sorted(HOST.iterdir())]:
        digest.update(path.read_bytes())
    folder = BUILD / f"host-{digest.hexdigest()[:16]}"
    library = folder / "secura_host.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of tests that run side by side one compiles
        if not library.exists():
            _compile(command, sources, folder, library)
    return library


def _compile(command: list[str], sources: list[Path], folder: Path, library: Path) -> None:
    # The simulated GPU's headers take two thirds of an unoptimised compilation: read once.
    first = folder / "first.h"
    first.write_text('#include "cuda_runtime.h"\n')
    _run([*command, "-x", "c++-header", str(first), "-o", f"{first}.gch"])

    unwatched = [word for word in command if word != WATCH]

    def compiled(source: Path) -> str:
        output = folder / f"{source.name}.o"
        flags = command if source.suffix == ".cu" else unwatched
        if source.parent == HOST:
            flags = [*flags, "-O2"]  # called at each access
        _run([*flags, "-include", str(first), "-x", "c++", "-c", str(source), "-o", str(output)])
        return str(output)

    units = [path for path in sources if path.suffix in (".cu", ".cpp")]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*units, HOST / "global_memory.cpp"]))
    whole = folder / "linking.so"
    libraries = Path(torch.__file__).parent / "lib"
    _run([*unwatched, "-shared", *objects, f"-L{libraries}", "-ltorch_cpu", "-o", str(whole)])
    whole.rename(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if "cannot find -lasan" in done.stderr or "cannot find -lubsan" in done.stderr:
        pytest.skip("g++ has no sanitizers")
    assert done.returncode == 0 and not done.stderr, done.stderr[:4000]  # no warnings either
