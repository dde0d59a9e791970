"""The machine code of every shipped configuration, compiled without a GPU (``inspect.py``)."""

import os
import subprocess
import sys

import pytest

CHIPS = (80, 89, 90, 100, 120)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_spill_and_the_claimed_instructions(dtype):
    """In a process of its own: in this one Triton interprets. float16 compiles as bfloat16 does
    (`make codegen` shows it); float32 rows are the same for every chip, so one of each kind."""
    chips, ranks = (CHIPS, ("64", "150")) if dtype == "bfloat16" else ((80, 100), ("64",))
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "secura_kernels.tools.inspect_triton",
            "--dtype",
            dtype,
            "--chip",
            *map(str, chips),
            "--rank",
            *ranks,
        ],
        capture_output=True,
        text=True,
        env=clean,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "no faults", (
        "\n".join(line for line in lines if "FAULT" in line) + done.stderr
    )
    for chip in chips:
        assert sum(line.split()[1] == f"sm_{chip}" for line in lines[:-1]) > 15


def test_a_configuration_that_does_not_compile_is_a_fault():
    """Blocks of a size that is no power of two."""
    program = """if True:
        import torch
        from secura_kernels.backends.triton.tiles import Tile
        from secura_kernels.tools import inspect_triton
        inspect_triton.rows_of = lambda *_: (Tile(48, 64, warps=4), Tile(32, 64, warps=4))
        for found in inspect_triton.compile_rows(80, "epilogue", torch.bfloat16, 16):
            print(type(found).__name__, found.faults(), found)
    """
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=clean
    )
    lines = done.stdout.splitlines()
    bad, good = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    assert bad and all(line.startswith("NotCompiled ['does not compile: ") for line in bad), lines
    assert all("m=48" in line for line in bad)
    assert all(line.startswith("Compiled [] sm_80") for line in good), done.stderr


def test_faults_are_found():
    from secura_kernels.backends.triton.tiles import Tile
    from secura_kernels.tools.inspect_triton import INSTRUCTIONS, Compiled

    def faults(stack=0, shared=0, tma=False, name="product", chip=90, registers=128, **found):
        issued = found.pop("issued", 0)
        counts = dict.fromkeys(INSTRUCTIONS, 0) | found
        tile = Tile(64, 64, tma=tma)
        return Compiled(
            chip, name, name, tile, "bfloat16", 64, registers, stack, shared, counts, True, issued
        ).faults()

    assert faults(HGMMA=4) == []
    assert "spill" in faults(HGMMA=4, stack=8)[0]
    assert "shared memory" in faults(HGMMA=4, shared=228 * 1024)[0]
    assert faults(HMMA=4) == ["no HGMMA"]  # a Hopper product on the older unit
    assert faults(HMMA=4, name="down") == []
    assert faults(HGMMA=4, tma=True) == ["no UTMALDG"]
    # 32 elements a thread.
    assert faults(HMMA=4, name="epilogue", issued=40 * 32) == []
    assert faults(HMMA=4, name="epilogue", issued=41 * 32) == [
        "41.0 instructions an element, above 40"
    ]
    assert faults(HMMA=4, name="gate_backward", shared=120 * 1024) == [
        "1 block(s) an SM, needed: 2"
    ]
    assert faults(HMMA=4, name="gate_backward", registers=255) == []  # 2 blocks of 4 warps


def test_what_an_element_costs_is_counted_by_pass():
    from secura_kernels.tools.inspect_triton import _issued

    code = "".join(
        f" /*{16 * i:04x}*/  {text} ; /* 0x0 */\n"
        for i, text in enumerate(
            ("LDG R1", "HMMA R1", "@P0 BRA 0x10", "MUFU.RCP R1", "NOP", "BRA 0x50")
        )
    )
    assert _issued(code, "epilogue") == 5
    assert _issued(code, "gate_backward") == 2
    assert _issued(code, "product_gate") == 3
    assert _issued(code.replace("0x50", "0x0"), "bias_parts") == 2  # of nested loops the inner one
