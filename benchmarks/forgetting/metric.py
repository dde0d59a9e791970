r"""What of the natural basis's metric does the work? One task, one seed, validation data.

    python benchmarks/forgetting/metric.py     # SmolLM2 on a CPU: an hour; goes on where it stopped

SmolLM2 learns Shakespeare for 24 steps between natural bases that were calibrated in one way or
another. The default is run at three rates, which give a curve of what is kept against what is
learned; each other way at one rate, beside that curve at equal learning.

Two ways are of another kind: the default at its highest rate, with what was learned multiplied by a
number after training.
"""

import itertools
import math
from dataclasses import replace
from unittest import mock

import torch
from study import subjects
from study.curves import whole
from study.language_retention import Reference, base_reference
from study.language_subject import GRADIENT_BATCHES, Language
from study.methods import METHODS
from study.protocol import FRESH, make_strategy, train
from study.records import Records
from study.search import SEQUENTIAL
from study.setup import Setup
from study.small_studies import arguments
from study.tables import table
from torch import nn

from secura_kernels import calibrate
from secura_kernels.train.adapted import calibrated_adapters
from secura_kernels.train.calibration import Calibration, natural, task_gate
from secura_kernels.train.own_text import own_text

METHOD = METHODS["CURLoRA, every layer, natural"]
STEPS, RATES, RATE, TOKENS = 24, (2.3e-3, 4e-3, 7e-3), 4e-3, 4096
DEFAULT = "default"
FIRST, LAST, OTHER = "first", "last", "other"  # batches of the task that calibration reads
# "rank", "damping" and "gated" are of ``calibrate``, the others of this file.
WAYS = {
    DEFAULT: dict(rates=RATES),
    "exact moments": dict(rank=1536),
    "gated": dict(gated=True, rates=(RATE, 7e-3)),
    "gated, log odds of 0 before a token is seen": dict(gated=True, prior=0.0),
    "gated, log odds of -4 before a token is seen": dict(gated=True, prior=-4.0),
    "diagonal moments": dict(rank=0),
    "damping 0.03": dict(damping=0.03),
    # The more damping, the more a rate learns.
    "damping 0.3": dict(damping=0.3, rates=(2.3e-3, RATE)),
    "damping 1": dict(damping=1.0, rates=(1.3e-3, 2.3e-3)),
    "damping 3": dict(damping=3.0, rates=(1.3e-3, 2.3e-3)),
    "gradient of all 24 batches": dict(batches=STEPS),
    "gradient of the last 8 batches": dict(read=LAST, rates=(2.3e-3, RATE)),
    "gradient of 8 other batches": dict(read=OTHER, rates=(2.3e-3, RATE)),
    "gated, gradient of 8 other batches": dict(gated=True, read=OTHER, rates=(2.3e-3, RATE)),
    "8 batches three times over": dict(epochs=3, rates=(2.3e-3, RATE)),
    "8 batches three times over, gradient of 8 others": dict(
        epochs=3, read=OTHER, rates=(2.3e-3, RATE)
    ),
    "range finder of 128 more directions": dict(oversampling=128),
    "512 tokens of general text": dict(tokens=TOKENS // 8),
    "2,048 tokens of general text": dict(tokens=TOKENS // 2),
    "8,192 tokens of general text": dict(tokens=2 * TOKENS),
    "16,384 tokens of general text": dict(tokens=4 * TOKENS),
    "C and R each turned at random": dict(turned=True, rates=(1.3e-3, RATE)),
    # The fewer layers, the higher the rate that learns as much.
    "queries, keys and values alone": dict(every_layer=False, rates=(1e-2, 2e-2)),
    # The lower the rank, the higher the rate that learns as much.
    "r = 16": dict(r=16, rates=(1e-2, 2e-2)),
    "r = 32": dict(r=32, rates=(6e-3, 1e-2)),
    "r = 128": dict(r=128, rates=(1.3e-3, 2.3e-3)),
    "shrunk to 0.8": dict(shrink=0.8, rates=RATES[-1:]),
    "shrunk to 0.6": dict(shrink=0.6, rates=RATES[-1:]),
}


def rates_of(way: str) -> tuple[float, ...]:
    return WAYS[way].get("rates", (RATE,))


class Trials:
    """Runs on one subject; what general text says is measured once for each size of the sums."""

    def __init__(self, subject: Language, reference: Reference) -> None:
        self.subject, self.reference = subject, reference
        self.kept: dict[tuple, Calibration] = {}

    def run(
        self,
        rate: float,
        r: int | None = None,
        batches: int = GRADIENT_BATCHES,
        read: str = FIRST,
        epochs: int = 1,
        oversampling: int = natural.OVERSAMPLING,
        tokens: int = TOKENS,
        shrink: float = 1.0,
        turned: bool = False,
        every_layer: bool = True,
        prior: float = task_gate.PRIOR,
        **settings,
    ) -> dict:
        subject, task = self.subject, self.subject.tasks[0]
        torch.manual_seed(0)
        method = replace(METHOD, every_layer=every_layer)
        if r is not None:
            method = replace(method, settings=method.settings | dict(r=r))
        model, trained_on = subject.model(method, 0), subject.batches(task, STEPS // epochs, 0)
        sample = subject.batches(task, batches, FRESH) if read == OTHER else trained_on
        sample = sample[-batches:] if read == LAST else sample[:batches]
        key = (tokens, every_layer, settings.get("rank"))
        keep = self.kept.get(key)
        with (
            mock.patch.object(natural, "OVERSAMPLING", oversampling),
            mock.patch.object(task_gate, "PRIOR", prior),
        ):
            self.kept[key] = calibrate(
                model,
                None if keep else self.text(tokens),
                sample,
                keep=keep,
                progress=False,
                **settings,
            )
        if turned:
            turn(model)
        strategy = make_strategy(SEQUENTIAL, method, subject, STEPS)
        if not train(model, subject, strategy, trained_on * epochs, rate, lambda: None):
            return dict(rate=rate, diverged=True)
        for adapter in calibrated_adapters(model):
            adapter.shrink(shrink)
        return dict(rate=rate, diverged=False) | subject.validated(model, self.reference)

    def text(self, tokens: int) -> list[dict]:
        if tokens == TOKENS:
            return self.subject.general_text()
        return list(
            own_text(
                self.subject.base, tokens, tokenizer=self.subject.tokenizer, seed=1, progress=False
            )
        )


@torch.no_grad()
def turn(model: nn.Module) -> None:
    """C <- C P and R <- Q R with orthogonal P and Q: the same spaces and the same metric, but an
    optimiser that scales each entry of the core sees other entries."""
    generator = torch.Generator().manual_seed(0)
    for adapter in calibrated_adapters(model):
        P, Q = (
            torch.linalg.qr(torch.randn(adapter.r, adapter.r, generator=generator)).Q
            for _ in range(2)
        )
        adapter.C.copy_(adapter.C @ P)
        adapter.R.copy_(Q @ adapter.R)


def main() -> None:
    options = arguments(__doc__, WAYS, "metric.json and metric.md")
    subject = subjects.load("language", Setup(precision="float32", model=options.model))
    records = Records(options.out / "metric.json", dict(subject=subject.identity, steps=STEPS), {})
    trials = Trials(subject, base_reference(subject.base, subject.tokenizer, "validation"))
    for way in options.way:
        for rate in rates_of(way):
            key = f"{way}, {rate:g}"
            if key not in records.by_key:
                settings = {k: v for k, v in WAYS[way].items() if k != "rates"}
                records.add(key, dict(way=way) | trials.run(rate, **settings))
    text = report(list(records.by_key.values()))
    (options.out / "metric.md").write_text(text + "\n")
    print(text)


def report(records: list[dict]) -> str:
    """A table; beside each way what the default keeps at equal learning, where its curve goes."""
    records = whole(records)
    curve = sorted(
        (r["perplexity"], r["agreement"], r["kl"]) for r in records if r["way"] == DEFAULT
    )
    rows = []
    for r in records:
        beside = None if r["way"] == DEFAULT else on_curve(curve, r["perplexity"])
        rows.append(
            [
                r["way"],
                f"{r['rate']:g}",
                f"{r['perplexity']:.1f}",
                f"{r['agreement']:.3f}",
                f"{r['kl']:.4f}",
                *(("", "") if beside is None else (f"{beside[0]:.3f}", f"{beside[1]:.4f}")),
            ]
        )
    return table(
        [
            "way",
            "rate",
            "perplexity",
            "agreement",
            "KL",
            "default's agreement there",
            "default's KL there",
        ],
        rows,
    )


def on_curve(
    curve: list[tuple[float, float, float]], perplexity: float
) -> tuple[float, float] | None:
    """Agreement and KL at a perplexity, between neighbours: straight in nats, KL in its log."""
    for (low, *kept), (high, *more) in itertools.pairwise(curve):
        if low <= perplexity <= high:
            part = math.log(perplexity / low) / math.log(high / low)
            return (kept[0] + part * (more[0] - kept[0]), kept[1] * (more[1] / kept[1]) ** part)
    return None


if __name__ == "__main__":
    main()
