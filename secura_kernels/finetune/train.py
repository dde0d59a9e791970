"""One method, one process: load, attach, train, measure, save, and prove that the saved loads."""

import math
import shutil
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from .corpus import Corpus
from .measure import evaluate, machine, peak_memory, reset_peak_memory, saved_for_backward
from .methods import TASK_BATCHES, attach, load, save
from .settings import BASE, LIKELIEST, Job, versions, write_json

UNTIMED_STEPS = 2  # the first steps also allocate and warm up


def run(job: Job) -> None:
    """Carry out `job` and write `result.json` into its folder, last of all.

    Raises SystemExit if the reloaded adapter does not compute what was trained.
    """
    logging.disable_progress_bar()
    device = torch.device(job.device)
    torch.manual_seed(job.seed)
    corpus = Corpus.load(job.tokens)
    model = load_model(job)
    result: dict[str, Any] = {"hash": job.hash(), "settings": job.settings()}

    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "result.json").unlink(missing_ok=True)  # it must not outlive its adapter
    if job.method != BASE:
        batches = list(corpus.batches(job.steps, job.batch_size, job.seq_len, job.seed))
        sample = list(corpus.batches(TASK_BATCHES, job.batch_size, job.seq_len, job.seed + 1))
        start = time.perf_counter()
        model = attach(model, job, sample)
        result["attach_seconds"] = time.perf_counter() - start
        result |= train(model, job, batches)
    with Console().status(f"{job.method}: measuring"):
        for kind in ("task", "general"):
            windows = corpus.held_out(kind, job.seq_len, job.eval_tokens)
            result[f"{kind}_perplexity"], likeliest = evaluate(model, windows, job.batch_size)
    if job.method == BASE:
        save_file({"general": likeliest}, job.folder / LIKELIEST)
    else:
        before = load_file(Path(job.out) / BASE / LIKELIEST)["general"]
        result["agreement"] = (likeliest == before).double().mean().item()
        folder = save_adapter_folder(model, job)
        result["adapter"] = str(folder.relative_to(job.out))
        result["adapter_bytes"] = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        result["reload"] = prove_reload(model, job, windows[:2].to(device))
    result |= {"machine": machine(device), "versions": versions()}
    result["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(job.folder / "result.json", result)


def load_model(job: Job) -> nn.Module:
    """The base model in float32: updates as small as an adapter's drown in bfloat16 weights."""
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    return model.to(job.device)


def train(model: nn.Module, job: Job, batches: list[Tensor]) -> dict[str, Any]:
    """Train the adapter in place; return the loss curve (nats a token), speed and memory."""
    device = torch.device(job.device)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=job.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: rate_factor(done, job))

    def step(batch: Tensor) -> float:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, job.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.item()  # waits for the device, so the time is the step's

    model.train()
    peak_since_load = reset_peak_memory(device)
    losses, seconds = [], []
    tokens = job.batch_size * job.seq_len
    with progress_bar() as bar:
        task = bar.add_task(job.method, total=job.steps, loss="", speed="")
        for batch in batches:
            batch = batch.to(device)
            start = time.perf_counter()
            if losses:
                losses.append(step(batch))
            else:
                with saved_for_backward(model) as saved:
                    losses.append(step(batch))
            seconds.append(time.perf_counter() - start)
            if not math.isfinite(losses[-1]):
                raise SystemExit(
                    f"{job.method}: the loss of step {len(losses)} is {losses[-1]}; a learning "
                    f"rate below {job.learning_rate:g} (--lr) may help"
                )
            speed = tokens / typical(seconds)
            bar.update(task, advance=1, loss=f"loss {losses[-1]:.3f}", speed=f"{speed:,.0f} tok/s")
    return {
        "trained_parameters": sum(weight.numel() for weight in weights),
        "losses": losses,
        "seconds_per_step": typical(seconds),
        "tokens_per_second": tokens / typical(seconds),
        "saved_for_backward_bytes": saved["bytes"],
        "peak_memory_bytes": peak_memory(device),
        "peak_memory_since_load": peak_since_load,
    }


def rate_factor(done: int, job: Job) -> float:
    """The learning rate after `done` steps, as a part of its peak: linear warmup, then cosine."""
    warmup = round(job.warmup * job.steps)
    if done < warmup:
        return (done + 1) / warmup  # from one part of the peak, not from a wasted step at zero
    if job.schedule == "constant":
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / (job.steps - warmup))


def typical(seconds: list[float]) -> float:
    """The median step time without the first steps, as far as there are others."""
    return statistics.median(seconds[UNTIMED_STEPS:] or seconds)


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description:8}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )


def save_adapter_folder(model: nn.Module, job: Job) -> Path:
    """Save into `adapter/` of the job's folder, which is replaced only by a whole one."""
    filling, folder = job.folder / "adapter.tmp", job.folder / "adapter"
    shutil.rmtree(filling, ignore_errors=True)
    filling.mkdir()
    save(model, job.method, filling)
    shutil.rmtree(folder, ignore_errors=True)
    filling.rename(folder)
    return folder


@torch.no_grad()
def prove_reload(trained: nn.Module, job: Job, sample: Tensor) -> dict[str, Any]:
    """Load the saved adapter into a fresh base model and compare all logits of `sample`.

    Returns how far the adapter moved them; raises SystemExit unless they are bitwise equal.
    """
    expected = trained.eval()(sample).logits
    fresh = load_model(job).eval()
    moved = (expected - fresh(sample).logits).abs().max().item()
    reloaded = load(fresh, job.method, job.folder / "adapter").eval()(sample).logits
    if not torch.equal(reloaded, expected):
        apart = (reloaded - expected).abs().max().item()
        raise SystemExit(
            f"{job.method}: the saved adapter does not compute what was trained: reloaded into a "
            f"fresh model, logits differ by up to {apart:.3g} (training moved them by {moved:.3g})"
        )
    return {"bitwise_equal": True, "largest_change_of_a_logit": moved}
