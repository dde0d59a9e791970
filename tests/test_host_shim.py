"""The host shim, which runs CUDA kernels on a CPU: its instructions, schedules and checks."""

import os
import re
import subprocess

import pytest
from cuda_host import HOST, SANITIZE, WATCH, host_command

SCHEDULES = ["forward", "reversed", "random"]
CASES = ["conversions", "load_layout", "multiply", "shuffles", "copies", "unset", "limits"]
CASES += ["cpu_threads", "tile"]
FAULTS = {
    "lane_returns": "lanes of a warp diverged: thread (0, 0, 0) waits in __syncwarp",
    "lane_skips": "lanes of a warp diverged: thread (0, 0, 0) waits in __shfl_xor_sync",
    "different_places": "lanes of a warp diverged: thread (0, 0, 0) waits in __shfl_xor_sync",
    "different_kinds": "thread (16, 0, 0) waits in ldmatrix",
    "barrier_by_some_lanes": "thread (7, 0, 0) has returned",
    "barrier_by_some_warps": "warps of a block diverged: thread (0, 0, 0) waits in __syncthreads",
    "partial_warp": "a warp of fewer than 32 lanes",
    "mask": "a collective's mask must name the whole warp",
    "copy_unaligned": "cp.async to an address not aligned",
    "copy_from_unaligned": "cp.async from an address not aligned",
    "copy_outside": "cp.async to an address outside of the block's shared memory",
    "copy_too_long": "cp.async of 17 bytes",
    "load_unaligned": "ldmatrix of a row not aligned",
    "load_outside": "ldmatrix.trans of a row outside of the block's shared memory",
    "write_outside": "a write beyond the end of shared memory",
}
RACES = ["both_write", "reads_neighbour", "copies_neighbour", "reads_counter"]
RACE = r"(reads|writes) byte 0x\w+, which (block \d|more than one block) has (read|written)"


def build(directory, *flags):
    program = directory / "test_shim"
    kernels = str(directory / "test_shim.o")
    source, watch = str(HOST / "test_shim.cu"), str(HOST / "global_memory.cpp")
    unwatched = [*host_command(), *(flag for flag in flags if flag != WATCH)]
    for command in (
        [*host_command(), *flags, "-x", "c++", "-c", source, "-o", kernels],
        [*unwatched, kernels, watch, "-o", str(program)],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        if "cannot find -lasan" in result.stderr or "cannot find -lubsan" in result.stderr:
            pytest.skip("g++ has no sanitizers")
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
    return program


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("shim"), "-O2")


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    return build(tmp_path_factory.mktemp("shim_sanitized"), *SANITIZE)


def start(program, case, schedule="forward", **variables):
    environment = {**os.environ, "SECURA_HOST_SCHEDULE": schedule, **variables}
    return subprocess.run(
        [program, case], env=environment, capture_output=True, text=True, timeout=120
    )


def run(program, case, schedule, **variables):
    result = start(program, case, schedule, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_case(program, case, schedule):
    run(program, case, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sanitized(sanitized, schedule):
    for case in CASES:
        run(sanitized, case, schedule)


def test_other_context_switch(tmp_path):
    program = build(tmp_path, "-O1", "-DSECURA_HOST_UCONTEXT")
    for case in CASES:
        run(program, case, "random")


def test_device_without_tensor_cores(tmp_path):
    program = build(tmp_path, "-O1", "-DSECURA_HOST_ARCH=750")
    for case in ("shuffles", "copies", "limits"):
        run(program, case, "reversed")
    assert "ldmatrix without TENSOR_CORES" in start(program, "load_layout").stderr


def test_missing_barrier_shows(program):
    """Wrong results within a warp, and between warps."""
    assert run(program, "barriers", "forward") == ["0", "0"]
    assert run(program, "barriers", "reversed") == ["255", "7"]
    within, between = map(int, run(program, "barriers", "random"))
    assert within > 0 and between > 0


def test_missing_wait_shows(program):
    assert run(program, "early_read", "forward") == ["1", "2"]
    for schedule in ("reversed", "random"):
        assert run(program, "early_read", schedule) == ["1", str(0xFFFFFFFF)]


def test_a_source_that_changes_under_a_copy_shows(program):
    assert run(program, "late_source", "forward") == ["1", "2"]
    for schedule in ("reversed", "random"):
        assert run(program, "late_source", schedule) == ["1", "7"]


def test_order_of_blocks(program):
    ascending = [str(block) for block in range(8)]
    assert run(program, "block_order", "forward") == ascending
    assert run(program, "block_order", "reversed") == ascending[::-1]
    orders = [run(program, "block_order", "random", SECURA_HOST_SEED=seed) for seed in "1123"]
    assert all(sorted(order) == ascending for order in orders)
    assert orders[0] == orders[1]
    assert len(set(map(tuple, orders))) == 3


def test_blocks_take_turns(program):
    """Each prints its number before and after a barrier."""
    assert run(program, "turns", "forward") == list("00112233")
    assert run(program, "turns", "reversed") == list("32321010")
    orders = [run(program, "turns", "random", SECURA_HOST_SEED=seed) for seed in "1123"]
    assert all(sorted(order) == list("00112233") for order in orders)
    assert orders[0] == orders[1] and len(set(map(tuple, orders))) == 3
    assert any(order[::2] != order[1::2] for order in orders)


@pytest.fixture(scope="session")
def watched(tmp_path_factory):
    return build(tmp_path_factory.mktemp("shim_watched"), "-O0", WATCH)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("race", RACES)
def test_blocks_that_meet_in_global_memory(watched, race, schedule):
    result = start(watched, race, schedule, SECURA_HOST_RACES="1")
    assert result.returncode != 0
    assert re.search(RACE, result.stderr), result.stderr


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_blocks_that_keep_apart(watched, schedule):
    for case in ("apart", "turns", "unset", "limits"):
        run(watched, case, schedule, SECURA_HOST_RACES="1")
    run(watched, "both_write", schedule)  # not asked for


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_ends_the_process(program, fault):
    result = start(program, fault)
    assert result.returncode != 0
    assert "host shim: block (0, 0, 0)" in result.stderr
    assert FAULTS[fault] in result.stderr


@pytest.mark.parametrize("schedule", ["reversed", "random"])
@pytest.mark.parametrize("fault", ["lane_returns", "barrier_by_some_warps", "different_kinds"])
def test_divergence_under_every_schedule(program, fault, schedule):
    result = start(program, fault, schedule)
    assert result.returncode != 0
    assert "diverged" in result.stderr


def test_sanitizers_find_faults(sanitized):
    result = start(sanitized, "write_outside")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
    result = start(sanitized, "misaligned_vector")
    assert result.returncode != 0
    assert "misaligned address" in result.stderr


def test_unknown_schedule(program):
    result = start(program, "tile", "sideways")
    assert result.returncode != 0
    assert "SECURA_HOST_SCHEDULE is sideways" in result.stderr
