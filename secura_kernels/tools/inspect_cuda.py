"""Compiles csrc/ without a GPU, and reads the code of every kernel for every chip.

``python -m secura_kernels.tools.inspect_cuda`` prints registers, stack and spills, static shared
memory, instruction counts, and the size of the loop that has the most HMMA. It exits with 1 where a
kernel has a fault: a stack, a spill, an instruction that it needs and lacks, too many instructions
around each HMMA, or registers for too few blocks an SM. The library is kept in the user's cache.
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
from ..backends.host import cdiv

INSTRUCTIONS = ("HMMA", "LDSM", "LDGSTS", "LDG.E.128", "STG.E.128", "LDL", "STL", "FFMA")
COUNTED = re.compile(r" (HMMA|LDSM|LDGSTS|LDL|STL|FFMA)\b| (LDG|STG)\.E[.\w]*\.128\b")

# From sm_80 on every product but the weight domain's takes its tiles by cp.async. In 16 bits:
COPIED = ("LDGSTS",)
TENSOR_CORES = ("HMMA", "LDSM", *COPIED)
ASKED = {
    "gather": (),  # element by element, from any strides
    # With a core in float32, whatever the layer's dtype.
    "project": ("FFMA", *COPIED),
    "core_gradient": ("FFMA", *COPIED),
    "effective_weight": ("HMMA", "LDSM", "LDG.E.128", "STG.E.128"),  # P, R and W in, W_eff out
    "product": (*TENSOR_CORES, "STG.E.128"),  # y
    "down": TENSOR_CORES,  # writes r columns only, which need not be a multiple of 8
    "epilogue": (*TENSOR_CORES, "LDG.E.128", "STG.E.128"),  # y in place
    "gate_backward": (*TENSOR_CORES, "STG.E.128"),  # G; what it reads comes by cp.async
    "decode": (*TENSOR_CORES, "LDG.E.128"),  # W
    "weight_core_gradient": (*TENSOR_CORES, "LDG.E.128"),  # W
}
# Kernels of operands in whole chunks: instructions for each HMMA in the main loop, at most. The
# skinny passes feed fewer with what they copy; gate_backward decodes and scales dY in its loop.
PER_HMMA = {
    "product": 3.5,
    "epilogue": 4,
    "down": 5,
    "gate_backward": 30,
    "weight_core_gradient": 4,
}
# Theirs, too: blocks that an SM has registers for, at least, and in some variants other than that.
BLOCKS = {"product": 2, "epilogue": 2, "down": 1, "gate_backward": 3, "weight_core_gradient": 1}
BLOCKS_OF = {  # a wide tile of product is alone there
    ("product", "256"): 1,
    ("gate_backward", "128"): 2,
    ("gate_backward", "256"): 1,
}
DTYPES = {"13__nv_bfloat16": "bfloat16", "6__half": "float16", "f": "float32"}
ENUMS = {"NS_5AlongE": ("DEPTH", "ROWS"), "NS_5ReadsE": ("ANY", "CHUNKS")}


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one chip. ``stack``, ``spills``, ``shared``: bytes. ``loop``: the
    instructions and the HMMA of the loop that has the most HMMA."""

    chip: str
    kernel: str
    dtype: str
    variant: tuple[str, ...]
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: dict[str, int]
    loop: tuple[int, int] = (0, 0)
    threads: int = 1

    @property
    def blocks(self) -> int:
        """That an SM has registers for, which it gives by eights to a thread."""
        return 65536 // (self.threads * cdiv(self.registers, 8) * 8)

    def faults(self) -> list[str]:
        """What a kernel must not have."""
        found = []
        if self.stack or self.spills:
            found.append(f"{self.stack} bytes of stack, {self.spills} of spills")
        found += [f"no {i}" for i in self._asked() if not self.instructions[i]]
        if "CHUNKS" in self.variant:
            issued, hmma = self.loop
            if issued > PER_HMMA[self.kernel] * hmma and self._asked():
                found.append(f"{issued} instructions for {hmma} HMMA in the main loop")
            others = [BLOCKS_OF.get((self.kernel, word)) for word in self.variant]
            least = next(filter(None, others), BLOCKS[self.kernel])
            if self.blocks < least:
                found.append(f"registers for {self.blocks} block(s) an SM, needed: {least}")
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
        issued, hmma = self.loop
        loop = f"  loop of {issued} for {hmma} HMMA" if hmma else ""
        return (
            f"sm_{self.chip:<4} {name:44} {self.registers:3} registers {self.blocks:2} blocks "
            f"{self.stack:4} stack {self.spills:4} spills {self.shared:5} shared  "
            f"{counts}{loop}"
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
        threads = {arch: _threads(tool, library, arch) for arch in arches}
        found = [
            Compiled(arch, *_name(symbol), *usage[arch, symbol], *counts, threads[arch][symbol])
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


def _code(tool: str, library: Path, arch: str) -> dict[str, tuple[dict[str, int], tuple[int, int]]]:
    """The count of each of ``INSTRUCTIONS`` in each kernel for a chip, and its main loop."""
    text = subprocess.run(
        [tool, "-sass", "-arch", f"sm_{arch}", library], capture_output=True, text=True, check=True
    ).stdout
    _, *parts = re.split(r"Function : (\w+)\n", text)
    found = {}
    for symbol, code in zip(parts[::2], parts[1::2], strict=True):
        counts = Counter(short or f"{wide}.E.128" for short, wide in COUNTED.findall(code))
        found[symbol] = {i: counts[i] for i in INSTRUCTIONS}, _main_loop(code)
    return found


def _threads(tool: str, library: Path, arch: str) -> dict[str, int]:
    """The threads of a block of each kernel for a chip."""
    text = subprocess.run(
        [tool, "-elf", "-arch", f"sm_{arch}", library],
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
    ).stdout
    _, *parts = re.split(r"^\.nv\.info\.(\w+)\n", text, flags=re.MULTILINE)
    pattern = r"EIATTR_MAX_THREADS\s+Format:.*\s+Value:\s+0x(\w+)"
    return {
        symbol: int(re.search(pattern, part)[1], 16)
        for symbol, part in zip(parts[::2], parts[1::2], strict=True)
    }


def _main_loop(code: str) -> tuple[int, int]:
    """Instructions and HMMA of the loop, from a backward branch's target to the branch, that has
    the most HMMA; of two such, the longer; of one in another, the inner. (0, 0): none has any."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.*?);", code)]
    hmma = [at for at, text in lines if "HMMA" in text]
    loops = []
    for end, text in lines:
        to = re.search(r"\bBRA\b.* (0x[0-9a-f]+)", text)
        if to and (start := int(to[1], 16)) <= end and any(start <= at <= end for at in hmma):
            loops.append((start, end))
    inner = [
        (a, b)
        for a, b in loops
        if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)
    ]
    sizes = [
        (sum(a <= at <= b for at in hmma), sum(a <= at <= b for at, _ in lines)) for a, b in inner
    ]
    return max(sizes, default=(0, 0))[::-1]


def _name(symbol: str) -> tuple[str, str, tuple[str, ...]]:
    """Kernel, dtype, and the other template arguments, of a mangled name."""
    found = re.search(rf"\d([a-z_]+)_kernelI({'|'.join(DTYPES)})(\w*?)EEvNS", symbol)
    if not found or found[1] not in ASKED:
        raise ValueError(f"unknown kernel {symbol}: say in ASKED what it needs")
    kernel, dtype, rest = found.groups()
    variant = []
    for kind, value in re.findall(rf"L(b|i|{'|'.join(ENUMS)})(\d+)E", rest):
        if kind == "i":
            variant.append(value)
        elif kind == "b":
            variant += ["gate"] * int(value)  # of product
        else:
            variant.append(ENUMS[kind][int(value)])
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
