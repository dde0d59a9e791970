"""benchmarks/layer/model.py: hand-checked numbers, and what must hold of any machine."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the benchmarks need rich")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "layer"))
import model

from secura_kernels.tools.costs import Layer

H100 = model.CEILINGS["H100"]
LAYER = Layer(8192, 4096, 4096, 64)
SHAPES = [(8192, 4096, 4096), (16384, 8192, 8192), (2048, 4096, 4096), (1, 512, 14336)]
# Only bytes take time: every pass is bytes / bandwidth and a launch, and one pass always wins.
MEMORY_BOUND = replace(H100, flops=float("inf"), special=float("inf"))
both_gates = pytest.mark.parametrize("gate", [True, False])
each_chip = pytest.mark.parametrize("chip", model.CEILINGS)


def test_frozen_by_hand():
    assert model.frozen(LAYER, H100) == pytest.approx(
        2 * 2 * 8192 * 4096 * 4096 / 790e12 + 2 * model.LAUNCH
    )
    # One token reads W twice, and nothing else to speak of: 2 x 33.55 MB at 3 TB/s.
    assert model.frozen(Layer(1, 4096, 4096, 64), H100) == pytest.approx(
        2 * 4096 * 4096 * 2 / 3e12 + 2 * model.LAUNCH, rel=1e-3
    )


def test_passes_with_a_gate_by_hand():
    times = model.pass_times(LAYER, True, H100)
    MN, N, M, r = 8192 * 4096, 4096, 8192, 64
    epilogue = 2 * MN + (M + N) * r * 2 + 3 * MN  # y0 and h, C read; y and the gate written
    assert times["forward epilogue"] == pytest.approx(epilogue / 3e12 + model.LAUNCH)
    gate = 3 * MN + N * r * 2 + 2 * MN + 4 * M * r * 4  # v in four parts
    assert times["backward gate"] == pytest.approx(gate / 3e12 + model.LAUNCH)
    assert times["backward library"] == pytest.approx(2 * MN * 4096 / 790e12 + model.LAUNCH)


def test_special_functions_follow_one_pass_and_instructions_bound_an_epilogue():
    # With little bandwidth the pass that an epilogue adds is worse than the slower product.
    slow = replace(H100, bandwidth=1e12, special=4 * H100.special)
    product = model.pass_times(LAYER, True, slow)["forward one pass"]
    special = 12 * 8192 * 4096 / slow.special
    assert special == pytest.approx(27e-6, rel=0.01)
    operations = 2 * 8192 * 4096 * (4096 + 64)
    assert product == pytest.approx(operations * 1.09 / 790e12 + special + model.LAUNCH)
    # A clock so low that instructions bound the epilogue and gate backward.
    starved = replace(H100, special=1e11)
    times = model.pass_times(LAYER, True, starved)
    assert times["forward epilogue"] == pytest.approx(40 * 8192 * 4096 / 8e11 + model.LAUNCH)
    assert times["backward gate"] == pytest.approx(25 * 8192 * 4096 / 8e11 + model.LAUNCH)
    assert model.pass_times(LAYER, False, starved) == model.pass_times(LAYER, False, H100)


@both_gates
def test_passes_are_those_of_the_layer(gate):
    """Where only bytes take time the passes add up to the layer's bytes in ``costs.py``."""
    times = model.pass_times(LAYER, gate, MEMORY_BOUND)
    cost = LAYER.forward(gate, one_pass=True) + LAYER.backward(gate)
    assert len(times) == 8
    assert sum(times.values()) == pytest.approx(cost.bytes / 3e12 + 8 * model.LAUNCH)


def test_passes_are_those_of_the_layer_with_an_epilogue():
    # The exposed special functions, 109 us, outweigh the bytes of the epilogue's form, 22 us more.
    times = model.pass_times(LAYER, True, replace(H100, flops=float("inf")))
    cost = LAYER.forward(True, one_pass=False) + LAYER.backward(True)
    assert len(times) == 9
    assert sum(times.values()) == pytest.approx(cost.bytes / 3e12 + 9 * model.LAUNCH)


def test_epilogues_without_a_gate_by_hand():
    M, N, K, r = 8192, 4096, 6144, 64
    times = model.pass_times(Layer(M, N, K, r), False, replace(H100, flops=2e14))
    assert times["forward epilogue"] == pytest.approx(
        (4 * M * N + 2 * (M + N) * r) / 3e12 + model.LAUNCH
    )
    assert times["backward epilogue"] == pytest.approx(
        (4 * M * K + 2 * (M + K) * r) / 3e12 + model.LAUNCH
    )


@both_gates
@each_chip
def test_passes_sum_to_the_ratio(chip, gate):
    ceilings = model.CEILINGS[chip]
    total = sum(model.pass_times(LAYER, gate, ceilings).values())
    assert model.ratio(LAYER, gate, ceilings) * model.frozen(LAYER, ceilings) == pytest.approx(
        total
    )
    assert total > model.frozen(LAYER, ceilings)


@both_gates
def test_the_faster_form_is_chosen(gate):
    """A slower product costs more than the bytes it saves on a slow chip, less on a fast one."""
    forms = [
        "forward one pass"
        in model.pass_times(LAYER, gate, replace(H100, flops=flops, special=float("inf")))
        for flops in (1e13, 1e14, 2e15, 1e16)
    ]
    assert forms == [False, False, True, True]
    # The exposed special functions turn it round.
    assert "forward epilogue" in model.pass_times(LAYER, True, replace(H100, flops=1e16))


@both_gates
@each_chip
@pytest.mark.parametrize("shape", SHAPES)
def test_more_ranks_are_never_faster(shape, chip, gate):
    ceilings = model.CEILINGS[chip]
    times = [
        sum(model.pass_times(Layer(*shape, r), gate, ceilings).values()) for r in range(1, 257)
    ]
    assert times == sorted(times) and times[0] < times[-1]
    rivals = [model.lora(Layer(*shape, r), ceilings) for r in range(1, 257)]
    assert rivals == sorted(rivals)


@both_gates
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ceiling", ["flops", "bandwidth", "special"])
def test_a_higher_ceiling_is_never_slower(ceiling, shape, gate):
    layer = Layer(*shape, 64)
    machines = [
        replace(H100, **{ceiling: getattr(H100, ceiling) * 2.0**power}) for power in range(-6, 7)
    ]
    for seconds in (
        [sum(model.pass_times(layer, gate, m).values()) for m in machines],
        [model.lora(layer, m) for m in machines],
        [model.frozen(layer, m) for m in machines],
    ):
        assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r", [16, 150])
def test_a_gate_costs_its_bytes(shape, r):
    layer = Layer(*shape, r)
    with_gate, without = (
        sum(model.pass_times(layer, gate, MEMORY_BOUND).values()) for gate in (True, False)
    )
    # The gate is written and read; G' is written; dT (M, padded r) neither written nor read, but
    # added to columns of G'; v is written and read in parts.
    M, N, _ = shape
    extra = 2 * M * N * layer.g + M * N * layer.e - 2 * M * layer.h + 2 * M * r * layer.e
    extra += 2 * (layer.parts - 1) * M * r * 4
    assert with_gate - without == pytest.approx(extra / 3e12, abs=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_reads_and_writes_its_outputs_again(shape):
    """Two scalings and two sums more than the three low-rank products each way."""
    M, N, K = shape
    layer = Layer(*shape, 1)
    again = 7 * M * N + 3 * M * K  # scaled: 2 and 2 M N; sums: 3 M N and 3 M K
    low_rank = 3 * M * N + 3 * M * K  # d written, dd read twice; x read twice, dx written
    narrow = (M + N) * 3 + (M + K) * 3  # rank 1: A, B, dA, dB, t and dt
    assert model.lora(layer, MEMORY_BOUND) - model.frozen(layer, MEMORY_BOUND) == pytest.approx(
        2 * (again + low_rank + narrow) / 3e12 + 10 * model.LAUNCH
    )


def test_ddp_by_hand():
    alone = sum(model.pass_times(LAYER, True, H100).values())
    for gpus, link in ((8, 450e9), (1024, 50e9)):
        found = model.scaling(LAYER, True, H100, gpus, "ddp")
        assert found.seconds - alone == pytest.approx(
            2 * (gpus - 1) / gpus * 64 * 64 * 4 / link, rel=1e-6
        )
        assert found.efficiency == pytest.approx(alone / found.seconds)
        dense = model.full_fine_tuning(LAYER, H100, gpus)
        products = 3 * (2 * 8192 * 4096 * 4096 / 790e12 + model.LAUNCH)
        reduced = 2 * (gpus - 1) / gpus * 4096 * 4096 * 2 / link
        assert dense.seconds == pytest.approx(products + reduced)
        assert dense.efficiency == pytest.approx(products / dense.seconds)


@each_chip
def test_small_gradients_scale_better_than_dense_ones(chip):
    ceilings = model.CEILINGS[chip]
    ours = model.scaling(LAYER, True, ceilings, 1024, "ddp").efficiency
    dense = model.full_fine_tuning(LAYER, ceilings, 1024).efficiency
    assert dense < ours < 1


def test_fsdp_by_hand():
    # Few tokens: the weight's journey is all that takes time. Many: it is hidden.
    few = model.scaling(replace(LAYER, M=128), True, H100, 64, "fsdp")
    weight, core = 4096 * 4096 * 2, 64 * 64 * 4
    assert few.seconds == pytest.approx(63 / 64 * (2 * weight + core) / 50e9)
    assert few.efficiency < 0.2
    many = model.scaling(replace(LAYER, M=65536), True, H100, 64, "fsdp")
    assert many.seconds == pytest.approx(
        sum(model.pass_times(replace(LAYER, M=65536), True, H100).values())
    )
    assert many.efficiency == 1


def test_tp_by_hand():
    found = model.scaling(LAYER, True, H100, 8, "tp")
    part = sum(model.pass_times(replace(LAYER, N=512), True, H100).values())
    reduced = 8192 * 4096 * 2 + 8192 * 64 * 4
    assert found.seconds == pytest.approx(part + 2 * 7 / 8 * reduced / 450e9)
    alone = sum(model.pass_times(LAYER, True, H100).values())
    assert found.efficiency == pytest.approx(alone / (8 * found.seconds))


@pytest.mark.parametrize("mode", model.MODES)
def test_one_gpu_communicates_nothing(mode):
    found = model.scaling(LAYER, False, H100, 1, mode)
    assert found.seconds == pytest.approx(sum(model.pass_times(LAYER, False, H100).values()))
    assert found.efficiency == pytest.approx(1)


@pytest.mark.parametrize(
    ("gpus", "mode", "message"),
    [
        (16, "tp", r"gpus=16: must be 1 to 8 for mode='tp'"),
        (1025, "ddp", r"gpus=1025: must be 1 to 1,024 for mode='ddp'"),
        (0, "fsdp", r"gpus=0: must be 1 to 1,024 for mode='fsdp'"),
        (8, "pp", r"mode='pp': must be one of 'ddp', 'tp', 'fsdp'"),
    ],
)
def test_what_is_not_offered_is_an_error(gpus, mode, message):
    with pytest.raises(ValueError, match=message):
        model.scaling(LAYER, True, H100, gpus, mode)


@pytest.mark.parametrize(
    ("measured", "off"),
    [(1.0, False), (1.25, False), (0.8, False), (1.26, True), (0.79, True), (float("nan"), True)],
)
def test_flag(measured, off):
    assert model.flag(1.0, measured) is off


def test_the_command_prints_every_chip(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["model.py"])
    model.main()
    printed = capsys.readouterr().out
    assert printed.count("predicted, not measured") == len(model.CEILINGS) + 1
    assert f"{model.ratio(LAYER, True, H100):.3f}" in printed
    assert "1,024" in printed
