"""csrc/ as nvcc compiles it, without a GPU: machine code, ops, and what Python repeats of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from secura_kernels.backends.cuda import compiler, passes
from secura_kernels.backends.cuda.library import SCHEMAS
from secura_kernels.tools import inspect_cuda

ROOT = Path(__file__).parents[1]
# Two, or a clean checkout compiles for long; `make codegen` reads the code for every chip.
ARCHES = ("80", "90")
try:
    compiler.tools()
    inspect_cuda.cuobjdump()
    MISSING = ""
except RuntimeError as error:
    MISSING = str(error)
compiles = pytest.mark.skipif(bool(MISSING), reason=MISSING)

# In a process of its own: in this one the ops may be those of the simulated GPU.
LOAD = """
import json, sys
from pathlib import Path
import torch
from secura_kernels.backends.cuda import load
load(Path(sys.argv[1]))
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(json.dumps({name: [has(name, "CUDA"), has(name, "CPU")]
                  for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("secura_cuda::")}))
"""


@pytest.fixture(scope="session")
def built() -> Path:
    """The real library. A clean checkout compiles it in minutes, later runs find it in build/."""
    if MISSING:
        pytest.skip(MISSING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(ROOT / "build"))
        return compiler.build(ARCHES, progress=False)


def load(library: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", LOAD, str(library)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_no_spill_and_the_needed_instructions(built):
    found = inspect_cuda.read(built, ARCHES)
    faults = "\n".join(f"{c}: {'; '.join(c.faults())}" for c in found if c.faults())
    assert not faults, faults
    for arch in ARCHES:  # every pass, in every dtype
        here = {(c.kernel, c.dtype) for c in found if c.chip == arch}
        assert here == {
            (name, dtype) for name in inspect_cuda.ASKED for dtype in inspect_cuda.DTYPES.values()
        }


def test_faults_are_found():
    def faults(kernel="product", dtype="bfloat16", chip="80", stack=0, spills=0, **found):
        wide = {f"{i}.E.128": found.pop(i, 0) for i in ("LDG", "STG")}
        counts = dict.fromkeys(inspect_cuda.INSTRUCTIONS, 0) | wide | found
        return inspect_cuda.Compiled(
            chip, kernel, dtype, (), 255, stack, spills, 0, counts
        ).faults()

    tensor = dict(HMMA=4, LDSM=4, LDGSTS=4)
    assert faults(**tensor, STG=4) == []
    assert faults(**tensor, STG=4, stack=8, spills=12) == ["8 bytes of stack, 12 of spills"]
    assert faults(FFMA=4) == ["no HMMA", "no LDSM", "no LDGSTS", "no STG.E.128"]
    assert faults("epilogue", **tensor, STG=4) == ["no LDG.E.128"]
    assert faults(dtype="float32") == ["no FFMA", "no LDGSTS"]
    assert faults("project", chip="100a", LDGSTS=4) == ["no FFMA"]
    assert faults("gather") == faults("gather", "float32") == []
    # Turing has no mma on bfloat16 and no cp.async.
    assert faults(chip="75") == [] and faults(chip="75", spills=4) != []


def test_the_main_loop():
    def code(*lines):
        return "".join(
            f"        /*{16 * i:04x}*/   {line} ;   /* 0x{i:016x} */\n"
            for i, line in enumerate(lines)
        )

    step = ("LDSM.16.M88.4 R4, [R2]", "HMMA.16816.F32 R8, R4, R6, R8", "IADD3 R2, R2, 0x1, RZ")
    assert inspect_cuda._main_loop(code(*step, "@P0 BRA 0x60", "EXIT")) == (0, 0)
    assert inspect_cuda._main_loop(code(*step, "@!P0 BRA 0x0", "EXIT", "BRA 0x50")) == (4, 1)
    # Of two loops the one with more HMMA, and not the loop around both.
    text = code(*step, "@P0 BRA 0x10", *step, *step, "@P0 BRA 0x40", "@P1 BRA 0x0")
    assert inspect_cuda._main_loop(text) == (7, 2)
    slow = inspect_cuda.Compiled(
        "80",
        "product",
        "bfloat16",
        ("CHUNKS",),
        255,
        0,
        0,
        0,
        dict.fromkeys(inspect_cuda.INSTRUCTIONS, 1),
        (334, 32),
    )
    assert slow.faults() == ["334 instructions for 32 HMMA in the main loop"]


def test_registers_for_two_blocks():
    def faults(threads, *variant):
        return inspect_cuda.Compiled(
            "80",
            "product",
            "bfloat16",
            ("CHUNKS", *variant),
            225,
            0,
            0,
            0,
            dict.fromkeys(inspect_cuda.INSTRUCTIONS, 1),
            (3, 1),
            threads,
        ).faults()

    assert faults(128, "128") == faults(256, "256") == []
    assert faults(256, "128") == ["registers for 1 block(s) an SM, needed: 2"]


def test_names_of_kernels():
    def name(kernel: str, arguments: str) -> tuple:
        return inspect_cuda._name(
            "_ZN6secura49_GLOBAL__N__1f6571f7_10_product_cu_9248afd214"
            f"{kernel}I{arguments}EEvNS_7ProductE"
        )

    assert name("product_kernel", "13__nv_bfloat16Lb1ELNS_5AlongE0ELNS_5ReadsE1E") == (
        "product",
        "bfloat16",
        ("gate", "DEPTH", "CHUNKS"),
    )
    assert name("gate_backward_kernel", "fLi64ELb0E") == ("gate_backward", "float32", ("64",))
    with pytest.raises(ValueError, match="unknown kernel"):
        name("new_kernel", "6__half")


def test_ptx_is_of_the_newest_chip_alone(built):
    listed = subprocess.check_output([inspect_cuda.cuobjdump(), "-lptx", built], text=True)
    assert set(re.findall(r"\.sm_(\w+)\.ptx", listed)) == {ARCHES[-1]}


def test_library_has_the_ops_for_cuda_alone(built):
    done = load(built)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {f"secura_cuda::{name}": [True, False] for name in SCHEMAS}


def test_library_links_only_libtorch_cpu(built):
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is missing")
    needed = subprocess.check_output(["readelf", "-d", built], text=True)
    assert "[libtorch_cpu.so]" in needed
    for other in ("libtorch_cuda", "libc10_cuda", "libtorch_python", "libcudart"):
        assert other not in needed


def test_schemas_are_those_of_the_sources():
    code = (compiler.sources() / "ops.cpp").read_text()
    defined = [
        "".join(re.findall(r'"(.*?)"', strings))
        for strings in re.findall(r'm\.def\(((?:\s*".*?")+)\s*\);', code)
    ]
    assert defined == [name + schema for name, schema in SCHEMAS.items()]
    assert re.findall(r'm\.impl\("(\w+)"', code) == list(SCHEMAS)


def header() -> str:
    return (compiler.sources() / "passes.h").read_text()


@pytest.mark.parametrize(
    "name", ["ROWS_PER_PROGRAM", "BIAS_PARTS", "ROWS_PER_PART", "COLUMNS_OF_W", "MOST_TOKENS"]
)
def test_constants_are_those_of_the_sources(name):
    assert re.findall(rf"constexpr int {name} = (\d+);", header()) == [str(getattr(passes, name))]
