"""The machine code of every shipped configuration, compiled without a GPU (``inspect.py``)."""

import os
import subprocess
import sys

import pytest

CHIPS = (80, 89, 90, 100, 120)


def python(*arguments):
    """A process of its own, that compiles: in this one Triton interprets."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=clean)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_spill_and_the_claimed_instructions(dtype):
    """float16 compiles as bfloat16 does (`make codegen` shows it); float32 rows are the same for
    every chip but sm_120."""
    chips, ranks = (CHIPS, ("64", "150")) if dtype == "bfloat16" else ((80, 100, 120), ("64",))
    inspect = ("-m", "secura_kernels.tools.inspect_triton")
    done = python(*inspect, "--dtype", dtype, "--chip", *map(str, chips), "--rank", *ranks)
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
    done = python("-c", program)
    lines = done.stdout.splitlines()
    bad, good = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    assert bad and all(line.startswith("NotCompiled ['does not compile: ") for line in bad), lines
    assert all("m=48" in line for line in bad)
    assert all(line.startswith("Compiled [] sm_80") for line in good), done.stderr


def test_faults_are_found():
    from secura_kernels.backends.triton.tiles import Tile
    from secura_kernels.tools.inspect_triton import INSTRUCTIONS, Compiled

    def faults(stack=0, shared=0, tma=False, name="product", chip=90, registers=128, **found):
        issued, unfenced = found.pop("issued", 0), found.pop("unfenced", 0)
        counts = dict.fromkeys(INSTRUCTIONS, 0) | found
        tile = Tile(64, 64, tma=tma)
        return Compiled(
            chip,
            name,
            name,
            tile,
            "bfloat16",
            64,
            registers,
            stack,
            shared,
            counts,
            True,
            issued,
            unfenced,
        ).faults()

    assert faults(HGMMA=4) == []
    assert "spill" in faults(HGMMA=4, stack=8)[0]
    assert "shared memory" in faults(HGMMA=4, shared=228 * 1024)[0]
    assert faults(HMMA=4) == ["no HGMMA"]  # a Hopper product on the older unit
    assert faults(HMMA=4, name="down") == []
    assert faults(HGMMA=4, tma=True) == ["no UTMALDG"]
    assert faults(HGMMA=4, unfenced=2) == ["2 product(s) read shared memory with no proxy fence"]
    # 32 elements a thread.
    assert faults(HMMA=4, name="epilogue", issued=40 * 32) == []
    assert faults(HMMA=4, name="epilogue", issued=41 * 32) == [
        "41.0 instructions an element, above 40"
    ]
    assert faults(HMMA=4, name="gate_backward", shared=120 * 1024) == [
        "1 block(s) an SM, needed: 2"
    ]
    assert faults(HMMA=4, name="gate_backward", registers=255) == []  # 2 blocks of 4 warps


@pytest.mark.parametrize("product", ["wgmma.mma_async.sync.aligned", "tcgen05.mma.cta_group::1"])
def test_products_without_a_proxy_fence_are_found(product):
    from secura_kernels.tools.inspect_triton import unfenced_products

    copied, stored = "cp.async.wait_group 2;", "@%p1 st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5};"
    fence, barrier = "fence.proxy.async.shared::cta;", "bar.sync 0;"
    bulk = "mbarrier.try_wait.parity.shared.b64 P1, [%r1], %r2; // cp.async.wait_group"

    def found(*lines):
        return unfenced_products("\n".join(f"\t{line}" for line in lines))

    assert found(copied, barrier, product, product) == 2
    assert found(stored, barrier, product) == 1
    assert found("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1];", product) == 1
    assert found(fence, copied, product) == 1
    assert found(copied, barrier, fence, product, product) == 0
    assert found(copied, fence, product, copied, product) == 1
    assert found(bulk, product) == 0
    accumulator, elsewhere = "[ %r1 + 0 ]", "[ %r3 + 8 ]"  # in tensor memory
    if "wgmma" in product:
        accumulator, elsewhere = "{%f1,%f2}", "{%r3,%r4}"
    of_memory = f"{product} {accumulator}, %rd1, %rd2;"
    of_registers = f"{product} {accumulator}, {elsewhere}, %rd2;"
    for line in (of_memory, of_registers):
        assert unfenced_products(f"{copied}\n{line}") == 1
    assert unfenced_products(f"{copied}\n{of_memory}", bulk=True) == 1
    assert unfenced_products(f"{copied}\n{of_registers}", bulk=True) == 0  # B comes in bulk
    assert found(copied, barrier, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") == 0


def test_loops_over_64_rows_and_more_take_bulk_copies():
    """Triton before 3.7.1 puts no proxy fence between cp.async and WGMMA or tcgen05."""
    import torch

    from secura_kernels.backends.triton import tiles

    for name in ("down", "gate_backward", "gate_backward_and_bias"):
        for chip in (90, 100):
            for rank in (16, 64, 256):
                for tile in tiles.rows_of(name, chip, torch.bfloat16, rank):
                    assert tile.tma or tile.m < 64, (name, chip, tile)
    program = """if True:
        import torch
        from secura_kernels.tools import inspect_triton
        for chip in (90, 100):
            rows = inspect_triton.compile_rows(chip, "gate_backward_and_bias", torch.bfloat16, 64)
            for found in rows:
                counts = found.instructions
                core = "HGMMA" if chip == 90 else "UTCHMMA"
                print(chip, found.tile.m, found.faults(), counts["UTMALDG"] > 0, counts[core] > 0)
    """
    done = python("-c", program)
    assert set(done.stdout.splitlines()) == {
        f"{chip} {m} [] {m == 64} {m == 64}" for chip in (90, 100) for m in (64, 32)
    }, done.stderr


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
