"""The benchmarks measure what they say, check it first, and go on where they stopped."""

import csv
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from cuda_host import load_cuda

from secura_kernels.backends import cuda

LAYER = Path(__file__).parents[1] / "benchmarks/layer"
sys.path[:0] = map(str, (LAYER, LAYER.parent))

import gpu  # noqa: E402
import passes  # noqa: E402
import rivals  # noqa: E402
import run  # noqa: E402
import sanitize  # noqa: E402
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
    assert {
        "frozen",
        "CURLoRA, reference",
        "SECURA, reference",
        "SECURA, dense",
        "LoRA (PEFT)",
        "DoRA (PEFT)",
        "CURLoRA, eager",
        "CURLoRA, orthonormal, reference",
        "CURLoRA, natural, reference",
        "SECURA, orthonormal, bias, reference",
    } <= names
    assert "CURLoRA, natural, eager" not in names  # only compared with
    assert {row["mode"] for row in rows} == set(timing.MODES)
    by = {(row["rival"], row["mode"]): row for row in rows}
    assert by["frozen", "both"]["ratio"] == 1 and by["frozen", "both"]["saved_bytes"] == 0
    assert by["CURLoRA, reference", "both"]["saved_bytes"] == 8 * 4 * 4  # t alone
    assert by["SECURA, reference", "both"]["saved_bytes"] >= 8 * (4 + 48) * 4  # and the gate
    assert by["SECURA, dense", "both"]["error"] < 1e-5
    assert 0 < by["CURLoRA, natural, reference", "both"]["error"] < 1e-5
    assert all(row["graph_ms"] is None for row in rows)  # no graphs on a CPU
    assert (
        by["CURLoRA, reference", "both"]["host_ms"]
        >= by["CURLoRA, reference", "both"]["low_ms"]
        > 0
    )
    both, forward = by["SECURA, dense", "both"], by["SECURA, dense", "forward"]
    assert both["median_ms"] > forward["median_ms"] > 0
    assert any(reason.startswith("LoRA (Unsloth)") for reason in missing)


def test_what_computes_something_else_is_not_timed(tiny, monkeypatch):
    linear = torch.nn.Linear(32, 48, bias=False)
    found, _ = rivals.rivals(linear, 4, compiled=False)
    with torch.no_grad():
        found["SECURA, dense"].layer.layer.core_parameter().mul_(1.1)
        found["CURLoRA, dense"].layer.layer.core_parameter().fill_(torch.nan)
    monkeypatch.setattr(timing, "rivals", lambda *_, **__: (found, []))
    rows, missing = timing.measure(tiny[0], torch.device("cpu"), 1, compiled=False)
    assert [reason.split(" is off by")[0] for reason in missing] == [
        "CURLoRA, dense",
        "SECURA, dense",
    ]
    assert {row["rival"] for row in rows} & {"CURLoRA, dense", "SECURA, dense", "frozen"} == {
        "frozen"
    }


def test_what_fails_is_left_out(tiny, monkeypatch):
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError("out of memory\nand a long story")

    linear = torch.nn.Linear(32, 48, bias=False)
    found = {"frozen": rivals.Rival(linear.requires_grad_(False)), "broken": rivals.Rival(Broken())}
    monkeypatch.setattr(timing, "rivals", lambda *_, **__: (found, []))
    rows, missing = timing.measure(tiny[0], torch.device("cpu"), 1, compiled=False)
    assert {row["rival"] for row in rows} == {"frozen"}
    assert missing == ["broken failed: out of memory (tiny proj, M = 8, r = 4)"]


def test_what_users_get_is_among_the_rivals():
    """Bases and biases of the layers themselves, in bfloat16 too, and their truth has them."""
    linear = torch.nn.Linear(96, 80, bias=False).bfloat16()
    found, _ = rivals.rivals(linear, 4, compiled=False)
    natural = found["CURLoRA, natural, reference"].layer
    assert natural.C.dtype == torch.bfloat16 and natural.C.shape == (80, 4) and natural.calibrated
    assert found["CURLoRA, orthonormal, reference"].layer.fold_c is not None
    assert found["SECURA, orthonormal, bias, reference"].layer.adapter_bias is not None
    forms = [n for n, rival in found.items() if rival.truth and n.count(",") > 1]
    off, wrong = timing.errors(found, torch.randn(8, 96).bfloat16(), torch.randn(8, 80).bfloat16())
    assert len(forms) >= 3 and set(forms) <= set(off) and not wrong
    with torch.no_grad():  # its C is part of what is compared
        natural.C.mul_(1.2)
    _, wrong = timing.errors(found, torch.randn(8, 96).bfloat16(), torch.randn(8, 80).bfloat16())
    assert set(wrong) == {"CURLoRA, natural, reference"}


class PlayedRecorder:
    """Computes at the capture what a replay should leave in its results; of one layer it does
    not."""

    stale: torch.nn.Module

    def capture(self, function):
        results = function()
        if function.__defaults__[0] is self.stale:
            results = [torch.zeros_like(value) for value in results]
        return lambda: None, results


def test_a_replay_must_be_what_the_step_is(monkeypatch):
    class Reads(torch.nn.Module):
        def forward(self, x):
            raise timing.FAILURES[0]("not captured: it reads\nmore")

    linear = torch.nn.Linear(32, 48, bias=False)
    found, _ = rivals.rivals(linear, 4, compiled=False)
    x, dy = torch.randn(8, 32), torch.randn(8, 48)
    off, _ = timing.errors(found, x, dy)
    PlayedRecorder.stale = found["SECURA, reference"].layer
    found["reads"] = rivals.Rival(Reads())
    monkeypatch.setattr(timing, "Recorder", PlayedRecorder)
    replays, wrong = timing.graphs(found, off, x, dy)
    assert set(found) - set(replays) == {"SECURA, reference", "reads"}
    assert wrong == [
        "SECURA, reference in a CUDA graph is off by 1.0e+00 from what it is without",
        "reads in a CUDA graph: not captured: it reads",
    ]


def test_hand_written_lora_is_lora():
    linear = torch.nn.Linear(32, 48, bias=False)
    layer = rivals._HandWritten(linear, 4, rivals._Addmm.apply)
    x = torch.randn(8, 32, requires_grad=True)
    leaves, dy = [x, layer.A, layer.B], torch.randn(8, 48)
    plain = linear(x) + x @ layer.A.T @ layer.B.T
    torch.testing.assert_close(layer(x), plain)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x), leaves, dy), torch.autograd.grad(plain, leaves, dy)
    )


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
    monkeypatch.setattr(
        run,
        "measure",
        lambda case, *rest, **options: (calls.append(case), original(case, *rest, **options))[1],
    )
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
        done = subprocess.run(
            [sys.executable, LAYER / "run.py", *words], capture_output=True, text=True
        )
        assert done.returncode == 2 and words[0] in done.stderr.replace("layers=", "--layer")


def test_an_older_revision_is_timed_by_todays_benchmark(tmp_path, monkeypatch, capsys):
    root, real = tmp_path / "repository", subprocess.run
    (root / run.REPLAY).parent.mkdir(parents=True)

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        real(["git", "-C", root, *who, *arguments], check=True)

    git("init", "--quiet")
    (root / run.REPLAY).with_name("__init__.py").touch()
    git("add", ".")
    git("commit", "--quiet", "--message", "before the module that takes times")
    (root / run.REPLAY).write_text("# today's")
    git("add", ".")
    git("commit", "--quiet", "--message", "with it")

    def instead_of_timing(command, **settings):
        if command[0] != sys.executable:
            return real(command, **settings)
        package = Path(settings["env"]["PYTHONPATH"])
        assert (package / run.REPLAY).read_text() == "# today's"
        row = dict(model="m", layer="l", M=1, r=4, dtype="float32", mode="both")
        row |= dict(rival="CURLoRA, reference", ratio=1.0 if package == root else 2.0)
        scratch = Path(command[command.index("--out") + 1])
        name = command[command.index("--name") + 1]
        (scratch / f"{name}.json").write_text(json.dumps(dict(rows=[row])))

    monkeypatch.setattr(run.machine, "ROOT", root)
    monkeypatch.setattr(run.subprocess, "run", instead_of_timing)
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--base", "HEAD~1"])
    assert run.main() == 0
    assert "2.000 -> 1.000 of frozen" in capsys.readouterr().out


def test_a_fine_tuning_step_of_each_method(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            LAYER.parent / "step/run.py",
            "--model",
            "tiny",
            "--method",
            "SECURA",
            "LoRA (PEFT)",
            "--steps",
            "2",
            "--rank",
            "4",
            "--device",
            "cpu",
            "--out",
            tmp_path,
        ],
        capture_output=True,
        text=True,
    )
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


PASSES_ABOUT = dict(gpu="a chip", ceilings=dict(bandwidth=3e12, flops=8e14))


def test_passes_without_the_cuda_library(tmp_path):
    common = dict(M=8, N=8, K=8, r=4, floor_ms=1.0, bandwidth=1e11)
    rows = [
        dict(
            run="product",
            impl="triton",
            median_ms=2.5,
            of_roofline=0.4,
            flops=1e12,
            of_cublas=0.8,
            **common,
        ),
        dict(
            run="product",
            impl="cublas",
            median_ms=2.0,
            of_roofline=0.5,
            flops=1e12,
            of_cublas=1.0,
            **common,
        ),
        dict(
            run="gather",
            impl="triton",
            median_ms=1.25,
            of_roofline=0.8,
            flops=0.0,
            of_cublas=None,
            **common,
        ),
    ]
    about = PASSES_ABOUT | dict(missing=["no CUDA times: nobody built it"])
    shown = passes.table(rows, about)
    assert shown.caption == "no CUDA times: nobody built it"
    cells = [list(column.cells) for column in shown.columns]
    assert cells[1:] == [
        ["product", "gather"],
        ["1.0000"] * 2,
        ["2.5000 (40%)", "1.2500 (80%)"],
        ["", ""],
        ["2.0000 (50%)", ""],
        ["0.80", ""],
        ["", ""],
    ]
    passes.draw(tmp_path / "roofline.png", rows, about)
    assert (tmp_path / "roofline.png").stat().st_size > 5000


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the simulators of the kernels")
def test_every_pass_of_both_backends_is_run(tmp_path, monkeypatch):
    load_cuda()
    times = iter(range(1, 1000))

    def replayed_ms(run, rep):
        run()
        return float(next(times))

    monkeypatch.setattr(passes, "replayed_ms", replayed_ms)
    top = PASSES_ABOUT["ceilings"]
    rows, wrong = passes.measure((36, 48, 40, 5), torch.device("cpu"), top, cuda=True)
    assert not wrong
    assert not hasattr(passes.CudaPasses, "own_core") and hasattr(passes.CudaPasses, "down")
    by = {(row["run"], row["impl"]): row for row in rows}
    products = [name for name in passes.PASSES if name.startswith("product")]
    assert set(by) == (
        {(name, "triton") for name in passes.PASSES}
        | {(name, "cuda") for name in passes.PASSES if hasattr(passes.CudaPasses, name)}
        | {(name, "cublas") for name in products}
    )
    ours, cublas = by["product", "cuda"], by["product", "cublas"]
    assert ours["of_cublas"] == pytest.approx(cublas["median_ms"] / ours["median_ms"])
    assert by["gather", "cuda"]["of_cublas"] is None
    passes.results.write(tmp_path, "passes", rows, PASSES_ABOUT)
    with open(tmp_path / "passes.csv") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_a_pass_that_fails_costs_no_other_figure(monkeypatch):
    def replayed_ms(run, rep):
        if run.__name__ == "broken":
            run()
        return 1.0

    def broken():
        raise RuntimeError("launch of gather\nmore")

    monkeypatch.setattr(passes, "replayed_ms", replayed_ms)
    monkeypatch.setattr(passes, "PASSES", ("gather",))
    monkeypatch.setattr(passes, "contenders", lambda *_: {"triton": [print], "cuda": [broken]})
    rows, wrong = passes.measure(
        (33, 48, 40, 5), torch.device("cpu"), PASSES_ABOUT["ceilings"], cuda=True
    )
    assert [row["impl"] for row in rows] == ["triton"]
    assert set(wrong) == {"CUDA gather at (33, 48, 40, 5): launch of gather"}


def test_mixed_batches_are_checked_and_measured(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    import mixed

    monkeypatch.setattr(
        sys,
        "argv",
        [
            "mixed.py",
            "--device",
            "cpu",
            "--N",
            "24",
            "--K",
            "16",
            "--rank",
            "4",
            "--tokens",
            "2",
            "--rounds",
            "2",
            "--out",
            str(tmp_path),
        ],
    )
    mixed.main()
    rows = json.loads((tmp_path / "mixed.json").read_text())["rows"]
    kinds = (mixed.FORWARD, mixed.TRAINING, mixed.BY_TOKEN)
    assert {(row["method"], row["what"], row["adapters"]) for row in rows} == {
        (name, what, count)
        for name in ("CURLoRA", "SECURA", "LoRA (PEFT)")
        for what in (kinds[:1] if "PEFT" in name else kinds)
        for count in (1, 8, 64)
    }
    ones = [row for row in rows if row["adapters"] == 1 and row["what"] != mixed.BY_TOKEN]
    assert all(row["ratio"] == 1 for row in ones)
    assert (tmp_path / "mixed.png").stat().st_size > 5000
    broken = mixed.build(mixed.methods(4)["SECURA"], mixed.arguments(), torch.device("cpu"))
    x, given = torch.randn(64, 2, 16), broken.forward
    broken.forward = lambda x, **names: given(x, **names) + (len(x) > 1)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        mixed.check(broken, x, mixed.FORWARD)
    broken.forward = lambda x, **names: given(x, **names) * (1.0 if len(x) > 1 else 1.001)
    for what in (mixed.TRAINING, mixed.BY_TOKEN):
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            mixed.check(broken, x, what)


def test_stages_are_in_order(monkeypatch, capsys):
    names = list(gpu.STAGES)
    assert names[0] == "cuda-build" and "cuda-build" in gpu.ALWAYS
    assert names.index("sanitizer") == names.index("tests-triton") + 1
    for words in gpu.STAGES.values():
        assert words[0] in ("-m", "-c") or (LAYER.parents[1] / words[0]).is_file()
        assert all(
            (LAYER.parents[1] / word).is_file() for word in words if word.startswith("tests/")
        )
    monkeypatch.setattr(cuda, "build", lambda: "built")
    exec(gpu.STAGES["cuda-build"][1])
    assert capsys.readouterr().out == "built\n"


def test_a_stage_ends_and_leaves_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.machine, "describe", lambda _: dict(commit="abc"))
    words = ["-c", "import time; print('begun'); time.sleep(60)"]
    monkeypatch.setattr(gpu, "STAGES", {"long": words, "short": ["-c", "print('all')"]})
    folder = tmp_path / "chip"
    folder.mkdir()
    assert gpu.run("long", folder, 5.0) == -9 and gpu.run("short", folder, None) == 0
    assert (folder / "long.log").read_text() == "begun\n"
    monkeypatch.setattr(gpu.machine, "commit", lambda: "abc")
    assert not gpu.passed(folder / "long.stage.json") and gpu.passed(folder / "short.stage.json")
    gpu.archive(folder, tmp_path / "results.tar.gz")
    with tarfile.open(tmp_path / "results.tar.gz") as tar:
        assert {"chip/long.log", "chip/short.stage.json"} <= set(tar.getnames())


def test_the_sanitizer_watches_every_form():
    found = sanitize.cases()
    assert len(set(map(str, found))) == len(found) == 108
    for form in sanitize.NORMS:
        own = [case for case in found if case.form == form]
        assert {case.shape for case in own} == set(sanitize.SHAPES)
        assert {case.dtype for case in own} == set(sanitize.DTYPES)
        assert {case.layout for case in own} == set(sanitize.LAYOUTS)
    for part in ("output; stored; biases; float32", "weight, max; tied; bfloat16"):
        case = next(case for case in found if str(case).startswith(part))
        sanitize.run_case(case, "reference", "cpu")


def test_what_the_sanitizer_watches_runs_by_itself():
    done = subprocess.run(
        [
            sys.executable,
            LAYER.parent / "sanitize.py",
            "--run",
            "--impl",
            "reference",
            "--device",
            "cpu",
            "--case",
            "no gate; stored; biases",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.endswith("6 cases have run\n")


def test_plain_products():
    a, b, c = torch.randn(5, 7), torch.randn(7, 3), torch.randn(5, 3)
    expected = a @ b, torch.nn.functional.linear(a, b.T, c[0]), c.clone().addmm_(a, b, alpha=2)
    library = sanitize.plain_products("CPU")
    try:
        found = a @ b, torch.nn.functional.linear(a, b.T, c[0]), c.clone().addmm_(a, b, alpha=2)
    finally:
        library._destroy()
    torch.testing.assert_close(found, expected)


def test_a_watched_run_ends_as_its_tool_says(tmp_path):
    tool = tmp_path / "compute-sanitizer"
    words = tmp_path / "words"
    for end, wrong in (("exit 0", ""), ("exit 1", "exit status 1"), ("sleep 60", "not done after")):
        tool.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" > {words}\n{end}\n')
        tool.chmod(0o755)
        assert sanitize.watch(str(tool), "racecheck", "weight", 2).startswith(wrong)
        given = words.read_text()
        assert given.startswith("1 --tool racecheck --error-exitcode 1 ")
        assert given.endswith("sanitize.py --run --case weight\n")


@pytest.mark.parametrize(
    ("script", "option", "wrong"),
    [
        (sanitize, "--tool", ["--tool", "nope"]),
        (sanitize, "--case", ["--case", "nope"]),
        (gpu, "cuda-build", ["nope"]),
    ],
)
def test_scripts_name_their_options(script, option, wrong, monkeypatch, capsys):
    for words, status in ((["--help"], 0), (wrong, 2)):
        monkeypatch.setattr(sys, "argv", ["script", *words])
        with pytest.raises(SystemExit) as end:
            script.main()
        assert end.value.code == status
    printed = capsys.readouterr()
    assert option in printed.out and "nope" in printed.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_the_gpu_run_says_so():
    for script in ("gpu.py", "layer/passes.py"):
        done = subprocess.run(
            [sys.executable, LAYER.parent / script], capture_output=True, text=True
        )
        assert done.returncode == 1 and "no NVIDIA GPU is here" in done.stderr
    done = subprocess.run(
        [sys.executable, LAYER.parent / "sanitize.py"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("sanitize: ")


def test_what_calibration_costs(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            LAYER.parent / "calibration" / "run.py",
            "--quick",
            "--tokens",
            "256",
            "--out",
            tmp_path,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "calibration.json").read_text())
    memory = {(row["basis"], row["rank"]): row["GiB_8b"] for row in found["rows"]}
    assert memory["whitened", None] < memory["natural", 0] < memory["natural", 256] < 10
    assert all(row["calibrate_s"] > 0 for row in found["rows"])
    assert (tmp_path / "calibration.md").read_text() in done.stdout


def test_a_step_of_a_mixture_of_experts(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            LAYER.parent / "experts" / "run.py",
            "--quick",
            "--rank",
            "2",
            "--steps",
            "2",
            "--device",
            "cpu",
            "--out",
            tmp_path,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "experts.json").read_text())["rows"]
    trained = {row["method"]: row["trained"] for row in rows}
    # E = 8, W (32, 32) and (32, 16): r r; m r twice and N, with m = 3; r (N + K).
    assert trained == {
        "frozen": 0,
        "CURLoRA": 8 * 2 * 4,
        "CURLoRA, 4 r": 8 * 2 * 64,
        "SECURA": 8 * (2 * 12 + 64),
        "LoRA (PEFT)": 8 * 2 * (64 + 48),
    }
    assert all(row["median_s"] > 0 and row["kept_bytes"] > 0 for row in rows)
    assert (tmp_path / "experts.md").read_text() in done.stdout
