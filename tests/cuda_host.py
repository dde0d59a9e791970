"""The CUDA kernels compiled for the CPU: csrc/ with the simulated GPU of tests/host."""

import hashlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from secura_kernels.cuda import compiler

HOST = Path(__file__).parent / "host"
BUILD = Path(__file__).parents[1] / "build"
FLAGS = ["-std=c++20", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
         "-DSECURA_DISPATCH_KEY=CPU", f"-DTORCH_TARGET_VERSION={compiler.TORCH_TARGET}"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def host_library(*flags: str) -> Path:
    """The library, compiled once for these sources and flags; its ops are registered for the CPU.

    Args:
        flags: more of them, such as -O2 or ``SANITIZE``.
    """
    sources = compiler.sources()
    torch_include = Path(torch.__file__).parent / "include"
    command = ["g++", *FLAGS, *flags, f"-I{HOST}", f"-I{sources}", f"-isystem{torch_include}"]
    digest = hashlib.sha256(" ".join([torch.__version__, *command]).encode())
    for path in sorted([*sources.iterdir(), *HOST.iterdir()]):
        digest.update(path.read_bytes())
    folder = BUILD / f"host-{digest.hexdigest()[:16]}"
    library = folder / "secura_host.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> str:
        output = folder / f"{source.name}.o"
        run([*command, "-x", "c++", "-c", str(source), "-o", str(output)])
        return str(output)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sorted(p for p in sources.iterdir()
                                                 if p.suffix in (".cu", ".cpp"))))
    whole = folder / "linking.so"
    run([*command, "-shared", *objects, f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu",
         "-o", str(whole)])
    whole.rename(library)
    return library


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")
    assert not done.stderr, done.stderr[:4000]  # no warnings
