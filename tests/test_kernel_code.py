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


def test_faults_are_found():
    from secura_kernels.backends.triton.tiles import Tile
    from secura_kernels.tools.inspect_triton import INSTRUCTIONS, Compiled

    def faults(stack=0, shared=0, tma=False, name="product", chip=90, **found):
        counts = dict.fromkeys(INSTRUCTIONS, 0) | found
        return Compiled(
            chip, name, name, Tile(64, tma=tma), "bfloat16", 64, 255, stack, shared, counts
        ).faults()

    assert faults(HGMMA=4) == []
    assert "spill" in faults(HGMMA=4, stack=8)[0]
    assert "shared memory" in faults(HGMMA=4, shared=228 * 1024)[0]
    assert faults(HMMA=4) == ["no HGMMA"]  # a Hopper product on the older unit
    assert faults(HMMA=4, name="down") == []
    assert faults(HGMMA=4, tma=True) == ["no UTMALDG"]
