"""Does it forget less? Tasks in turn, by every method, each at the learning rate that learns most.

    python benchmarks/forgetting/run.py --quick            # what `make forgetting` runs, 10 minutes
    python benchmarks/forgetting/run.py --subject minilm   # hours; goes on where it was stopped

For each method a search over five learning rates on validation data; then test data, several seeds,
at the best rate, and (not with --quick) at all rates, for the curve of what is kept against what is
learned. Every run's record is kept in --out, so a stopped command goes on with the next run.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from study import report, subjects
from study.methods import METHODS
from study.protocol import STRATEGIES, Run, Subject, run_once
from study.search import best_rate, search_runs, test_runs

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "layer"))
import machine  # noqa: E402

QUICK = ("head only", "LoRA", "CURLoRA", "SECURA")


def main() -> int:
    options = arguments()
    console = Console(stderr=True, highlight=False)
    with console.status(f"{options.subject}: reading the model and the tasks"):
        subject = subjects.load(options.subject, options.quick)
    records = study(subject, options, console)
    name = options.subject + "-quick" * options.quick
    write(records, subject, options.out, name)
    print((options.out / f"{name}.md").read_text())
    print(f"written: {options.out / name}.json, .md and .png")
    return 0


def study(subject: Subject, options: argparse.Namespace, console: Console) -> list[dict]:
    """Every run on test data, after the searches."""
    pairs = [(m, s) for m in options.method for s in options.strategy]
    seeds = range(options.seeds)
    rates = {m: METHODS[m].rates[1:4:2] if options.quick else METHODS[m].rates
             for m in options.method}
    total = sum(len(rates[m]) + len(seeds) * (1 if options.quick else len(rates[m]))
                for m, _ in pairs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())
    records = []
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(subject.name, total=total * len(subject.tasks) * options.steps)
        folder = options.out / "runs"

        def done(run: Run) -> dict:
            progress.update(bar, description=f"{run.method}, {run.strategy}, {run.rate:g}")
            before = progress.tasks[0].completed
            record = run_once(run, subject, folder, lambda: progress.advance(bar))
            # Of a run that was made before, or that diverged, no step was counted, or not all.
            progress.update(bar, completed=before + len(subject.tasks) * options.steps)
            return record

        for method, strategy in pairs:
            searched = search_runs(method, strategy, options.steps, rates[method])
            for run in searched:
                done(run)
            best = best_rate(searched, subject, folder, lambda: None)
            chosen = [best] if options.quick else rates[method]
            for run in test_runs(method, strategy, chosen, seeds, options.steps):
                records.append(done(run) | dict(best=run.rate == best))
    return records


def write(records: list[dict], subject: Subject, folder: Path, name: str) -> None:
    """``name``.json, ``name``.md (a line a method, at its best rate) and ``name``.png."""
    folder.mkdir(parents=True, exist_ok=True)
    about = machine.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    content = dict(machine=about, subject=subject.name, tasks=subject.tasks, records=records)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    best = [record for record in records if record["best"]]
    parts = [f"### {measure}\n\n{report.markdown(best, subject.tasks, measure)}"
             for measure in records[0]["retention"]["before"]]
    (folder / f"{name}.md").write_text("\n".join(parts))
    measure = next(iter(records[0]["retention"]["before"]))
    report.draw(records, subject.tasks, measure, subject.name, folder / f"{name}.png")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--subject", choices=subjects.NAMES, default=subjects.NAMES[0])
    add("--quick", action="store_true", help="four methods, two rates, few steps")
    add("--method", nargs="+", choices=METHODS, metavar="NAME", help="; ".join(METHODS))
    add("--strategy", nargs="+", choices=STRATEGIES, default=["sequential"])
    add("--seeds", type=int, help="on test data (quick: 1, else 3)")
    add("--steps", type=int, help="optimizer steps a task (quick: 60, else 400)")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "forgetting")
    options = parser.parse_args()
    options.method = options.method or (QUICK if options.quick else tuple(METHODS))
    options.seeds = options.seeds or (1 if options.quick else 3)
    options.steps = options.steps or (60 if options.quick else 400)
    return options


if __name__ == "__main__":
    sys.exit(main())
