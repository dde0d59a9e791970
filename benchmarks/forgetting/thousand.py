r"""What is kept over a thousand steps? One task, one seed, validation data, measured on the way.

    python benchmarks/forgetting/thousand.py     # SmolLM2 on a CPU: some eight hours

SmolLM2 learns Shakespeare for 1,000 steps at a constant rate, in each of a few ways. A stopped
command goes on where it was: each run keeps a checkpoint beside the records until it ends.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from strategies import Strategy
from strategies.base import trained
from study import subjects
from study.language_retention import Reference, base_reference
from study.language_subject import Language
from study.methods import METHODS
from study.protocol import make_strategy, train_step
from study.records import Records
from study.search import SEQUENTIAL
from study.setup import Setup
from study.small_studies import arguments, drawn
from study.tables import table
from torch import nn
from tqdm import tqdm

LORA, NATURAL = "LoRA, every layer", "CURLoRA, every layer, natural"
KL = "base kl, weight 4"
WAYS = {
    "natural": (NATURAL, SEQUENTIAL, 2.3e-3),
    "LoRA": (LORA, SEQUENTIAL, 3.3e-4),
    "natural, with the divergence as a loss": (NATURAL, KL, 2.3e-3),
    "LoRA, with the divergence as a loss": (LORA, KL, 3.3e-4),
}
STEPS, WARM_UP, MEASURED = 1000, 10, (8, 16, 32, 64, 125, 250, 500, 1000)
CHECKPOINT = 25  # steps between two


@dataclass
class Progress:
    """A run so far."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    strategy: Strategy
    rows: list[dict]
    step: int = 0

    def save(self, path: Path) -> None:
        state = dict(
            trained={name: p.detach() for name, p in trained(self.model).items()},
            optimizer=self.optimizer.state_dict(),
            strategy=self.strategy.state_dict(),
            rows=self.rows,
            step=self.step,
        )
        unfinished = path.with_suffix(".tmp")
        torch.save(state, unfinished)
        unfinished.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        parameters = trained(self.model)
        for name, value in state["trained"].items():
            parameters[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.strategy.load_state_dict(self.model, state["strategy"])
        self.rows, self.step = state["rows"], state["step"]


def run(subject: Language, reference: Reference, way: str, checkpoint: Path) -> list[dict]:
    """A row for each step of ``MEASURED``, by a run that goes on from ``checkpoint``."""
    name, strategy, rate = WAYS[way]
    method, task = METHODS[name], subject.tasks[0]
    torch.manual_seed(0)
    batches = subject.batches(task, STEPS, 0)
    model = subject.model(method, 0)
    if method.calibrated:  # the same in every call, so that a run can go on
        subject.calibrate(model, method, batches, None, [])
    optimizer = torch.optim.AdamW(trained(model).values(), lr=rate, weight_decay=0.0)
    progress = Progress(model, optimizer, make_strategy(strategy, method, subject, STEPS), [])
    if checkpoint.exists():
        progress.load(checkpoint)
    for step in tqdm(range(progress.step, STEPS), way, STEPS, unit="step", initial=progress.step):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / WARM_UP)
        model.train()
        if not train_step(model, subject, progress.strategy, optimizer, batches[step]):
            raise FloatingPointError(f"{way}: the loss of step {step + 1} is not finite")
        progress.step = step + 1
        if progress.step in MEASURED:
            progress.rows.append(dict(step=step + 1) | subject.validated(model, reference))
        if progress.step % CHECKPOINT == 0 or progress.step in MEASURED:
            progress.save(checkpoint)
    return progress.rows


def report(found: dict[str, list[dict]]) -> str:
    head = ["", "rate", "step", "perplexity", "agreement", "KL"]
    lines = [
        [
            way,
            f"{WAYS[way][2]:g}",
            str(row["step"]),
            f"{row['perplexity']:.1f}",
            f"{row['agreement']:.3f}",
            f"{row['kl']:.4f}",
        ]
        for way, rows in found.items()
        for row in rows
    ]
    return table(head, lines)


def draw(found: dict[str, list[dict]], path: Path) -> None:
    with drawn(path, (7, 5)) as axes:
        for (way, rows), marker in zip(found.items(), "os^v", strict=False):
            x, y = ([row[kind] for row in rows] for kind in ("perplexity", "agreement"))
            axes.plot(x, y, marker=marker, label=way)
            for row in rows:
                at = (row["perplexity"], row["agreement"])
                axes.annotate(
                    row["step"], at, fontsize=6, textcoords="offset points", xytext=(3, 3)
                )
        axes.invert_xaxis()
        axes.set(
            xlabel="perplexity of the task, after so many steps (to the right more is learned)",
            ylabel="agreement with the base model on general text",
            title="A thousand steps of one task",
        )


def main() -> None:
    options = arguments(__doc__, WAYS, "thousand.json, .md and .png")
    subject = subjects.load("language", Setup(precision="float32", model=options.model))
    study = dict(subject=subject.identity, steps=STEPS)
    records = Records(options.out / "thousand.json", study, {})
    reference = base_reference(subject.base, subject.tokenizer, "validation")
    for way in options.way:
        if way not in records.by_key:
            checkpoint = options.out / f"thousand-{list(WAYS).index(way)}.pt"
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            rows = run(subject, reference, way, checkpoint)
            records.add(way, dict(rows=rows))
            checkpoint.unlink()
    found = {way: record["rows"] for way, record in records.by_key.items()}
    (options.out / "thousand.md").write_text(report(found) + "\n")
    draw(found, options.out / "thousand.png")
    print(report(found))


if __name__ == "__main__":
    main()
