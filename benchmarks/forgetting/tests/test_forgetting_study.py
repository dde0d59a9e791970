"""benchmarks/forgetting/study: the protocol on a small made-up subject, the search, the report."""

import importlib.util
import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("peft", reason="the methods compared are PEFT's and this package's")
from study import curves, drawing, methods, protocol, report, search, tables
from study.records import Records

from secura_kernels import calibrate

TASKS = ("first", "second")


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(12, 10)

    def forward(self, x):
        return self.up_proj(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(10, 1)

    def forward(self, x):
        return self.head(self.body(x).tanh())[:, 0]


@dataclass
class Subject:
    """Two regressions that pull one layer two ways; what it knew is its own first outputs."""

    name: str = "made up"
    title: str = "a made-up model"
    tasks: tuple[str, ...] = TASKS
    identity: str = "1"
    before: dict = field(default_factory=lambda: {"kept": 0.0})
    shown: tuple[str, ...] = ("kept",)
    log_likelihood: bool = False
    labels: int = 1
    head_rate: float = 1e-3
    ticks: int = 0
    ended: list = field(default_factory=list)
    samples: list = field(default_factory=list)

    def model(self, method, seed):
        torch.manual_seed(7)  # the pretrained model is the same one for every seed
        model = Model()
        general = [dict(x=self.general().view(4, 16, 12))]  # rows of tokens
        model.body = method.attach(
            model.body, ["up_proj"], ["up_proj"], seed, lambda: general, lambda: general
        )
        return model

    def general(self):
        return torch.randn(64, 12, generator=torch.Generator().manual_seed(8))

    def calibrate(self, model, method, sample, before, finished):
        general = [self.general()]
        if method.basis == "whitened":
            return before or calibrate(model.body.up_proj, general, progress=False)
        self.samples.append(sample)
        assert len(finished) == (len(sample) if before else 0)
        if before and method.keeps_tasks:
            general = [batch["x"] for batch in finished]
        return calibrate(
            model.body.up_proj,
            general,
            sample,
            progress=False,
            keep=before,
            loss=lambda _, batch: self.forward(model, batch)[0],
        )

    def heads(self, model):
        return list(model.head.parameters())

    def batches(self, task, steps, seed):
        generator = torch.Generator().manual_seed(seed)
        sign = 1.0 if task == "first" else -1.0
        xs = [torch.randn(16, 12, generator=generator) for _ in range(steps)]
        return [dict(x=x, y=sign * x[:, 0]) for x in xs]

    def end(self, model, task):
        self.ended.append(task)

    def forward(self, model, batch):
        out = model(batch["x"])
        return F.mse_loss(out, batch["y"]), out

    @torch.no_grad()
    def learned(self, model, task, part):
        batches = self.batches(task, 2, 99 if part == "test" else 98)
        return -float(sum(self.forward(model, b)[0] for b in batches))

    @torch.no_grad()
    def retention(self, model):
        self.ticks += 1
        x = self.batches("first", 1, 5)[0]["x"]
        torch.manual_seed(7)
        return {"kept": -float(F.mse_loss(model(x), Model()(x)))}


def script(name: str):
    """benchmarks/forgetting/<name>.py as a module."""
    file = Path(__file__).parents[1] / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"forgetting_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_of(**changes) -> protocol.Run:
    return replace(protocol.Run("LoRA", "sequential", 1e-2, 0, 12), **changes)


@pytest.fixture(autouse=True)
def _small_ranks(monkeypatch):
    for name, method in list(methods.METHODS.items()):
        if "r" in method.settings:
            small = {"r": 4, "m": 6} if "m" in method.settings else {"r": 4}
            monkeypatch.setitem(
                methods.METHODS, name, replace(method, settings=method.settings | small)
            )


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_learns(name):
    subject = Subject()
    method = methods.METHODS[name]
    run = run_of(method=name, rate=max(method.rates), steps=100)
    record = protocol.perform(run, subject, lambda: None)
    assert record["diverged"] is None and subject.ended == list(TASKS)
    with torch.no_grad():
        before = subject.learned(subject.model(method, 0).eval(), "first", "test")
    assert record["learned"]["first"]["first"] > before
    assert set(record["learned"]["first"]) == set(TASKS)
    assert set(record["learned"]["second"]) == {"second"}
    assert set(record["validation"]) == set(TASKS)
    assert record["validation"]["first"] != record["learned"]["first"]["first"]
    assert set(record["retention"]) == {"before", "end"}
    assert (record["trained"] == 0) == (method.kind == "head")


@pytest.mark.parametrize("fresh", [False, True])
def test_a_fresh_sample_is_not_trained_on(fresh):
    subject, steps = Subject(), 4
    name = "CURLoRA, every layer, natural" + ", fresh" * fresh
    protocol.perform(run_of(method=name, steps=steps), subject, lambda: None)
    trained = [subject.batches(task, steps, i) for i, task in enumerate(TASKS)]
    for sample, batches in zip(subject.samples, trained, strict=True):
        assert len(sample) == len(batches)
        assert fresh != torch.equal(sample[0]["x"], batches[0]["x"])


@pytest.mark.parametrize("strategy", protocol.STRATEGIES)
def test_every_strategy_runs_and_is_repeatable(strategy):
    records = [
        protocol.perform(run_of(strategy=strategy), Subject(), lambda: None) for _ in range(2)
    ]
    assert records[0] == records[1]
    other = protocol.perform(run_of(strategy=strategy, seed=1), Subject(), lambda: None)
    assert other["learned"] != records[0]["learned"]


def test_strategies_are_as_strong_whatever_the_length_of_a_row_and_of_a_task():
    """EWC in the labels of a row, I-LoRA in the steps of a task."""
    for labels, lam in (1, 100), (63, 6300):
        assert protocol.make_strategy("ewc", None, Subject(labels=labels), 24).lam == lam
    for steps, ema in (120, 0.98), (24, 0.9), (2, 0.0):
        assert protocol.make_strategy("ilora", None, Subject(), steps).ema == pytest.approx(ema)


def test_forgetting_is_seen_and_stages_are_taken(monkeypatch):
    record = protocol.perform(run_of(method="full", rate=1e-2, steps=60), Subject(), lambda: None)
    assert protocol.final_forgetting(record, TASKS) > 0.5
    taken = []
    monkeypatch.setattr(protocol, "take_stage", lambda model, kind: taken.append(kind))
    protocol.perform(run_of(method="SECURA, M2"), Subject(), lambda: None)
    assert taken == ["m2"]


def test_heads_have_their_own_rate(monkeypatch):
    made = []

    class Watched(torch.optim.AdamW):
        def __init__(self, groups, **settings):
            super().__init__(groups, **settings)
            made.append(
                [
                    (sum(p.numel() for p in group["params"]), group["lr"])
                    for group in self.param_groups
                ]
            )

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    protocol.perform(run_of(steps=2), Subject(), lambda: None)
    protocol.perform(run_of(method="head only", steps=2), Subject(), lambda: None)
    assert made == 2 * [[(4 * (12 + 10), 1e-2), (11, 1e-3)]] + 2 * [[(11, 1e-3)]]


def test_where_nothing_is_trained_nothing_changes(monkeypatch):
    subject = Subject()
    monkeypatch.setattr(subject, "heads", lambda model: [], raising=False)
    monkeypatch.setattr(methods, "HEAD", "head")
    model = subject.model(methods.METHODS["head only"], 0).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert protocol.train(
        model,
        subject,
        protocol.make_strategy("sequential", None, subject, 2),
        subject.batches("first", 2, 0),
        1e-2,
        lambda: None,
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_is_made_once(tmp_path):
    subject, run, path = Subject(), run_of(), tmp_path / "study.json"
    study, about = dict(subject="1", steps=12), dict(tasks=TASKS)
    record = protocol.run_once(run, subject, Records(path, study, about))
    made = subject.ticks
    records = Records(path, study, about)
    assert protocol.run_once(run, subject, records) == record and subject.ticks == made
    protocol.run_once(replace(run, seed=1), subject, records)
    content = json.loads(path.read_text())
    assert content["tasks"] == list(TASKS) and content["study"] == study
    assert content["records"] == records.by_key and len(records.by_key) == 2
    assert content["records"]["LoRA, sequential, 0.01, seed 0"] == record
    with pytest.raises(ValueError, match=r"a study of .*'steps': 13"):
        Records(path, study | dict(steps=13), about)
    assert json.loads(path.read_text()) == content
    assert [file.name for file in tmp_path.iterdir()] == ["study.json"]


def test_a_diverged_run_says_where():
    record = protocol.perform(run_of(), Subject(head_rate=1e30), lambda: None)
    assert record["diverged"] == "first" and search.score(record) == float("-inf")


def record_of(method, rate, learned, kept, seed=0, diverged=None, validation=None) -> dict:
    value = learned if validation is None else validation
    return dict(
        method=method,
        strategy="sequential",
        rate=rate,
        seed=seed,
        trained=20_000,
        diverged=diverged,
        validation={} if diverged else {"first": value, "second": value},
        retention={"before": {"kept": 1.0}, "end": {"kept": kept}},
        learned={
            "first": {"first": learned, "second": learned - 0.1},
            "second": {"second": learned},
        },
    )


def test_the_rate_that_learns_most_on_validation_data_is_best():
    records = [
        record_of("LoRA", 1, 0.9, 0.5, validation=0.5),
        record_of("LoRA", 2, 0.5, 0.5, validation=0.7),
        record_of("LoRA", 2, 0.5, 0.5, seed=1, validation=0.3),
        record_of("LoRA", 1, 0.9, 0.5, seed=1, validation=0.4),
        record_of("LoRA", 1, 0.9, 0.5, seed=2, validation=0.9),  # not run at 2
        record_of("DoRA", 1, 0, 0, diverged="first"),
        record_of("DoRA", 2, 0.1, 0.1),
    ]
    assert search.best_rates(records) == {("LoRA", "sequential"): 2, ("DoRA", "sequential"): 2}


def test_every_method_has_the_same_budget():
    runs = search.grid([("LoRA", "sequential"), ("SECURA", "ewc")], 2, 12)
    assert [run.seed for run in runs] == 6 * [0] + 6 * [1] and len(set(runs)) == 12
    quick = search.grid(
        [("head only", "sequential"), ("LoRA", "sequential")], 1, 12, slice(-2, None)
    )
    assert [run.rate for run in quick] == [0.0, *methods.METHODS["LoRA"].rates[1:]]
    assert {
        len(method.rates) for method in methods.METHODS.values() if method.kind != methods.HEAD
    } == {3}


def test_further_seeds_are_run_at_the_rate_that_was_best():
    searched = [
        record_of("LoRA", 1, 0.9, 0.5),
        record_of("LoRA", 2, 0.8, 0.5),
        record_of("DoRA", 3, 0.1, 0.1),
    ]
    runs = search.repeats([record | dict(steps=12) for record in searched], range(1, 3))
    assert [(run.method, run.strategy, run.rate, run.seed, run.steps) for run in runs] == [
        (method, "sequential", rate, seed, 12)
        for seed in (1, 2)
        for method, rate in (("LoRA", 1), ("DoRA", 3))
    ]


def test_only_seeds_with_every_rate_give_a_curve():
    whole = [record_of("LoRA", rate, 0.5, 0.5, seed) for rate in (1, 2) for seed in (0, 1)]
    whole.append(record_of("DoRA", 1, 0.5, 0.5, seed=2))
    assert search.complete(whole) == whole[::2][:2] + whole[1:4:2] + whole[4:]
    assert search.complete([*whole, record_of("LoRA", 2, 0.9, 0.9, seed=2)]) == search.complete(
        whole
    )
    diverged = [
        record_of("LoRA", rate, 0.5, 0.5, 3, diverged)
        for rate, diverged in ((1, None), (2, "first"))
    ]  # was run at both
    assert search.complete([*diverged, *whole])[:2] == diverged


def test_the_table_at_the_best_rates():
    records = [
        record_of("LoRA", 0.1, 0.8, 0.5),
        record_of("LoRA", 0.1, 0.9, 0.7, seed=1),
        record_of("head only", 0, 0.7, 1.0),
        record_of("DoRA", 0.3, 0, 0, diverged="first"),
        record_of("SECURA", 0.2, 0.8, 0.8),
        record_of("SECURA", 0.1, 0.7, 1.0),
    ]
    lines = tables.best_table(records, Subject(before={"kept": 1.0})).splitlines()
    assert lines[0] == (
        "|  | rate | seeds | trained | first → end | second | forgetting | "
        "kept (before: 1.000) | gain per 100k |"
    )
    assert lines[2] == (
        "| LoRA | 0.1 | 2 | 20,000 | 0.850 ± 0.071 → 0.750 ± 0.071 | 0.850 ± 0.071 "
        "| 0.100 ± 0.000 | 0.600 ± 0.141 | 0.75 |"
    )
    assert lines[3].startswith(
        "| head only | 0 | 1 | 20,000 | 0.700 → 0.600 | 0.700 | 0.100 | 1.000 |"
    )
    assert "(1 of 1 diverged)" in lines[4] and {line.count("|") for line in lines} == {10}
    assert lines[5].startswith("| SECURA | 0.2 | 1 |")


def test_rivals_at_equal_learning():
    records = [
        *(
            record_of("LoRA", rate, learned, kept, seed)
            for seed in (0, 1)
            for rate, learned, kept in ((1, 0.6, 0.9), (2, 0.8, 0.5 + seed / 10))
        ),
        record_of("CABR", 1, 0.7, 0.8),
        record_of("CABR", 1, 0.7, 0.8, seed=1),
        record_of("CABR", 1, 0.9, 0.8, seed=2),  # a seed that the rival has not
        record_of("DoRA", 1, 0.8, 0.5),
        record_of("DoRA", 1, 0.81, 0.5, seed=1),
        record_of("head only", 0, 0.4, 1.0),
        record_of("SECURA", 1, 0, 0, diverged="first"),
    ]
    lines = tables.rival_table(records, Subject()).splitlines()
    assert lines[0] == "|  | seeds | learned | kept | LoRA | CABR | SECURA |"
    # Of LoRA half way between its rates: 0.7 and 0.75. CABR's one rate, and 0.4 untrained.
    assert lines[3] == (
        "| CABR | 3 | 0.767 ± 0.115 | 0.800 ± 0.000 | +0.075 ± 0.035 (2 of 3 seeds) |  |  |"
    )
    # Seed 1 of DoRA learned more than LoRA's.
    assert lines[4] == "| DoRA | 2 | 0.805 ± 0.007 | 0.500 ± 0.000 | +0.000 (1 of 2 seeds) |  |  |"
    assert lines[2].startswith("| LoRA | 2 | 0.800 ± 0.000 | 0.550 ± 0.071 |  |")
    assert len(lines) == 5


def test_kinds_that_no_calibration_saw_are_tabulated_where_they_were_measured(tmp_path):
    subject = Subject()
    plain, measured = (record_of(name, 1e-3, -1.0, 0.5) for name in ("LoRA", "CURLoRA"))
    report.write([plain], subject, tmp_path / "study.json")
    assert "mmlu" not in (tmp_path / "study.md").read_text()
    for number, kind in enumerate(tables.KINDS):
        measured["retention"]["end"] |= {f"{kind} agreement": 0.9, f"{kind} kl": 0.001 * number}
    report.write([plain, measured], subject, tmp_path / "study.json")
    written = (tmp_path / "study.md").read_text().splitlines()
    line = written[-1].split(" | ")
    assert line[0] == "| CURLoRA" and line[1:5] == ["0.001", "1", "-1.000", "0.500"]
    assert line[5:] == ["0.900, 0.000", "0.900, 0.001", "0.900, 0.002", "0.900, 0.003 |"]
    assert not any(row.startswith("| LoRA | 0.001 | 1 | -1.000 | 0.500") for row in written)


def test_one_task_alone_has_no_forgetting(tmp_path):
    subject, records = Subject(tasks=TASKS[:1]), Records(tmp_path / "one.json", {}, {})
    protocol.run_once(run_of(), subject, records)
    report.write(list(records.by_key.values()), subject, records.path)
    tables = (tmp_path / "one.md").read_text().splitlines()
    assert tables[2].startswith("|  | rate | seeds | trained | first | kept (before: 0.000) | ")
    at = tables.index("### At equal learning") + 2
    equal = tables[at : tables.index("", at)]
    assert len(equal) == 3 and {line.count("|") for line in equal} == {3}


def test_a_study_that_diverged_has_tables_and_no_curves(tmp_path):
    report.write(
        [record_of("LoRA", rate, 0, 0, diverged="first") for rate in (1, 2)],
        Subject(before={"kept": 1.0}),
        tmp_path / "one.json",
    )
    assert "| LoRA (1 of 1 diverged) | 1 |" in (tmp_path / "one.md").read_text()
    assert not (tmp_path / "one.png").exists()


def test_log_likelihoods_are_shown_as_perplexities():
    subject = Subject(before={"kept": 1.0}, log_likelihood=True)
    records = [record_of("LoRA", 1, -2.0, 0.9), record_of("LoRA", 2, -1.0, 0.8)]
    lines = tables.best_table(records[1:], subject).splitlines()
    assert lines[2].startswith("| LoRA | 2 | 1 | 20,000 | 2.718 → 3.004 | 2.718 | 0.100 | 0.800 |")
    lines = tables.equal_table(records, subject).splitlines()
    assert "1 (7.389): kept" in lines[0] and "2 (2.718): kept" in lines[0]


def test_seeds_that_do_not_learn_as_much_are_counted():
    records = [
        record_of("LoRA", 1, 0.6, 0.9, 0),
        record_of("LoRA", 1, 0.9, 0.9, 1),
        record_of("LoRA", 2, 0.7, 0.9, 0),
        record_of("LoRA", 2, 0.95, 0.9, 1),
    ]
    records += [
        record_of("DoRA", rate, learned, 0.5, seed)
        for rate, learned in ((1, 0.5), (2, 0.8))
        for seed in (0, 1)
    ]
    line = tables.equal_table(records, Subject()).splitlines()[3]
    assert line.startswith("| DoRA | 0.500 (1 of 2 seeds) | 0.100 (1 of 2 seeds) | 0.500 (1 of")


def test_what_is_kept_at_equal_learning(tmp_path):
    of_lora = [
        record_of("LoRA", rate, learned, 0.9, seed)
        for rate, learned in ((1, 0.6), (2, 0.68))
        for seed in (0, 1)
    ]
    of_dora = [
        record_of("DoRA", rate, learned, kept + seed / 100, seed)
        for rate, learned, kept in ((1, 0.5, 1.0), (2, 0.7, 0.8), (3, 0.6, 0.2))
        for seed in (0, 1)
    ]
    lines = tables.equal_table(of_lora + of_dora, Subject()).splitlines()
    assert lines[0] == (
        "| where as much is learned as by LoRA at | 1 (0.600): kept | forgetting | "
        "2 (0.680): kept | forgetting |"
    )
    assert lines[3] == ("| DoRA | 0.905 ± 0.007 | 0.100 ± 0.000 | 0.825 ± 0.007 | 0.100 ± 0.000 |")
    lone = record_of("DoRA", 3, 0.9, 0.9, seed=2)
    assert (
        tables.equal_table(
            [*of_lora, *of_dora, lone, record_of("LoRA", 2, 0.9, 0.9, 2)], Subject()
        ).splitlines()
        == lines
    )
    fewer = [r for r in of_dora if r["seed"] == 0 or r["rate"] < 3]  # a line of two rates
    assert (
        tables.equal_table([*of_lora, *fewer], Subject())
        .splitlines()[3]
        .startswith("| DoRA | 0.905 ± 0.007 |")
    )
    start = [record_of("head only", 0, 0.4, 1.0)]  # of one seed, whose curve it begins
    lines = tables.equal_table(
        [*of_lora, record_of("DoRA", 1, 0.8, 0.8), *start], Subject()
    ).splitlines()
    assert lines[3].startswith("| DoRA | 0.900 | 0.100 | 0.860 |") and len(lines) == 4
    curve = curves.curve_of(of_dora[::2], lambda r: r["retention"]["end"]["kept"])
    assert curve == [(0.5, 1.0), (0.7, 0.8), (0.6, 0.2)]
    assert curves.value_at(curve, 0.6) == pytest.approx(0.9)  # the better of two places
    assert curves.value_at(curve, 0.65, min) == pytest.approx(0.5)
    assert curves.value_at(curve, 0.8) is None
    report.write(of_lora + of_dora, Subject(), tmp_path / "made-up.json")
    assert (tmp_path / "made-up.png").stat().st_size > 5000
    written = (tmp_path / "made-up.md").read_text()
    assert "At equal learning" in written and written.startswith("### a made-up model: ")


def test_what_learned_far_less_than_the_untrained_body_is_left_of_the_plot():
    found = {("LoRA", "sequential"): [(0.5, 0.9), (0.7, 0.8)], ("DoRA", "ewc"): [(0.1, 0.1)]}
    assert drawing.least_shown(found) == pytest.approx(0.1 - 0.02 * 0.6)
    found["head only", "sequential"] = [(0.4, 1.0)]
    assert drawing.least_shown(found) == pytest.approx(0.3 - 0.02 * 0.4)


def test_the_command_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    command = script("run")
    subject = Subject()
    monkeypatch.setattr(command.subjects, "load", lambda name, setup: subject)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "run.py",
            "--quick",
            "--method",
            "LoRA",
            "CURLoRA",
            "--seeds",
            "2",
            "--steps",
            "5",
            "--out",
            str(tmp_path),
        ],
    )
    command.main()
    printed = capsys.readouterr().out
    made = subject.ticks
    assert made == 2 * 2 * 2  # two methods, rates and seeds
    path = tmp_path / "encoder-quick.json"
    content = json.loads(path.read_text())
    assert len(content["records"]) == 8 and "commit" in content["machine"]
    assert "| LoRA | " in printed and "| CURLoRA | " in printed
    assert path.with_suffix(".png").stat().st_size > 5000
    content["records"].popitem()
    path.write_text(json.dumps(content))
    command.main()
    assert subject.ticks == made + 1  # one run only


def test_the_command_searches_on_some_seeds_and_repeats_on_others(tmp_path, monkeypatch, capsys):
    command = script("run")
    subject = Subject()
    monkeypatch.setattr(command.subjects, "load", lambda name, setup: subject)
    arguments = [
        "run.py",
        "--method",
        "LoRA",
        "--seeds",
        "3",
        "--search-seeds",
        "1",
        "--steps",
        "5",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    command.main()
    records = json.loads((tmp_path / "encoder.json").read_text())["records"].values()
    rates = methods.METHODS["LoRA"].rates
    best = search.best_rates([r for r in records if r["seed"] == 0])["LoRA", "sequential"]
    assert [(r["rate"], r["seed"]) for r in records] == [
        *((rate, 0) for rate in rates),
        (best, 1),
        (best, 2),
    ]
    assert f"| LoRA | {best:g} | 3 | " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments, "--search-seeds", "4"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--search-seeds: 4 is not one of 1 to 3" in capsys.readouterr().err


def test_what_the_gate_makes_of_a_change(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gate.py", "--out", str(tmp_path)])
    script("gate").main()
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    assert cells["no gate"] == "| no gate | -1.00 | 0.00 | 0.90 | 1.10 | 2.00 | 3.00 |"
    # (2 + 1) / (2 - sigmoid(6)) and (2 - 0.1) / (2 - sigmoid(0.6))
    assert cells["published"].endswith("| 2.99 | 4.00 |") and "| 1.40 |" in cells["published"]
    assert (tmp_path / "gate.md").read_text().startswith(lines[0])
    assert (tmp_path / "gate.png").stat().st_size > 5000


def test_the_headline_is_drawn_from_the_committed_records(tmp_path, monkeypatch):
    out = tmp_path / "keeping.png"
    monkeypatch.setattr(sys, "argv", ["headline.py", "--out", str(out)])
    headline = script("headline")
    headline.main()
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 20000
    with pytest.raises(ValueError, match=r"no run of .*full, every layer"):
        headline.draw([], ["a", "b"], out)


def test_the_headline_takes_means_over_seeds_and_perplexities():
    headline = script("headline")
    record = dict(learned=dict(a=dict(a=-3.0, b=-3.5), b=dict(b=-4.0)))
    assert headline.perplexity(record) == pytest.approx(math.exp(3.5))
    assert headline.spread(iter([1.0, 3.0])) == (2.0, pytest.approx(math.sqrt(2)))
    assert headline.spread([5.0]) == (5.0, 0.0)
