"""The causal language model of two subjects: how it is read, and what it is not to lose."""

import hashlib
from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from secura_kernels.finetune.corpus import Corpus
from secura_kernels.finetune.downloads import cache_folder
from secura_kernels.finetune.smollm2 import smollm2_folder
from secura_kernels.finetune.wikipedia import wikipedia
from secura_kernels.train.own_text import ROWS, own_text

from . import language_retention
from .device import DEVICE, mixed_precision
from .language import encode
from .language_retention import save_in_one_step, weights_sha256
from .setup import Setup
from .unseen import jquery

OWN = "SmolLM2"
TOKENS = 4096  # of general text
LENGTH = 128  # of a row of it
PASSAGE_TOKENS = 2048
# Text beside what the model writes itself, none of it such as retention is measured on: articles of
# Wikipedia's other part, and another library than that whose scripts are measured.
PASSAGES: dict[str, Callable[[], str]] = {
    "wikipedia": lambda: wikipedia()["validation"],
    "javascript": jquery,
}
TARGETS = ("q_proj", "k_proj", "v_proj")
# Every linear layer of a block, as Llama and its like name them.
LAYERS = (*TARGETS, "o_proj", "gate_proj", "up_proj", "down_proj")


def load_causal_model(setup: Setup) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that ``setup`` names, or SmolLM2-135M-Instruct, in evaluation mode, and its
    tokenizer."""
    folder = setup.model or smollm2_folder()
    # Eager attention: of texts this short it is faster than the fused one on a CPU.
    base = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, setup.dtype),
        attn_implementation="eager" if DEVICE == "cpu" else None,
    )
    return base.to(DEVICE).eval(), AutoTokenizer.from_pretrained(folder)


@mixed_precision()
def general_text(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """What the base model writes itself, to calibrate by: no text of anybody else. Written once; it
    is kept in the cache."""
    made_from = f"chats and documents {weights_sha256(base)} {TOKENS} {tokenizer.chat_template}"
    key = hashlib.sha256(made_from.encode()).hexdigest()
    path = cache_folder() / f"own-text-{key[:16]}.safetensors"
    if not path.exists():
        written = own_text(base, TOKENS, tokenizer=tokenizer, length=LENGTH, progress=False)
        ids = torch.cat([batch["input_ids"].cpu() for batch in written])
        save_in_one_step(dict(ids=ids), path)
    return [dict(input_ids=ids) for ids in load_file(path)["ids"].split(ROWS)]


def passages(kind: str, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """2,048 tokens of a kind of ``PASSAGES``."""
    corpus = Corpus({kind: encode(tokenizer, PASSAGES[kind]())})
    rows = corpus.held_out(kind, LENGTH, PASSAGE_TOKENS)
    return [dict(input_ids=ids) for ids in rows.split(ROWS)]


class Speech:
    """How a model speaks, against its base.

    Attributes:
        shown: the measures for the tables.
    """

    def __init__(
        self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, general: str
    ) -> None:
        self.shown = "agreement", f"{general} kl", f"{general} perplexity"
        with mixed_precision():
            self.reference = language_retention.base_reference(base, tokenizer, general=general)

    @mixed_precision()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """As ``Reference.measure``, and before all others ``agreement``, the mean over the kinds
        of prompts."""
        measures = self.reference.measure(model)
        agreed = [value for name, value in measures.items() if name.endswith(" agreement")]
        return {"agreement": sum(agreed) / len(agreed)} | measures
