"""Compiles every shipped configuration for every supported chip, without a GPU, and reads the code.

``python -m secura_kernels.tools.inspect_triton`` prints registers, stack (spills), shared memory,
blocks an SM, instructions an element and instruction counts, and exits with 1 where a configuration
has a fault: a spill, more shared memory than the chip gives a block, a tensor-core or bulk-copy
instruction that it claims and lacks, more instructions and fewer blocks than its pass may have, or
a tensor core that reads, with no proxy fence, what threads put into shared memory.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ..backends.host import cdiv
from ..backends.triton import DTYPES, chips, tiles
from ..backends.triton.chips import CHIPS, INTERPRETER, rank_block
from ..backends.triton.launch import INTERPRETED, instead_of_launching
from ..backends.triton.tiles import Tile, rows_of
from .cases import RUNS, Inputs, run
from .replay import FAILURES, first_line

SHAPE = (8192, 4096, 4096)  # M, N, K: sizes that are multiples of 16 are compiled for as such
RANKS = (16, 64, 150)
INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "UTMALDG", "LDGSTS", "LDG", "STG", "LDL", "STL", "MUFU")
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")
# Blocks an SM, at least, where ``tiles.INSTRUCTIONS`` hold.
BLOCKS = {"epilogue": 2, "batched_epilogue": 2, "gate_backward": 2}
BAR_RANK = 64
WITHOUT_PRODUCT = ("gather", "bias_parts", "sum_of_parts")


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one chip. ``stack``, ``shared``: bytes. ``largest``: of the tile
    that large matrices take. ``issued``: instructions of what ``tiles.INSTRUCTIONS`` counts.
    ``unfenced``: products that ``unfenced_products`` finds."""

    chip: int
    name: str
    run: str
    tile: Tile
    dtype: str
    r: int
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]
    largest: bool = False
    issued: int = 0
    unfenced: int = 0

    @property
    def blocks(self) -> int:
        """That an SM holds: registers go by eights to a thread, and 1 KiB more to each block."""
        chip, threads = CHIPS[self.chip], 32 * self.tile.warps
        return min(
            65536 // (threads * cdiv(self.registers, 8) * 8),
            (chip.shared_memory + 1024) // (self.shared + 1024),
            chip.threads // threads,
        )

    @property
    def per_element(self) -> float:
        """Of the tile."""
        return self.issued * 32 * self.tile.warps / (self.tile.m * self.tile.n)

    def faults(self) -> list[str]:
        """What a shipped configuration must not have."""
        chip, found = CHIPS[self.chip], []
        if self.stack:
            found.append(f"{self.stack} bytes of stack: registers spill")
        if self.shared > chip.shared_memory:
            found.append(f"{self.shared} bytes of shared memory, above {chip.shared_memory}")
        if self.dtype != "float32" and self.name not in WITHOUT_PRODUCT:
            wanted = (chip.tensor_core,) if self.name.startswith("product") else TENSOR_CORES
            if not any(self.instructions.get(i) for i in wanted):
                found.append(f"no {' or '.join(wanted)}")
        if self.tile.tma and not self.instructions.get("UTMALDG"):
            found.append("no UTMALDG")
        if self.unfenced:
            found.append(f"{self.unfenced} product(s) read shared memory with no proxy fence")
        if self.run in tiles.INSTRUCTIONS and self.r <= BAR_RANK and self.dtype != "float32":
            most, least = tiles.INSTRUCTIONS[self.run], BLOCKS.get(self.run, 1)
            if self.largest and self.per_element > most:
                found.append(f"{self.per_element:.1f} instructions an element, above {most}")
            if self.blocks < least:
                found.append(f"{self.blocks} block(s) an SM, needed: {least}")
        return found

    def __str__(self) -> str:
        counts = " ".join(f"{i} {n}" for i, n in self.instructions.items() if n)
        t = self.tile
        issued = (
            f"{self.per_element:4.1f} an element" if self.run in tiles.INSTRUCTIONS else " " * 15
        )
        return (
            f"sm_{self.chip:<3} {self.run:26} {self.dtype:8} r {self.r:<3} "
            f"{t.m}x{t.n}x{t.k} w{t.warps} s{t.stages}{' persistent' * t.persistent:11} "
            f"{self.registers:3} registers {self.stack:5} stack {self.shared:6} shared "
            f"{self.blocks:2} blocks {issued} {counts}"
        )


@dataclass(frozen=True)
class NotCompiled:
    """A configuration that the compiler refuses."""

    chip: int
    run: str
    tile: Tile
    dtype: str
    r: int
    why: str

    def faults(self) -> list[str]:
        return [f"does not compile: {self.why}"]

    def __str__(self) -> str:
        return f"sm_{self.chip:<3} {self.run:26} {self.dtype:8} r {self.r:<3} {self.tile}"


class _Absent:
    """A driver for a chip that is not here: Triton asks it what to compile for."""

    def __init__(self, chip: int) -> None:
        self.chip = chip

    def get_current_device(self) -> int:
        return self.chip

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip, 32)


def compile_rows(chip: int, name: str, dtype: torch.dtype, r: int) -> list[Compiled | NotCompiled]:
    """Every row of a pass for a chip, dtype and rank."""
    driver.set_active(_Absent(chip))
    found: list[Compiled | NotCompiled] = []
    with chips.pretend(chip):
        inputs = Inputs(*SHAPE, r, dtype, "meta")
        for i, tile in enumerate(rows_of(name, chip, dtype, rank_block(r))):
            for function in RUNS[name]:
                kernels = []

                def compile_instead(kernel, programs, arguments, kernels=kernels):
                    kernels.append(kernel.run(grid=(programs,), warmup=True, **arguments))

                try:
                    with instead_of_launching(compile_instead):
                        run(name, inputs, tile, function)
                except FAILURES as error:
                    about = (chip, function.__name__, tile, str(dtype).removeprefix("torch."), r)
                    found.append(NotCompiled(*about, first_line(error)))
                found += [
                    _read(k, chip, name, function.__name__, tile, dtype, r, i == 0) for k in kernels
                ]
    return found


def _read(kernel, chip, name, run_name, tile, dtype, r, largest) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    counts = {i: len(re.findall(rf"\b{i}\b", code)) for i in INSTRUCTIONS}
    return Compiled(
        chip,
        name,
        run_name,
        tile,
        str(dtype).removeprefix("torch."),
        r,
        registers,
        stack,
        kernel.metadata.shared,
        counts,
        largest,
        _issued(code, name),
        unfenced_products(kernel.asm["ptx"], tile.tma),
    )


_MEMORY = re.compile(
    r"\b(cp\.async\.wait_|st\.shared|stmatrix|fence\.proxy\.async|wgmma\.mma_async|tcgen05\.mma)"
)


# The second operand of a product: not a descriptor, but registers or tensor memory.
_A_ELSEWHERE = re.compile(r"mma\S*\s+[{\[][^}\]]*[}\]],\s*[{\[]")


def unfenced_products(ptx: str, bulk: bool = False) -> int:
    """WGMMA and tcgen05 products that come, in the text, after a thread's writes to shared memory
    or the end of its cp.async copies, with no ``fence.proxy.async`` between.

    They read shared memory through the async proxy, all of those write through the generic one
    (PTX ISA, "Proxies" and "Async proxy"). Bulk copies write through the async proxy and need none:
    with ``bulk``, B comes by them, and A counts alone.
    """
    found, written = 0, False
    for line in ptx.splitlines():
        match = _MEMORY.search(line.split("//")[0])
        if match and match[1] in ("wgmma.mma_async", "tcgen05.mma"):
            found += written and not (bulk and _A_ELSEWHERE.search(line))
        elif match:
            written = match[1] != "fence.proxy.async"
    return found


def _issued(code: str, name: str) -> int:
    """Instructions of the part of a pass that an element costs: ``tiles.INSTRUCTIONS``."""
    lines = [
        (int(at, 16), text)
        for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.*?);", code)
        if "NOP" not in text
    ]
    tensor = [at for at, text in lines if re.search(rf"\b({'|'.join(TENSOR_CORES)})\b", text)]
    loops = []
    for end, text in lines:
        to = re.search(r"\bBRA\b.* (0x[0-9a-f]+)", text)
        if to and int(to[1], 16) < end:
            loops.append((int(to[1], 16), end))

    def length(loop: tuple[int, int]) -> int:
        return sum(loop[0] <= at <= loop[1] for at, _ in lines)

    main = [loop for loop in loops if any(loop[0] <= at <= loop[1] for at in tensor)]
    if name == "gate_backward":
        return length(max(main, key=length)) if main else len(lines)
    if name == "bias_parts" and loops:
        return length(min(loops, key=length))
    if name == "product_gate":
        return len(lines) - (length(min(main, key=length)) if main else 0)
    return len(lines)


def _cuobjdump(option: str, file: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def tasks(chip_keys, dtypes, ranks) -> list[tuple]:
    """Arguments of ``compile_rows``; the one-pass product has no float32 rows."""
    return [
        (chip, name, dtype, r)
        for chip in chip_keys
        for dtype in dtypes
        for r in ranks
        for name in RUNS
        if not (name.startswith("product") and dtype == torch.float32)
    ]


def main() -> int:
    if INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    supported = [c for c in CHIPS if c != INTERPRETER]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", type=int, nargs="+", choices=supported, default=supported)
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["bfloat16"],
        choices=[str(d).removeprefix("torch.") for d in DTYPES],
    )
    parser.add_argument("--rank", type=int, nargs="+", default=list(RANKS))
    options = parser.parse_args()
    work = tasks(options.chip, [getattr(torch, d) for d in options.dtype], options.rank)
    faulty = done = 0
    with ProcessPoolExecutor() as pool:
        for results in pool.map(compile_rows, *zip(*work, strict=True)):
            done += 1
            for compiled in results:
                faults = compiled.faults()
                faulty += bool(faults)
                print(
                    f"[{done}/{len(work)}] {compiled}{'  FAULT: ' * bool(faults)}"
                    f"{'; '.join(faults)}",
                    flush=True,
                )
    print(f"{faulty} configuration(s) with faults" if faulty else "no faults")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
