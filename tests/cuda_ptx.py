"""The PTX that nvcc makes of csrc/, run on the simulated GPU in place of the kernels."""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import ptx
from cuda_host import BUILD, HOST, host_command

from secura_kernels.backends.cuda import commands, compiler

BOTH = ("gather", "project", "core_gradient")  # in the output domain and the weight domain
OUTPUT = (*BOTH, "down", "product", "epilogue", "gate_backward")
WEIGHT = (*BOTH, "effective_weight", "decode", "weight_core_gradient")
# A function of csrc/ that is no kernel; the others' addresses are counted from it.
EXPORTED = "_ZN6secura4downERKNS_4DownERKNS_6LaunchE"


def ptx_of(name: str, dtype: str, chip: str = "80") -> str:
    """What nvcc makes of the pass's kernels for layers of this dtype, named as ``csrc/types.cuh``
    does; compiled once for these sources."""
    source, tools = HOST / "ptx_sources.cu", compiler.tools()
    sources = commands.digest(compiler.sources()), source.read_text()
    digest = hashlib.sha256(" ".join([tools.version, chip, *sources, name, dtype]).encode())
    found = BUILD / f"ptx-{digest.hexdigest()[:16]}.ptx"
    if not found.exists():
        found.parent.mkdir(exist_ok=True)
        made = found.with_suffix(f".{os.getpid()}")  # of tests that run side by side one is kept
        flags = ["-ptx", "-std=c++17", "-O3", f"-arch=compute_{chip}", "-I", compiler.sources()]
        flags += [f'-DSECURA_PASS="{name}.cu"', f"-DSECURA_DTYPE={dtype}"]
        done = subprocess.run(
            [tools.nvcc, *flags, source, "-o", made], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[:4000]
        made.rename(found)
    return found.read_text()


def key(mangled: str) -> str:
    """A kernel's name without its anonymous namespace, which each compiler names in its own way."""
    found = re.match(r"_ZN6secura(\d+)_GLOBAL__N_", mangled)
    return mangled[found.end(1) + int(found[1]) :]


class Translation:
    """Kernels from PTX, compiled once and loaded, ready to run in place of those of a library.

    Args:
        library: of ``host_library``, loaded by now.
    """

    def __init__(self, kernels: Iterable[ptx.Kernel], library: Path):
        code = "\n".join(kernel.code for kernel in kernels)
        digest = hashlib.sha256(f"{library} {code}".encode()).hexdigest()[:16]
        built, launches = BUILD / f"ptx-{digest}.so", HOST / "ptx_launches.cpp"
        if not built.exists():
            made = built.with_suffix(f".{os.getpid()}")
            source = made.with_suffix(".cpp")
            source.write_text(f'#include "ptx.h"\nextern "C" {{\n{code}}}\n')
            command = [*host_command(), "-O2", "-w", "-fPIC", "-shared", source, launches, library]
            done = subprocess.run([*command, "-o", made], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[:4000]
            source.unlink()
            made.rename(built)
        self._loaded, self._replaced = ctypes.CDLL(str(built)), kernels_of(library)

    @contextlib.contextmanager
    def running(self, kernels: Iterable[ptx.Kernel]) -> Iterator[None]:
        """Only these kernels can be launched meanwhile, and what was translated runs then."""
        for kernel in kernels:
            function = getattr(self._loaded, kernel.function)
            self._loaded.secura_run_instead(self._address(kernel), function)
        try:
            yield
        finally:
            self._loaded.secura_run_all_themselves()

    def launches(self, kernel: ptx.Kernel) -> int:
        """Of one of the kernels that are ``running``."""
        return self._loaded.secura_launches(self._address(kernel))

    def _address(self, kernel: ptx.Kernel) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._replaced[key(kernel.name)])


@functools.cache
def kernels_of(library: Path) -> dict[str, int]:
    """The addresses of the library's kernels by ``key``."""
    listed = subprocess.check_output(["nm", library], text=True)
    offsets = {name: int(at, 16) for at, name in re.findall(r"^(\w+) [tT] (\w+)$", listed, re.M)}
    exported = ctypes.cast(getattr(ctypes.CDLL(str(library)), EXPORTED), ctypes.c_void_p).value
    base = exported - offsets[EXPORTED]
    return {
        key(name): base + at
        for name, at in offsets.items()
        if re.match(r"_ZN6secura12_GLOBAL__N_1\d+\w*_kernelI", name)
    }
