"""benchmarks/forgetting/study: the protocol on a small made-up subject, the search, the report."""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("peft", reason="the methods compared are PEFT's and this package's")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "forgetting"))
from study import methods, protocol, report, search

TASKS = ("first", "second")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"layer": nn.Linear(12, 10)})
        self.head = nn.Linear(10, 1)

    def forward(self, x):
        return self.head(self.body.layer(x).tanh())[:, 0]


@dataclass
class Subject:
    """Two regressions that pull one layer two ways; what it knew is its own first outputs."""

    name: str = "made up"
    tasks: tuple[str, ...] = TASKS
    identity: str = "1"
    before: dict = field(default_factory=lambda: {"kept": 0.0})
    ticks: int = 0
    ended: list = field(default_factory=list)

    def model(self, method, seed):
        torch.manual_seed(7)  # the pretrained model is the same one for every seed
        model = Model()
        model.body = method.attach(model.body, ["layer"], seed)
        return model

    def trained(self, model):
        return sum(p.numel() for n, p in model.named_parameters()
                   if p.requires_grad and not n.startswith("head"))

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


def run_of(**changes) -> protocol.Run:
    return replace(protocol.Run("LoRA", "sequential", 1e-2, 0, 12, "test"), **changes)


@pytest.fixture(autouse=True)
def _small_ranks(monkeypatch):
    for name, method in list(methods.METHODS.items()):
        if "r" in method.settings:
            monkeypatch.setitem(methods.METHODS, name,
                                replace(method, settings=method.settings | dict(r=4)))


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_learns(name):
    subject = Subject()
    method = methods.METHODS[name]
    record = protocol.perform(run_of(method=name, rate=max(method.rates)), subject, lambda: None)
    assert record["diverged"] is None and subject.ended == list(TASKS)
    before = subject.learned(subject.model(method, 0), "first", "test")
    assert record["learned"]["first"]["first"] > before
    assert set(record["learned"]["first"]) == set(TASKS)
    assert set(record["learned"]["second"]) == {"second"}
    assert set(record["retention"]) == {"before", *TASKS}
    assert (record["trained"] == 0) == (method.kind == "head")


@pytest.mark.parametrize("strategy", protocol.STRATEGIES)
def test_every_strategy_runs_and_is_repeatable(strategy):
    records = [protocol.perform(run_of(strategy=strategy), Subject(), lambda: None)
               for _ in range(2)]
    for record in records:
        record.pop("seconds")
    assert records[0] == records[1]
    other = protocol.perform(run_of(strategy=strategy, seed=1), Subject(), lambda: None)
    assert other["learned"] != records[0]["learned"]


def test_forgetting_is_seen_and_stages_are_taken(monkeypatch):
    record = protocol.perform(run_of(method="full", rate=1e-2, steps=60), Subject(), lambda: None)
    assert protocol.final_forgetting(record, TASKS) > 0.5
    taken = []
    monkeypatch.setattr(protocol, "take_stage", lambda model, kind: taken.append(kind))
    protocol.perform(run_of(method="SECURA, M2"), Subject(), lambda: None)
    assert taken == ["m2"]


def test_a_run_is_made_once(tmp_path):
    subject, run = Subject(), run_of()
    record = protocol.run_once(run, subject, tmp_path)
    made = subject.ticks
    assert protocol.run_once(run, subject, tmp_path) == record and subject.ticks == made
    assert json.loads((tmp_path / f"{run.key(subject)}.json").read_text()) == record
    protocol.run_once(replace(run, seed=1), subject, tmp_path)
    protocol.run_once(run, replace(subject, identity="2"), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_diverged_run_says_where():
    record = protocol.perform(run_of(method="full", rate=1e30), Subject(), lambda: None)
    assert record["diverged"] == "first" and search.score(record) == float("-inf")


def test_the_search_takes_the_rate_that_learns_most(tmp_path):
    runs = search.search_runs("LoRA", "sequential", 12, rates=(1e-6, 3e-2))
    assert {run.part for run in runs} == {"validation"} and {run.seed for run in runs} == {0}
    assert search.best_rate(runs, Subject(), tmp_path, lambda: None) == 3e-2
    assert len(search.search_runs("SECURA", "ewc", 12)) == 5
    budgets = {len(method.rates) for method in methods.METHODS.values()}
    assert budgets == {5}  # the same for all


def record_of(method, rate, learned, kept, seed=0, diverged=None) -> dict:
    return dict(method=method, strategy="sequential", rate=rate, seed=seed, trained=1234,
                diverged=diverged, retention={"before": {"kept": 1.0}, "second": {"kept": kept}},
                learned={"first": {"first": learned, "second": learned - 0.1},
                         "second": {"second": learned}})


def test_the_table():
    records = [record_of("A", 0.1, 0.8, 0.5), record_of("A", 0.1, 0.9, 0.7, seed=1),
               record_of("B", 0.2, 0.7, 0.6), record_of("C", 0.3, 0, 0, diverged="first")]
    lines = report.markdown(records, TASKS, "kept").splitlines()
    assert lines[0] == ("| method | strategy | rate | trained | first → end | second | "
                        "forgetting | kept |")
    assert lines[2] == ("| A | sequential | 0.1 | 1,234 | 0.850 ± 0.071 → 0.750 ± 0.071 | "
                        "0.850 ± 0.071 | 0.100 ± 0.000 | 1.000 ± 0.000 → 0.600 ± 0.141 |")
    assert lines[3].startswith("| B | sequential | 0.2 | 1,234 | 0.700 → 0.600 | 0.700 | 0.100 |")
    assert "diverged" in lines[4] and {line.count("|") for line in lines} == {9}


def test_what_is_kept_at_equal_learning(tmp_path):
    records = [record_of("A", rate, learned, kept)
               for rate, learned, kept in ((1, 0.5, 1.0), (2, 0.7, 0.8), (3, 0.6, 0.2))]
    curve = report.points(records, TASKS, "kept")["A", "sequential"]
    assert curve == [(0.5, 1.0), (0.7, 0.8), (0.6, 0.2)]
    assert report.retained_at(curve, 0.6) == pytest.approx(0.9)  # the better of two places
    assert report.retained_at(curve, 0.65) == pytest.approx(0.85)
    assert report.retained_at(curve, 0.8) is None
    report.draw(records, TASKS, "kept", "made up", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_the_command_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    import importlib.util

    file = Path(__file__).parents[1] / "benchmarks" / "forgetting" / "run.py"
    spec = importlib.util.spec_from_file_location("forgetting_run", file)
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    subject = Subject()
    monkeypatch.setattr(command.subjects, "load", lambda name, quick: subject)
    monkeypatch.setattr(sys, "argv", [
        "run.py", "--quick", "--method", "LoRA", "CURLoRA", "--seeds", "2", "--steps", "5", "--out",
        str(tmp_path)])
    command.main()
    printed = capsys.readouterr().out
    made = subject.ticks
    assert made == 2 * (2 + 2) * len(TASKS)  # two rates searched, two seeds at the best
    content = json.loads((tmp_path / "minilm-quick.json").read_text())
    assert len(content["records"]) == 4 and all(record["best"] for record in content["records"])
    assert "| LoRA | sequential |" in printed and "| CURLoRA | sequential |" in printed
    assert (tmp_path / "minilm-quick.png").stat().st_size > 5000
    next((tmp_path / "runs").iterdir()).unlink()
    command.main()
    assert subject.ticks == made + len(TASKS)  # one run only
