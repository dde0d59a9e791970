"""The subject whose tasks are text domains: a causal language model."""

import copy
import math
import statistics
from functools import partial

import torch
from strategies import transformers_forward
from torch import Tensor, nn

from secura_kernels import calibrate
from secura_kernels.train.adapted import evaluating
from secura_kernels.train.calibration import Calibration

from . import hub_texts, language
from .causal_model import (
    LAYERS,
    OWN,
    TARGETS,
    Speech,
    general_text,
    load_causal_model,
    passages,
)
from .device import DEVICE, mixed_precision, on_device
from .language_retention import Reference, weights_sha256
from .methods import Method
from .protocol import Batch
from .setup import Setup, digest, title
from .unseen import unseen_reference

GRADIENT_BATCHES = 8  # of a task, whose gradient gives the natural basis


class Language:
    """By default SmolLM2, on Shakespeare, Python source and Middle English; it is not to forget how
    it speaks."""

    name = "language"
    log_likelihood = True
    head_rate = 0.0  # it has no heads
    forward = staticmethod(mixed_precision()(transformers_forward))

    def __init__(self, setup: Setup) -> None:
        self.base, tokenizer = load_causal_model(setup)
        self.tokenizer = tokenizer
        self.targets = setup.targets or TARGETS
        self.batch_size, self.length = setup.batch_size or 4, setup.length or 64
        self.labels = self.length - 1  # every token but the first
        found = [
            language.domain(name, tokenizer)
            if name in language.DOMAINS
            else hub_texts.hub_text_task(name, tokenizer)
            for name in setup.tasks or language.DOMAINS
        ]
        self.data = {task.name: task for task in found}
        self.tasks = tuple(self.data)
        self.title = title(setup.model or OWN, self.tasks)
        self.base_logs: dict[str | None, Tensor] = {}  # by the passages in the text
        self.of_general_text: dict[tuple, Calibration] = {}
        self.tokens = dict(validation=1024, test=1024 if setup.quick else 2048)
        self.speech = Speech(self.base, tokenizer, setup.general)
        with mixed_precision():
            self.unseen = None if setup.quick else unseen_reference(self.base, tokenizer)
        self.shown, self.before = self.speech.shown, self.retention(self.base)
        self.identity = digest(
            2,
            self.batch_size,
            self.length,
            self.tokens,
            [task.sha256 for task in found],
            weights_sha256(self.base),
            *setup.choices(),
        )

    def model(self, method: Method, seed: int) -> nn.Module:
        def task() -> list[Batch]:
            return self.batches(self.tasks[0], GRADIENT_BATCHES, 1000 * seed)

        general = partial(self.general_text, method.passages)
        base = copy.deepcopy(self.base)
        return method.attach(base, self.targets, LAYERS, seed, general, task)

    def calibrate(
        self,
        model: nn.Module,
        method: Method,
        sample: list[Batch],
        before: Calibration | None,
        finished: list[Batch],
    ) -> Calibration:
        if method.basis == "whitened":
            return before or calibrate(
                model, self.general_text(method.passages), progress=False, **method.metric
            )
        # What general text says of the base is the same in every run with the same layers.
        layers, settings = LAYERS if method.every_layer else self.targets, dict(method.metric)
        key = (*layers, settings.get("rank"), method.passages)
        keep = before or self.of_general_text.get(key)
        general = None if keep else self.general_text(method.passages)
        if before and method.keeps_tasks:
            general = finished
        found = calibrate(
            model, general, sample[:GRADIENT_BATCHES], keep=keep, progress=False, **settings
        )
        if keep is None:
            self.of_general_text[key] = found
        return found

    @torch.no_grad()
    @mixed_precision()
    def general_rows(self, method: Method, predictions: bool) -> dict[str, Tensor]:
        general = self.general_text(method.passages)
        ids = torch.cat([batch["input_ids"] for batch in general])
        ids = ids[:, : ids.shape[1] // self.length * self.length].reshape(-1, self.length)
        if not predictions:
            return dict(ids=ids)
        if method.passages not in self.base_logs:
            self.base_logs[method.passages] = torch.cat(
                [
                    self.base(input_ids=part).logits.float().log_softmax(-1).bfloat16().cpu()
                    for part in ids.split(8)
                ]
            )
        return dict(ids=ids, logs=self.base_logs[method.passages])

    def general_text(self, kind: str | None = None) -> list[Batch]:
        """What the base model wrote, and passages of a ``kind``."""
        own = general_text(self.base, self.tokenizer)
        found = own + passages(kind, self.tokenizer) if kind else own
        return [on_device(batch) for batch in found]

    def heads(self, model: nn.Module) -> list[nn.Parameter]:
        return []

    def batches(self, task: str, steps: int, seed: int) -> list[Batch]:
        windows = self.data[task].batches(steps, self.batch_size, self.length, seed)
        return [on_device(dict(input_ids=ids, labels=ids)) for ids in windows]

    def end(self, model: nn.Module, task: str) -> None:
        """Nothing: the tasks share all there is."""

    @torch.no_grad()
    @mixed_precision()
    def learned(self, model: nn.Module, task: str, part: str) -> float:
        """Mean log-likelihood of a token, in nats: minus the logarithm of the perplexity."""
        losses: list[Tensor] = []
        windows = self.data[task].held_out(part, self.length, self.tokens[part]).to(DEVICE)
        with evaluating(model):
            for ids in windows.split(8):
                losses.append(model(input_ids=ids, labels=ids).loss * len(ids))
        return -float(torch.stack(losses).sum() / len(windows))

    def validated(self, model: nn.Module, reference: Reference) -> dict[str, float]:
        """Of a model that has learned the first task: its perplexity on validation data, and over
        the kinds of ``reference`` the means of agreement and KL."""
        found = reference.measure(model)
        of_kinds = {
            measure: statistics.mean(v for k, v in found.items() if k.endswith(measure))
            for measure in ("agreement", "kl")
        }
        learned = self.learned(model, self.tasks[0], "validation")
        return dict(perplexity=math.exp(-learned)) | of_kinds

    @mixed_precision()
    def retention(self, model: nn.Module) -> dict[str, float]:
        return self.speech.measure(model) | (self.unseen.measure(model) if self.unseen else {})
