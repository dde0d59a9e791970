"""The benchmarks measure what they say, check it first, and go on where they stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LAYER = Path(__file__).parents[1] / "benchmarks/layer"
sys.path.insert(0, str(LAYER))

import rivals  # noqa: E402
import run  # noqa: E402
import shapes  # noqa: E402
import timing  # noqa: E402

TINY = {"tiny": {"proj": (48, 32)}}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(shapes, "LAYERS", TINY)
    monkeypatch.setattr(run.ceilings, "measure", lambda *_: dict(bandwidth=1e9, flops=1e9))
    return shapes.select(["tiny"], None, [8], [4], ["float32"])


def test_cases_by_name():
    found = shapes.select(["llama-3.1-8b"], ["q_proj"], [1, 512], [16], ["bfloat16"])
    assert [(c.M, c.N, c.K, c.r) for c in found] == [(1, 4096, 4096, 16), (512, 4096, 4096, 16)]
    assert shapes.select(["llama-3-70b-tp8"], ["k_proj"], [1], [256], ["bfloat16"]) == []
    with pytest.raises(ValueError, match=r"layers=\['nope'\] is not allowed"):
        shapes.select(["qwen2-7b"], ["nope"], [1], [1], ["float32"])


def test_rows_of_a_case(tiny):
    rows, missing = timing.measure(tiny[0], torch.device("cpu"), 3, compiled=False)
    names = {row["rival"] for row in rows}
    assert {"frozen", "CURLoRA, reference", "SECURA, reference", "SECURA, dense", "LoRA (PEFT)",
            "DoRA (PEFT)", "CURLoRA, eager"} <= names
    assert {row["mode"] for row in rows} == set(timing.MODES)
    by = {(row["rival"], row["mode"]): row for row in rows}
    assert by["frozen", "both"]["ratio"] == 1 and by["frozen", "both"]["saved_bytes"] == 0
    assert by["CURLoRA, reference", "both"]["saved_bytes"] == 8 * 4 * 4  # t alone
    assert by["SECURA, reference", "both"]["saved_bytes"] >= 8 * (4 + 48) * 4  # and the gate
    assert by["SECURA, dense", "both"]["error"] < 1e-5
    both, forward = by["SECURA, dense", "both"], by["SECURA, dense", "forward"]
    assert both["median_ms"] > forward["median_ms"] > 0
    assert any(reason.startswith("LoRA (Unsloth)") for reason in missing)


def test_what_computes_something_else_is_not_timed(tiny):
    linear = torch.nn.Linear(32, 48, bias=False)
    found, _ = rivals.rivals(linear, 4, compiled=False)
    with torch.no_grad():
        found["SECURA, dense"].layer.layer.core_parameter().mul_(1.1)
    inputs = timing.Inputs.random(tiny[0], torch.device("cpu"))
    with pytest.raises(AssertionError, match="SECURA, dense is off by"):
        timing.errors(found, *inputs[0])


def test_a_stopped_run_goes_on(tiny, tmp_path, monkeypatch):
    cases = shapes.select(["tiny"], None, [4, 8], [4], ["float32"])
    original, calls = run.measure, []

    def stop_at_the_second(case, *rest, **options):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(case)
        return original(case, *rest, **options)

    monkeypatch.setattr(run, "measure", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run.run(cases, torch.device("cpu"), 2, False, tmp_path, "layer")
    monkeypatch.setattr(run, "measure", lambda case, *rest, **options: (
        calls.append(case), original(case, *rest, **options))[1])
    rows, about = run.run(cases, torch.device("cpu"), 2, False, tmp_path, "layer")
    assert calls == cases  # the first case was not measured again
    content = json.loads((tmp_path / "layer.json").read_text())
    assert content["rows"] == rows and {"commit", "torch", "date", "processor"} <= set(about)
    assert not list(tmp_path.glob("*.jsonl"))
    assert len((tmp_path / "layer.csv").read_text().splitlines()) == len(rows) + 1
    assert run.results.plot(tmp_path, "layer", rows, about)[0].stat().st_size > 1000
    run.results.print_table(rows, about)


def test_wrong_options_name_themselves():
    for words in (["--tokens", "0"], ["--layer", "nope"], ["--model", "gpt-9"]):
        done = subprocess.run([sys.executable, LAYER / "run.py", *words], capture_output=True,
                              text=True)
        assert done.returncode == 2 and words[0] in done.stderr.replace("layers=", "--layer")


def test_a_fine_tuning_step_of_each_method(tmp_path):
    done = subprocess.run(
        [sys.executable, LAYER.parent / "step/run.py", "--model", "tiny", "--method", "SECURA",
         "LoRA (PEFT)", "--steps", "2", "--rank", "4", "--device", "cpu", "--out", tmp_path],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["SECURA", "LoRA (PEFT)"]
    # 2 blocks of 7 linear layers; A (5, 4), B (4, 5) and a bias each.
    biases = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    assert rows[0]["trained"] == 2 * 7 * 2 * 5 * 4 + biases
    assert all(row["tokens_per_s"] > 0 for row in rows) and "tokens/s" in done.stdout
    assert (tmp_path / "step.png").stat().st_size > 5000


def test_the_prediction_beside_the_measured_ratio():
    row = dict(M=8192, N=4096, K=4096, r=64, dtype="bfloat16", rival="SECURA, triton", mode="both")
    gpu = {"gpu": "NVIDIA H100 80GB HBM3"}
    ours = run.results.predicted(row, gpu)
    assert 1 < ours < run.results.predicted(row | {"rival": "LoRA (PEFT)"}, gpu)
    assert run.results.predicted(row, {"gpu": "GeForce"}) is None
    assert run.results.predicted(row | {"rival": "frozen"}, gpu) is None
    assert run.results.predicted(row | {"mode": "forward"}, gpu) is None


def test_the_roofline_is_drawn(tmp_path):
    import passes

    rows = [dict(run="down", flops=1e12, bandwidth=1e11), dict(run="gather", flops=0.0,
                                                               bandwidth=1e11)]
    about = dict(gpu="a chip", ceilings=dict(bandwidth=3e12, flops=8e14))
    passes.draw(tmp_path / "roofline.png", rows, about)
    assert (tmp_path / "roofline.png").stat().st_size > 5000


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_the_gpu_run_says_so():
    for script in ("gpu.py", "layer/passes.py"):
        done = subprocess.run([sys.executable, LAYER.parent / script], capture_output=True,
                              text=True)
        assert done.returncode == 1 and "no NVIDIA GPU is here" in done.stderr
