"""The two models that are studied, each with its tasks, its batches and its measures."""

import copy
import hashlib
import math
from dataclasses import replace
from functools import partial

import torch
from strategies import transformers_forward
from torch import Tensor, nn

from secura_kernels.checks import check_choice

from .methods import Method
from .protocol import Batch, Subject

NAMES = ("minilm", "smollm2")
FORMAT = 1  # of a subject's measures: raise it where they change, so that no record is reused


class Encoder:
    """MiniLM: tweets, newsgroups, Reuters; it is not to forget what texts and words are alike."""

    name = "minilm"
    targets = ("query", "key", "value")
    forward = staticmethod(transformers_forward)

    def __init__(self, quick: bool) -> None:
        from . import classification, embedding_retention, encoder

        self.encoder = encoder
        self.base, self.tokenizer = encoder.load_encoder(encoder.minilm_folder())
        found = (classification.tweets(), classification.newsgroups(), classification.reuters())
        self.data = {task.name: task for task in found}
        self.tasks = tuple(self.data)
        self.batch_size, self.rows = (16, 400) if quick else (32, 2000)
        texts = embedding_retention.retention_texts()
        if quick:  # every fourth document: as many of each class
            texts = replace(texts, documents=texts.documents[::4], classes=texts.classes[::4])
        self.texts = embedding_retention.EmbeddingRetention(texts, self._embed(self.base))
        self.before = self.texts.measure(self._embed(self.base))
        self.identity = _digest(FORMAT, self.batch_size, self.rows, encoder.MAX_TOKENS,
                                [[task.train, task.validation, task.test] for task in found],
                                texts.documents, encoder.WHEEL_SHA256)

    def _embed(self, model: nn.Module):
        return partial(self.encoder.embed, model, self.tokenizer)

    def model(self, method: Method, seed: int) -> nn.Module:
        body = method.attach(copy.deepcopy(self.base), list(self.targets), seed)
        torch.manual_seed(seed)
        return self.encoder.EncoderClassifier(
            body, {name: len(task.labels) for name, task in self.data.items()})

    def trained(self, model: nn.Module) -> int:
        return sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)

    def batches(self, task: str, steps: int, seed: int) -> list[Batch]:
        """Random rows of the training part, none twice before all have come."""
        rows = self.data[task].train
        generator = torch.Generator().manual_seed(seed)
        passes = math.ceil(steps * self.batch_size / len(rows))
        order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(passes)])
        return [self.encoder.batch_of(self.tokenizer, [rows[i] for i in part.tolist()],
                                      self.tasks.index(task))
                for part in order[:steps * self.batch_size].split(self.batch_size)]

    def end(self, model: nn.Module, task: str) -> None:
        """The task's head trains no more."""
        model.freeze_head(task)

    def learned(self, model: nn.Module, task: str, part: str) -> float:
        """Accuracy."""
        rows = getattr(self.data[task], part)[:self.rows]
        return self.encoder.accuracy(model, self.tokenizer, rows, task)

    def retention(self, model: nn.Module) -> dict[str, float]:
        return self.texts.measure(self._embed(model.encoder))


class Language:
    """SmolLM2: Shakespeare, Python source, a third domain; it is not to forget how it answers."""

    name = "smollm2"
    targets = ("q_proj", "k_proj", "v_proj")
    forward = staticmethod(transformers_forward)
    batch_size, length = 4, 128

    def __init__(self, quick: bool) -> None:
        from smollm2 import smollm2_folder
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from . import language, language_retention

        folder = smollm2_folder()
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = [language.domain(name, tokenizer) for name in language.DOMAINS]
        self.data = {task.name: task for task in found}
        self.tasks = tuple(self.data)
        self.tokens = 2048 if quick else 16384
        self.reference = language_retention.base_reference(
            self.base, tokenizer, tokens=2048 if quick else 8192)
        self.before = self.retention(self.base)
        self.identity = _digest(FORMAT, self.batch_size, self.length, self.tokens,
                                [task.sha256 for task in found],
                                language_retention.weights_sha256(self.base))

    def model(self, method: Method, seed: int) -> nn.Module:
        return method.attach(copy.deepcopy(self.base), list(self.targets), seed)

    def trained(self, model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def batches(self, task: str, steps: int, seed: int) -> list[Batch]:
        windows = self.data[task].batches(steps, self.batch_size, self.length, seed)
        return [dict(input_ids=ids, labels=ids) for ids in windows]

    def end(self, model: nn.Module, task: str) -> None:
        """Nothing: the tasks share all there is."""

    @torch.no_grad()
    def learned(self, model: nn.Module, task: str, part: str) -> float:
        """Mean log-likelihood of a token, in nats: minus the logarithm of the perplexity."""
        model.eval()
        losses: list[Tensor] = []
        windows = self.data[task].held_out(part, self.length, self.tokens)
        for ids in windows.split(self.batch_size):
            losses.append(model(input_ids=ids, labels=ids).loss * len(ids))
        return -float(torch.stack(losses).sum() / len(windows))

    def retention(self, model: nn.Module) -> dict[str, float]:
        """``agreement``, the mean over the kinds of prompts, first: more is better."""
        found = self.reference.measure(model)
        agreed = [value for name, value in found.items() if name.endswith(" agreement")]
        return {"agreement": sum(agreed) / len(agreed)} | found


def load(name: str, quick: bool) -> Subject:
    """The subject of this name, with everything it needs fetched and read."""
    check_choice("subject", name, NAMES)
    return (Encoder if name == "minilm" else Language)(quick)


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:20]
