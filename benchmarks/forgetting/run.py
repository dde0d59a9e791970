r"""Does it forget less? Tasks in turn, by every method, over learning rates and seeds.

    python benchmarks/forgetting/run.py --quick            # `make forgetting`: 8 minutes
    python benchmarks/forgetting/run.py --subject encoder  # hours; goes on where it was stopped
    python benchmarks/forgetting/run.py --subject language

Subjects: encoder (MiniLM; classifications with a head each), language (SmolLM2; text domains),
decoder (a language model that classifies with a head each, as in CURLoRA's Table 1). Each takes
other models and tasks, with a network those of the Hugging Face hub. CURLoRA's and SECURA's own:

    python benchmarks/forgetting/run.py --subject decoder --model mistralai/Mistral-7B-v0.1 \
        --task mrpc sst2 sentiment140 --general wikitext-2 --dtype bfloat16 --steps 1000 \
        --batch-size 8 --length 256 --out build/mistral
    python benchmarks/forgetting/run.py --subject language --model Qwen/Qwen2-7B \
        --task gsm8k cnn-dailymail logiqa --dtype bfloat16 --steps 1000 --batch-size 8 \
        --length 1024 --target q_proj v_proj --out build/qwen

Each method is run at each of its learning rates, the same number for all; its best one is chosen on
validation data, and what is reported is of test data. With --search-seeds 1 the rate is chosen on
the first seed and the others are run at it alone, 5 runs a method instead of 9. Every run's record
is kept in --out at once, so a stopped command goes on with the next run; tables and plot are made
anew after every seed, of all records there.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from study import report, subjects
from study.classifier_subjects import TASKS
from study.device import DEVICE, PRECISIONS
from study.hub_texts import HUB_TEXTS
from study.language import DOMAINS
from study.methods import METHODS
from study.protocol import ON_GENERAL_TEXT, STRATEGIES, Run, Subject, run_once
from study.records import Records
from study.search import SEQUENTIAL, grid, repeats
from study.setup import Setup
from study.subjects import STEPS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "layer"))
import machine  # noqa: E402

QUICK = ("head only", "LoRA", "CURLoRA", "SECURA")
QUICK_RATES = slice(-2, None)
WRITES = "language"  # the subject whose model can write general text


def main() -> int:
    options = arguments()
    console = Console(stderr=True, highlight=False)
    with console.status(f"{options.subject}: reading the model and the tasks"):
        subject = subjects.load(options.subject, setup_of(options))
    rows = [(m, s) for s in options.strategy for m in options.method]
    runs = grid(
        rows, options.search_seeds, options.steps, QUICK_RATES if options.quick else slice(None)
    )
    path = options.out / f"{options.subject}{'-quick' * options.quick}.json"
    about = dict(machine=machine.describe(torch.device(DEVICE)), tasks=subject.tasks)
    records = Records(path, dict(subject=subject.identity, steps=options.steps), about)
    perform(runs, subject, records, console)
    if options.seeds > options.search_seeds:
        searched = [records.by_key[run.key()] for run in runs]
        further = repeats(searched, range(options.search_seeds, options.seeds))
        perform(further, subject, records, console)
    print(path.with_suffix(".md").read_text())
    files = [path.with_suffix(end) for end in (".json", ".md", ".png")]
    print("written:", *(file for file in files if file.exists()))
    return 0


def perform(runs: list[Run], subject: Subject, records: Records, console: Console) -> None:
    """Every run that has no record yet; after each seed the report of all there are."""
    steps = len(subject.tasks) * runs[0].steps
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(subject.name, total=len(runs) * steps)
        for i, run in enumerate(runs):
            description = f"seed {run.seed}: {run.method}, {run.strategy}, {run.rate:g}"
            progress.update(bar, description=description)
            run_once(run, subject, records, lambda: progress.advance(bar))
            # Of a run that was made before, or that diverged, no step was counted, or not all.
            progress.update(bar, completed=(i + 1) * steps)
            if i + 1 == len(runs) or runs[i + 1].seed != run.seed:
                report.write(list(records.by_key.values()), subject, records.path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--subject", choices=subjects.NAMES, default=subjects.NAMES[0])
    add("--quick", action="store_true", help="four methods, two rates, one seed, fewer tests")
    add("--model", metavar="NAME", help="of the Hugging Face hub, or a folder")
    add(
        "--task",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(TASKS)}; of language: {', '.join((*DOMAINS, *HUB_TEXTS))}",
    )
    add("--target", nargs="+", metavar="NAME", help="the layers with adapters: ends of their names")
    add("--batch-size", type=int)
    add("--length", type=int, help="tokens of a text, at most")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base weights")
    add("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of all products")
    add(
        "--general",
        choices=("wikipedia", *HUB_TEXTS),
        default="wikipedia",
        help="text whose predictions a language model is not to lose",
    )
    add("--method", nargs="+", choices=METHODS, metavar="NAME", help="; ".join(METHODS))
    add("--strategy", nargs="+", choices=[*STRATEGIES, *ON_GENERAL_TEXT], default=[SEQUENTIAL])
    add("--seeds", type=int, help="quick: 1, else 3")
    add(
        "--search-seeds",
        type=int,
        metavar="N",
        help="seeds at every learning rate; those after them run at each row's best (default: all)",
    )
    add(
        "--steps",
        type=int,
        help=f"of the optimizer, a task ({', '.join(f'{k}: {v}' for k, v in STEPS.items())})",
    )
    add("--out", type=Path, default=ROOT / "build" / "forgetting")
    options = parser.parse_args()
    if options.subject != WRITES:
        unable = [name for name in options.method or () if METHODS[name].of_language_alone]
        unable += [name for name in options.strategy if name in ON_GENERAL_TEXT]
        if unable:
            parser.error(
                f"{unable[0]!r} needs a model that writes text itself, with layers named as "
                f"Llama's: --subject {WRITES} alone has one"
            )
    options.method = options.method or (
        QUICK
        if options.quick
        else tuple(
            name
            for name, method in METHODS.items()
            if options.subject == WRITES or not method.of_language_alone
        )
    )
    options.seeds = options.seeds or (1 if options.quick else 3)
    options.search_seeds = options.search_seeds or options.seeds
    if not 1 <= options.search_seeds <= options.seeds:
        parser.error(
            f"argument --search-seeds: {options.search_seeds} is not one of "
            f"1 to {options.seeds}, the seeds"
        )
    options.steps = options.steps or STEPS[options.subject]
    return options


def setup_of(options: argparse.Namespace) -> Setup:
    return Setup(
        quick=options.quick,
        model=options.model,
        tasks=options.task,
        targets=options.target,
        batch_size=options.batch_size,
        length=options.length,
        dtype=options.dtype,
        general=options.general,
        precision=options.precision,
    )


if __name__ == "__main__":
    sys.exit(main())
