"""One layer beside its rivals: forward, backward and both, for the layers of known models.

    python benchmarks/layer/run.py                       # what `make bench` runs on a CPU
    python benchmarks/layer/run.py --model llama-3.1-8b --tokens 2048 8192 --rank 16 64
    python benchmarks/layer/run.py --base HEAD~3         # has anything of ours become slower?

"frozen" is the floor, an ``nn.Linear`` that trains nothing, its input gradient included; "dense"
materialises delta_W at every step, as both published codes do. What computes the same is compared
with float64 before it is timed. A stopped run goes on where it stopped.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ceilings
import machine
import results
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from shapes import DTYPES, LAYERS, Case, select
from timing import WARM_UP, measure

REPLAY = "secura_kernels/tools/replay.py"
SLOWER = 1.05  # ratios to the frozen layer that differ by less are noise


def main() -> int:
    options = arguments()
    device = torch.device(options.device)
    cases = select(options.model, options.layer, options.tokens, options.rank, options.dtype)
    if options.base:
        return compare(options, cases, device)
    rows, about = run(cases, device, options.rounds, options.compiled, options.out, options.name)
    results.print_table(rows, about)
    for file in results.plot(options.out, options.name, rows, about):
        print(f"drawn: {file}")
    print(f"written: {options.out / options.name}.json and .csv")
    return 0


def run(
    cases: list[Case], device: torch.device, rounds: int, compiled: bool, folder: Path, name: str
) -> tuple[list[dict], dict]:
    """Measures every case that ``folder`` does not hold for this commit and machine."""
    about = machine.describe(device)
    unfinished = folder / f"{name}.unfinished.jsonl"
    done = _resume(unfinished, about)
    folder.mkdir(parents=True, exist_ok=True)
    about["ceilings"] = {d: ceilings.measure(device, DTYPES[d]) for d in {c.dtype for c in cases}}
    rows, missing = [], {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(cases) * (rounds + WARM_UP))
        for case in cases:
            key = json.dumps(case.to_dict() | dict(rounds=rounds, compiled=compiled))
            progress.update(task, description=f"{case.model} {case.layer} M={case.M} r={case.r}")
            if key in done:
                rows += done[key]
                progress.advance(task, rounds + WARM_UP)
                continue
            found, reasons = measure(
                case, device, rounds, compiled=compiled, tick=lambda: progress.advance(task)
            )
            rows += found
            missing |= dict.fromkeys(reasons)
            with open(unfinished, "a") as file:
                file.write(json.dumps(dict(about=_identity(about), key=key, rows=found)) + "\n")
    for row in rows:
        row["predicted"] = results.predicted(row, about)
    about["missing"] = list(missing)
    for reason in missing:
        print(f"left out: {reason}", file=sys.stderr)
    results.write(folder, name, rows, about)
    unfinished.unlink(missing_ok=True)
    return rows, about


def _identity(about: dict) -> dict:
    """What must be equal for a row to be taken over from a stopped run."""
    return {k: about.get(k) for k in ("commit", "torch", "triton", "processor", "gpu", "threads")}


def _resume(file: Path, about: dict) -> dict[str, list[dict]]:
    if not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["key"]: line["rows"] for line in lines if line["about"] == _identity(about)}


def compare(options: argparse.Namespace, cases: list[Case], device: torch.device) -> int:
    """The ratios of a git revision beside the working tree's, each in a process of its own; 1 where
    something of ours has become slower by more than SLOWER. The revision must have what today's
    benchmark imports of the package."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        git = ["git", "-C", str(machine.ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", tree, options.base], check=True)
        try:
            # Both are timed by today's benchmark, a part of which stands in the package.
            shutil.copy(machine.ROOT / REPLAY, tree / REPLAY)
            results = {}
            for name, root in (("base", tree), ("now", machine.ROOT)):
                command = [
                    sys.executable,
                    __file__,
                    "--name",
                    name,
                    "--out",
                    scratch,
                    *_same(options),
                ]
                subprocess.run(
                    command,
                    check=True,
                    stdout=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": str(root)},
                )
                content = json.loads((Path(scratch) / f"{name}.json").read_text())
                results[name] = {
                    (r["model"], r["layer"], r["M"], r["r"], r["dtype"], r["rival"]): r["ratio"]
                    for r in content["rows"]
                    if r["mode"] == "both"
                }
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)
    slower = 0
    for key, now in results["now"].items():
        base = results["base"].get(key)
        if (
            base is None
            or not key[-1].startswith(("CURLoRA, ", "SECURA, "))
            or key[-1].endswith(("eager", "dense", "compiled"))
        ):
            continue
        slower += now > SLOWER * base
        print(
            f"{'SLOWER ' if now > SLOWER * base else '       '}{' '.join(map(str, key)):70} "
            f"{base:.3f} -> {now:.3f} of frozen"
        )
    print(f"{slower} slower than {options.base} by more than {SLOWER - 1:.0%}")
    return 1 if slower else 0


def _same(options: argparse.Namespace) -> list[str]:
    """The options of this run, for another process."""
    words = ["--device", options.device, "--rounds", str(options.rounds)]
    for name in ("model", "layer", "tokens", "rank", "dtype"):
        values = getattr(options, name)
        words += [f"--{name}", *map(str, values)] if values else []
    return [*words, "--compiled" if options.compiled else "--no-compiled"]


def arguments() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--model", nargs="+", choices=list(LAYERS), default=["square"])
    parser.add_argument("--layer", nargs="+", default=["4096"] if gpu else ["1536"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 8192] if gpu else [512])
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 64, 150] if gpu else [16, 150])
    parser.add_argument(
        "--dtype", nargs="+", choices=list(DTYPES), default=["bfloat16" if gpu else "float32"]
    )
    parser.add_argument("--rounds", type=int, default=50 if gpu else 40)
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        default=gpu,
        help="time torch.compile of the eager formula as well",
    )
    parser.add_argument("--base", metavar="REV", help="compare with a git revision instead")
    parser.add_argument("--out", type=Path, help="results folder")
    parser.add_argument("--name", default="layer", help="name of the results' files")
    options = parser.parse_args()
    if min(options.tokens) < 1 or min(options.rank) < 1 or options.rounds < 1:
        parser.error("--tokens, --rank and --rounds take whole numbers above 0")
    if options.device == "cuda" and not gpu:
        parser.error("--device cuda: no NVIDIA GPU is here")
    if options.out is None:
        options.out = (
            machine.ROOT / "benchmarks/results" / machine.chip(torch.device(options.device))
        )
    try:
        select(options.model, options.layer, [1], [1], options.dtype)
    except ValueError as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    sys.exit(main())
