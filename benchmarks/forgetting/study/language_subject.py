"""The subject whose tasks are text domains: a causal language model."""

import copy

import torch
from smollm2 import smollm2_folder
from strategies import transformers_forward
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from secura_kernels.retention import evaluating

from . import hub_texts, language, language_retention
from .device import DEVICE, mixed_precision, on_device
from .methods import Method
from .protocol import Batch
from .setup import Setup, digest

# Every linear layer of a block, as Llama and its like name them.
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load_language_model(setup: Setup) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that ``setup`` names, or SmolLM2-135M-Instruct, in evaluation mode, and its
    tokenizer."""
    folder = setup.model or smollm2_folder()
    # Eager attention: of texts this short it is faster than the fused one on a CPU.
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, setup.dtype),
        attn_implementation="eager" if DEVICE == "cpu" else None)
    return base.to(DEVICE).eval(), AutoTokenizer.from_pretrained(folder)


def mean_agreement(measures: dict[str, float]) -> dict[str, float]:
    """The measures with ``agreement``, the mean over the kinds of prompts, before them."""
    agreed = [value for name, value in measures.items() if name.endswith(" agreement")]
    return {"agreement": sum(agreed) / len(agreed)} | measures


class Language:
    """By default SmolLM2, on Shakespeare, Python source and Middle English; it is not to forget how
    it speaks."""

    name = "language"
    targets = ("q_proj", "k_proj", "v_proj")
    log_likelihood = True
    head_rate = 0.0  # it has no heads
    forward = staticmethod(mixed_precision()(transformers_forward))

    def __init__(self, setup: Setup) -> None:
        self.base, tokenizer = load_language_model(setup)
        self.targets = setup.targets or self.targets
        self.batch_size, self.length = setup.batch_size or 4, setup.length or 64
        found = [language.domain(name, tokenizer) if name in language.DOMAINS else
                 hub_texts.hub_text_task(name, tokenizer)
                 for name in setup.tasks or language.DOMAINS]
        self.data = {task.name: task for task in found}
        self.tasks = tuple(self.data)
        self.tokens = dict(validation=1024, test=1024 if setup.quick else 2048)
        self.shown = "agreement", f"{setup.general} kl", f"{setup.general} perplexity"
        with mixed_precision():
            self.reference = language_retention.base_reference(
                self.base, tokenizer, general=setup.general)
        self.before = self.retention(self.base)
        self.identity = digest(2, self.batch_size, self.length, self.tokens,
                               [task.sha256 for task in found],
                               language_retention.weights_sha256(self.base))

    def model(self, method: Method, seed: int) -> nn.Module:
        targets = LAYERS if method.every_layer else self.targets
        return method.attach(copy.deepcopy(self.base), list(targets), seed)

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

    @mixed_precision()
    def retention(self, model: nn.Module) -> dict[str, float]:
        return mean_agreement(self.reference.measure(model))
