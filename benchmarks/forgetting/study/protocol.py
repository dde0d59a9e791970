"""One run: tasks in turn, every one so far measured after each, and what the model knew before.

The protocol of CURLoRA's Table 1 (arXiv 2408.14572) and of SECURA's continual-learning runs (arXiv
2502.18168), for any subject: a model with its tasks and its measures.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from strategies import ON_GENERAL_TEXT, PREDICTED, STRATEGIES
from torch import Tensor, nn

from secura_kernels.train.calibration import Calibration
from secura_kernels.train.callbacks import take_stage

from .methods import METHODS, Method
from .records import Records

Batch = dict[str, Tensor]
Tick = Callable[[], None]
CLIP = 1.0  # largest norm of the gradient
WARM_UP = 0.1  # part of a task's steps
FRESH = 500  # from the seed of a task's training batches to that of others of it


class Subject(Protocol):
    """A pretrained model, its tasks in order, and what is measured of it."""

    name: str
    title: str  # of its tables and plots
    tasks: tuple[str, ...]
    identity: str  # changes with the data, the base weights and the sizes of what is measured
    before: dict[str, float]  # the retention of the base model
    shown: tuple[str, ...]  # measures of retention for the tables; of the first more is better
    log_likelihood: bool  # ``learned`` is one, and shown as a perplexity
    labels: int  # of a row at most: a row's loss is the mean over them
    head_rate: float  # the heads' learning rate, the same beside every method

    def model(self, method: Method, seed: int) -> nn.Module:
        """A fresh model that ``method`` trains; heads and adapters follow from the seed."""

    def calibrate(
        self,
        model: nn.Module,
        method: Method,
        sample: list[Batch],
        before: Calibration | None,
        finished: list[Batch],
    ) -> Calibration:
        """Gives a ``calibrated`` method's bases their metric, before a task whose batches are in
        ``sample``. before: what was measured at the task before; ``finished`` were its batches."""

    def general_rows(self, method: Method, predictions: bool) -> dict[str, Tensor]:
        """``ids`` (n, length) of the method's general text, and with ``predictions`` the base's
        ``logs`` of the next token's probabilities (n, length, vocabulary)."""

    def heads(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that only one task has."""

    def batches(self, task: str, steps: int, seed: int) -> list[Batch]:
        """Of the task's training part."""

    def forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean loss, and features that two models can be compared by."""

    def end(self, model: nn.Module, task: str) -> None:
        """Follows a task's training: what is its own (a head) trains no more."""

    def learned(self, model: nn.Module, task: str, part: str) -> float:
        """How well the model does the task: higher is better. part: "validation" or "test"."""

    def retention(self, model: nn.Module) -> dict[str, float]:
        """What is left of what the base model knew, by measure."""


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's figures, beside the subject."""

    method: str
    strategy: str
    rate: float
    seed: int
    steps: int

    def key(self) -> str:
        """Its name among the records of a study, in which all runs have as many steps."""
        return f"{self.method}, {self.strategy}, {self.rate:g}, seed {self.seed}"


def run_once(run: Run, subject: Subject, records: Records, tick: Tick = lambda: None) -> dict:
    """The run's record: the one in ``records`` where it has been made before."""
    key = run.key()
    if key not in records.by_key:
        records.add(key, asdict(run) | perform(run, subject, tick))
    return records.by_key[key]


def perform(run: Run, subject: Subject, tick: Tick) -> dict:
    """Trains the tasks in turn.

    Returns:
        ``validation``: {task: what validation data say right after it}, to choose a rate by.
        ``learned``: {task: {task it was measured after: value}}, on test data. ``retention``:
        {"before" or "end": {measure: value}}. ``trained``: parameters beside the heads.
        ``diverged``: the task in which the loss became no number; nothing follows it then.
    """
    method = METHODS[run.method]
    torch.manual_seed(run.seed)
    model = subject.model(method, run.seed)
    strategy = make_strategy(run.strategy, method, subject, run.steps)
    trained = sum(p.numel() for p in body_of(model, subject))
    validation: dict[str, float] = {}
    learned: dict[str, dict[str, float]] = {}
    retention = {"before": subject.before}
    result = dict(
        trained=trained, diverged=None, validation=validation, learned=learned, retention=retention
    )
    calibration, batches = None, []
    for i, task in enumerate(subject.tasks):
        if i and method.stage:
            take_stage(model, method.stage)
        seed = 1000 * run.seed + i
        finished, batches = batches, subject.batches(task, run.steps, seed)
        if method.calibrated:
            sample = subject.batches(task, run.steps, seed + FRESH) if method.fresh else batches
            calibration = subject.calibrate(model, method, sample, calibration, finished)
        if not train(model, subject, strategy, batches, run.rate, tick):
            result["diverged"] = task
            return result
        subject.end(model, task)
        with strategy.evaluation(model):
            validation[task] = subject.learned(model, task, "validation")
            for earlier in subject.tasks[: i + 1]:
                learned.setdefault(earlier, {})[task] = subject.learned(model, earlier, "test")
            if task == subject.tasks[-1]:
                retention["end"] = subject.retention(model)
    return result


def train(
    model: nn.Module, subject: Subject, strategy, batches: list[Batch], rate: float, tick: Tick
) -> bool:
    """One task; False where the loss became no number."""
    body, heads = body_of(model, subject), subject.heads(model)
    if not body and not heads:
        return True
    model.train()
    strategy.before_task(model)
    groups = [dict(params=body, lr=rate), dict(params=heads, lr=subject.head_rate)]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    warm_up = max(1, round(WARM_UP * len(batches)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warm_up, (len(batches) - step) / (len(batches) - warm_up + 1)
        ),
    )
    for batch in batches:
        if not train_step(model, subject, strategy, optimizer, batch):
            return False
        schedule.step()
        tick()
    strategy.after_task(model, batches)
    return True


def train_step(
    model: nn.Module, subject: Subject, strategy, optimizer: torch.optim.Optimizer, batch: Batch
) -> bool:
    """False, and nothing done, where the loss is no number."""
    batch = strategy.batch(batch)
    loss = strategy.loss(model, batch, subject.forward(model, batch)[0])
    if not torch.isfinite(loss):
        return False
    loss.backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, CLIP)
    optimizer.step()
    optimizer.zero_grad()
    strategy.after_step(model)
    return True


def body_of(model: nn.Module, subject: Subject) -> list[nn.Parameter]:
    """What is trained of ``model`` beside its heads."""
    heads = set(map(id, subject.heads(model)))
    return [p for p in model.parameters() if p.requires_grad and id(p) not in heads]


def make_strategy(name: str, method: Method, subject: Subject, steps: int):
    """Budgets as the papers' small ones: 200 rows, half a batch of replay, EWC on 128 rows.

    EWC's strength is 100 a label: the mean over n labels, whose gradients are independent, has an n
    times smaller Fisher matrix than one of them. I-LoRA's long-term memory is 5/12 of a task long.
    """
    settings = {
        "sequential": {},
        "replay": dict(budget=200, ratio=0.5),
        "ewc": dict(lam=100.0 * subject.labels, samples=128, forward=subject.forward),
        "ilora": dict(ema=max(0.0, 1 - 2.4 / steps), budget=200, forward=subject.forward),
    }
    if name in ON_GENERAL_TEXT:
        return ON_GENERAL_TEXT[name](**subject.general_rows(method, name in PREDICTED))
    return STRATEGIES[name](**settings[name])


def final_forgetting(record: dict, tasks: Iterable[str]) -> float:
    """Mean loss of what was learned, over all tasks, of two or more, but the last: right after the
    task less at the end; lower is better. Backward transfer (Lopez-Paz and Ranzato 2017, arXiv
    1706.08840) with its sign turned."""
    tasks = list(tasks)
    return statistics.mean(
        record["learned"][task][task] - record["learned"][task][tasks[-1]] for task in tasks[:-1]
    )
