r"""Does the size of the cores say how far the predictions have moved? Two runs, a table, a plot.

    python benchmarks/forgetting/prediction.py     # SmolLM2 on a CPU: half an hour

Each run's record is written as it ends; a stopped command goes on with the next one.

Shakespeare is learned between whitened and natural bases. Along the way ``core_size``, which costs
no pass of the model, stands beside ``base_kl``, measured on text of the model's own that
calibration did not see and on Wikipedia. At the end each of some layers' changes is measured alone,
to say whether one layer's prediction holds and what the layers' adding up makes of it.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from strategies import Strategy
from study import subjects
from study.language_subject import GRADIENT_BATCHES, Language
from study.methods import METHODS, Method
from study.protocol import train
from study.records import Records
from study.setup import Setup
from study.small_studies import RESULTS, drawn
from study.tables import table
from torch import nn

from secura_kernels import calibrate
from secura_kernels.train.retention import base_kl, core_size

RUNS = {basis: METHODS[f"CURLoRA, every layer, {basis}"] for basis in ("whitened", "natural")}
HELD_BACK = 1  # batch of own text, a quarter, that calibration does not see
EVERY = 3  # steps
ALONE = 24  # layers that are measured alone


class Watch(Strategy):
    """Measures along the way."""

    def __init__(self, texts: dict[str, list]) -> None:
        self.texts, self.rows, self.step = texts, [], 0

    def after_step(self, model: nn.Module) -> None:
        self.step += 1
        if self.step % EVERY == 0:
            self.rows.append(
                dict(step=self.step, size=core_size(model))
                | {name: base_kl(model, batches) for name, batches in self.texts.items()}
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--model", metavar="FOLDER", help="another than SmolLM2")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of prediction.json, .md and .png"
    )
    options = parser.parse_args()
    subject = subjects.load("language", Setup(precision="float32", model=options.model))
    study = dict(subject=subject.identity, steps=options.steps, rate=options.rate)
    records = Records(options.out / "prediction.json", study, {})
    for name, method in RUNS.items():
        if name not in records.by_key:
            records.add(name, run(subject, method, options))
    (options.out / "prediction.md").write_text(report(records.by_key) + "\n")
    draw(records.by_key, options.out / "prediction.png")
    print(report(records.by_key))


def run(subject: Language, method: Method, options: argparse.Namespace) -> dict:
    """One run's rows, and what layers do alone at its end."""
    torch.manual_seed(0)
    model, task = subject.model(method, 0), subject.tasks[0]
    batches = subject.batches(task, options.steps, 0)
    general = subject.general_text()
    calibrate(
        model,
        general[:-HELD_BACK],
        batches[:GRADIENT_BATCHES] if method.basis == "natural" else None,
        progress=False,
    )
    wikipedia = next(iter(subject.speech.reference.kinds.values())).ids
    texts = {
        "own text": general[-HELD_BACK:],
        "Wikipedia": [dict(input_ids=ids) for ids in wikipedia.split(8)],
    }
    watch = Watch(texts)
    train(model, subject, watch, batches, options.rate, lambda: None)
    return dict(
        rows=watch.rows,
        alone=alone(model, texts["own text"][:1]),
        perplexity=math.exp(-subject.learned(model, task, "validation")),
    )


@torch.no_grad()
def alone(model: nn.Module, text: list[dict]) -> dict[str, float]:
    """Of some layers: the sum of their sizes, that of the divergences of each one's change alone,
    and the divergence of all of theirs together."""
    layers = [m for m in model.modules() if hasattr(m, "secura_adapter")]
    chosen = random.Random(0).sample(layers, min(ALONE, len(layers)))
    cores = {m: m.secura_adapter["default"].core_parameter() for m in layers}
    before = {m: core.detach().clone() for m, core in cores.items()}

    def of(kept: list[nn.Module]) -> tuple[float, float]:
        for m, core in cores.items():
            core.copy_(before[m]) if m in kept else core.zero_()
        return core_size(model), base_kl(model, text)

    each = [of([m]) for m in chosen]
    together = of(chosen)
    of(layers)
    return dict(
        layers=len(chosen),
        size=sum(s for s, _ in each),
        alone=sum(kl for _, kl in each),
        together=together[1],
    )


def report(found: dict[str, dict]) -> str:
    lines = []
    for name, result in found.items():
        for row in result["rows"]:
            texts = [k for k in row if k not in ("step", "size")]
            lines.append(
                [
                    name,
                    str(row["step"]),
                    f"{row['size']:.2e}",
                    *(f"{row[t]:.2e} ({row[t] / row['size']:.0f} times)" for t in texts),
                ]
            )
    out = table(["basis", "step", "size of the cores", *texts], lines)
    for name, result in found.items():
        a = result["alone"]
        out += (
            f"\n\n{name}: {a['layers']} layers' changes, each alone, move the predictions "
            f"{a['alone'] / a['size']:.1f} times as far as their sizes say; together "
            f"{a['together'] / a['alone']:.1f} times as far as each alone, added up."
        )
    return out


def draw(found: dict[str, dict], path: Path) -> None:
    with drawn(path, (6, 5)) as axes:
        for (name, result), marker in zip(found.items(), "os", strict=True):
            rows = result["rows"]
            for text in (k for k in rows[0] if k not in ("step", "size")):
                axes.plot(
                    [r["size"] for r in rows],
                    [r[text] for r in rows],
                    marker=marker,
                    label=f"{name}: {text}",
                )
        axes.axline((1e-5, 1e-5), slope=1, color="black", linestyle=":", label="as predicted")
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="size of the cores, in nats a token",
            ylabel="measured KL from the base, in nats a token",
            title="Proportional while training goes on, but not equal",
        )


if __name__ == "__main__":
    main()
