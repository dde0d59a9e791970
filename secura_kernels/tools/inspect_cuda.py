"""Compiles csrc/ without a GPU, and reads the code of every kernel for every chip.

``python -m secura_kernels.tools.inspect_cuda`` prints registers, stack and spills, static shared
memory and instruction counts, and exits with 1 where a kernel has a fault: a stack, a spill, or an
instruction that it needs and lacks. The library is kept in the user's cache.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..backends.cuda import compiler
from ..backends.cuda.toolchain import CHIPS

INSTRUCTIONS = ("HMMA", "LDSM", "LDGSTS", "LDG.E.128", "STG.E.128", "LDL", "STL", "FFMA")
COUNTED = re.compile(r" (HMMA|LDSM|LDGSTS|LDL|STL|FFMA)\b| (LDG|STG)\.E[.\w]*\.128\b")

# From sm_80 on every product takes its tiles by cp.async. In 16 bits:
COPIED = ("LDGSTS",)
TENSOR_CORES = ("HMMA", "LDSM", *COPIED)
ASKED = {
    "gather": (),  # element by element, from any strides
    # With a core in float32, whatever the layer's dtype.
    "project": ("FFMA", *COPIED),
    "core_gradient": ("FFMA", *COPIED),
    "effective_weight": ("FFMA", *COPIED, "LDG.E.128", "STG.E.128"),  # W in, W_eff out
    "product": (*TENSOR_CORES, "STG.E.128"),  # y
    "down": TENSOR_CORES,  # writes r columns only, which need not be a multiple of 8
    "epilogue": (*TENSOR_CORES, "LDG.E.128", "STG.E.128"),  # y in place
    "gate_backward": (*TENSOR_CORES, "STG.E.128"),  # G; what it reads comes by cp.async
    "decode": (*TENSOR_CORES, "LDG.E.128"),  # W
    "weight_core_gradient": (*TENSOR_CORES, "LDG.E.128"),  # W
}
DTYPES = {"13__nv_bfloat16": "bfloat16", "6__half": "float16", "f": "float32"}
FLAGS = {"product": "gate", "gate_backward": "full", "weight_core_gradient": "full"}
ALONG = ("DEPTH", "ROWS")


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one chip. ``stack``, ``spills``, ``shared``: bytes."""

    chip: str
    kernel: str
    dtype: str
    variant: tuple[str, ...]
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: dict[str, int]

    def faults(self) -> list[str]:
        """What a kernel must not have."""
        found = []
        if self.stack or self.spills:
            found.append(f"{self.stack} bytes of stack, {self.spills} of spills")
        found += [f"no {i}" for i in self._asked() if not self.instructions[i]]
        return found

    def _asked(self) -> tuple[str, ...]:
        if int(self.chip.rstrip("af")) < 80:  # neither mma on bfloat16 nor cp.async
            return ()
        if self.dtype == "float32" and self.kernel != "gather":
            return "FFMA", *COPIED
        return ASKED[self.kernel]

    def __str__(self) -> str:
        name = f"{self.kernel}<{', '.join((self.dtype, *self.variant))}>"
        counts = " ".join(f"{i} {n}" for i, n in self.instructions.items() if n)
        return (
            f"sm_{self.chip:<4} {name:36} {self.registers:3} registers {self.stack:4} stack "
            f"{self.spills:4} spills {self.shared:5} shared  {counts}"
        )


def read(library: Path, arches: Sequence[str]) -> list[Compiled]:
    """Every kernel of a library that ``compiler.build`` has made for ``arches``.

    Raises:
        RuntimeError: no cuobjdump. ValueError: a kernel that ``ASKED`` does not know.
    """
    tool = cuobjdump()
    usage = _usage(library.with_suffix(".log").read_text())
    with ThreadPoolExecutor(2) as pool:  # a chip's code is 60 MB of text
        codes = pool.map(lambda arch: _code(tool, library, arch), arches)
        found = [
            Compiled(arch, *_name(symbol), *usage[arch, symbol], counts)
            for arch, code in zip(arches, codes, strict=True)
            for symbol, counts in code.items()
        ]
    return sorted(found, key=lambda c: (arches.index(c.chip), c.kernel, c.dtype, c.variant))


def _usage(log: str) -> dict[tuple[str, str], tuple[int, int, int, int]]:
    """ptxas' registers, stack, spills and static shared memory by chip and mangled name."""
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'\n.*\n *(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers(.*)"
    )
    found = {}
    for symbol, chip, stack, stores, loads, registers, rest in re.findall(pattern, log):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[chip, symbol] = (
            int(registers),
            int(stack),
            int(stores) + int(loads),
            int(shared[1]) if shared else 0,
        )
    return found


def _code(tool: str, library: Path, arch: str) -> dict[str, dict[str, int]]:
    """The count of each of ``INSTRUCTIONS`` in each kernel for a chip."""
    text = subprocess.run(
        [tool, "-sass", "-arch", f"sm_{arch}", library], capture_output=True, text=True, check=True
    ).stdout
    _, *parts = re.split(r"Function : (\w+)\n", text)
    found = {}
    for symbol, code in zip(parts[::2], parts[1::2], strict=True):
        counts = Counter(short or f"{wide}.E.128" for short, wide in COUNTED.findall(code))
        found[symbol] = {i: counts[i] for i in INSTRUCTIONS}
    return found


def _name(symbol: str) -> tuple[str, str, tuple[str, ...]]:
    """Kernel, dtype, and the other template arguments, of a mangled name."""
    found = re.search(rf"\d([a-z_]+)_kernelI({'|'.join(DTYPES)})(\w*?)EEvNS", symbol)
    if not found or found[1] not in ASKED:
        raise ValueError(f"unknown kernel {symbol}: say in ASKED what it needs")
    kernel, dtype, rest = found.groups()
    variant = []
    for kind, value in re.findall(r"L(b|i|NS_5AlongE)(\d+)E", rest):
        if kind == "i":
            variant.append(value)
        elif kind == "b":
            variant += [FLAGS[kernel]] * int(value)
        else:
            variant.append(ALONG[int(value)])
    return kernel, DTYPES[dtype], tuple(variant)


def cuobjdump() -> str:
    """The toolkit's, else the one that Triton's package carries.

    Raises:
        RuntimeError: there is none, or no nvcc.
    """
    folders = [str(Path(compiler.tools()[0]).resolve().parent), os.environ.get("PATH", "")]
    triton = importlib.util.find_spec("triton")
    if triton:
        folders += [f"{root}/backends/nvidia/bin" for root in triton.submodule_search_locations]
    found = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if found is None:
        raise RuntimeError("cuobjdump is missing: install the whole CUDA toolkit, or triton")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        default=list(CHIPS),
        help="chips as nvcc names them (default: %(default)s)",
    )
    arches = compiler.check_arches("--arch", parser.parse_args().arch)
    faulty = 0
    for compiled in read(compiler.build(arches), arches):
        faults = compiled.faults()
        faulty += bool(faults)
        print(f"{compiled}{'  FAULT: ' * bool(faults)}{'; '.join(faults)}")
    print(f"{faulty} kernel(s) with faults" if faulty else "no faults")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
