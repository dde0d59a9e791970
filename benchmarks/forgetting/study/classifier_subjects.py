"""Subjects whose tasks are classifications: a shared model, and a head a task."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from strategies import transformers_forward
from torch import nn

from secura_kernels.checks import check_choice

from . import classification, embedding_retention, encoder, hub_tasks
from .causal_model import LAYERS, OWN, TARGETS, Speech, load_causal_model
from .decoder import DecoderClassifier
from .device import DEVICE, mixed_precision, on_device
from .language_retention import weights_sha256
from .methods import Method
from .protocol import Batch
from .setup import Setup, digest, title

TASKS = {
    "tweets": classification.tweets,
    "newsgroups": classification.newsgroups,
    "reuters": classification.reuters,
    "mrpc": hub_tasks.mrpc,
    "sst2": hub_tasks.sst2,
    "sentiment140": hub_tasks.sentiment140,
}


class Headed:
    """What the two share. A subclass sets ``base``, ``tokenizer`` and ``before``, and measures
    retention."""

    own_model: str
    targets: Sequence[str]
    layers: Sequence[str]  # every linear layer of a block
    classifier: type[encoder.EncoderClassifier]
    head_rate: float
    batch_size: int
    log_likelihood = False
    labels = 1
    own_tasks = ("tweets", "newsgroups", "reuters")
    forward = staticmethod(mixed_precision()(transformers_forward))

    def __init__(self, setup: Setup) -> None:
        names = self.own_tasks if setup.tasks is None else setup.tasks
        self.data = {name: TASKS[check_choice("task", name, TASKS)]() for name in names}
        self.tasks = tuple(self.data)
        self.title = title(setup.model or self.own_model, self.tasks)
        self.targets = setup.targets or self.targets
        self.batch_size = setup.batch_size or self.batch_size
        self.rows = dict(validation=300, test=400 if setup.quick else 1000)

    def parts(self) -> list:
        return [[task.train, task.validation, task.test] for task in self.data.values()]

    def model(self, method: Method, seed: int) -> nn.Module:
        body = method.attach(copy.deepcopy(self.base), self.targets, self.layers, seed)
        torch.manual_seed(seed)
        labels = {name: len(task.labels) for name, task in self.data.items()}
        return self.classifier(body, labels).to(DEVICE)

    def heads(self, model: nn.Module) -> list[nn.Parameter]:
        return list(model.heads.parameters())

    def batches(self, task: str, steps: int, seed: int) -> list[Batch]:
        """Random rows of the training part, none twice before all have come."""
        rows = self.data[task].train
        generator = torch.Generator().manual_seed(seed)
        passes = math.ceil(steps * self.batch_size / len(rows))
        order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(passes)])
        number = self.tasks.index(task)
        return [
            on_device(encoder.batch_of(self.tokenizer, [rows[i] for i in part.tolist()], number))
            for part in order[: steps * self.batch_size].split(self.batch_size)
        ]

    def end(self, model: nn.Module, task: str) -> None:
        """The task's head trains no more."""
        model.freeze_head(task)

    @mixed_precision()
    def learned(self, model: nn.Module, task: str, part: str) -> float:
        """Accuracy."""
        rows = getattr(self.data[task], part)[: self.rows[part]]
        return encoder.accuracy(model, self.tokenizer, rows, task)


class Encoder(Headed):
    """MiniLM: it is not to forget what texts and words are alike."""

    name, own_model = "encoder", "MiniLM"
    targets = ("query", "key", "value")
    layers = (*targets, "dense")
    shown = ("retrieval", "drift", "wordsim353", "simlex999")
    classifier = encoder.EncoderClassifier
    head_rate = 3e-2
    batch_size = 16

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        length = setup.length or encoder.MAX_TOKENS
        if setup.model:
            base, self.tokenizer = encoder.load_hub_encoder(setup.model, length, setup.dtype)
            weights = weights_sha256(base)
        else:
            base, self.tokenizer = encoder.load_encoder(encoder.minilm_folder(), length)
            weights = encoder.WHEEL_SHA256
        self.base = base.to(DEVICE)
        texts = embedding_retention.retention_texts()
        if setup.quick:  # every fourth document: as many of each class
            texts = replace(texts, documents=texts.documents[::4], classes=texts.classes[::4])
        with mixed_precision():
            self.texts = embedding_retention.EmbeddingRetention(texts, self._embed(self.base))
        self.before = self._retention(self.base)
        self.identity = digest(
            2,
            self.head_rate,
            self.batch_size,
            self.rows,
            length,
            self.parts(),
            texts.documents,
            weights,
            *setup.choices(),
        )

    def _embed(self, model: nn.Module):
        return partial(encoder.embed, model, self.tokenizer)

    def retention(self, model: nn.Module) -> dict[str, float]:
        return self._retention(model.body)

    @mixed_precision()
    def _retention(self, body: nn.Module) -> dict[str, float]:
        return self.texts.measure(self._embed(body))


class Decoder(Headed):
    """A causal language model, by default SmolLM2: it is not to forget how it speaks."""

    name, own_model = "decoder", OWN
    targets, layers = TARGETS, LAYERS
    classifier = DecoderClassifier
    head_rate = 3e-3
    batch_size = 8

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.base, self.tokenizer = load_causal_model(setup)
        length = setup.length or encoder.MAX_TOKENS
        self.tokenizer.model_max_length = length
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.speech = Speech(self.base, self.tokenizer, setup.general)
        self.shown, self.before = self.speech.shown, self.speech.measure(self.base)
        self.identity = digest(
            1,
            self.head_rate,
            self.batch_size,
            self.rows,
            length,
            self.parts(),
            weights_sha256(self.base),
            *setup.choices(),
        )

    def retention(self, model: nn.Module) -> dict[str, float]:
        return self.speech.measure(model.body)
