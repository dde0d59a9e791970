"""How far a tuned language model is from its base on general prompts, by kind of prompt.

Wikipedia passages, and three kinds of chat whose answers are the base model's own. For each kind,
over the tokens that are scored (all but the first of a passage, or those of an answer):

- perplexity: exp of the mean of -log q(token), q the tuned model;
- kl: the mean of KL(p || q) in nats, p the base model, on the partition below;
- agreement: the part of the tokens at which p's likeliest next token is q's, or one of q's where
  several are as likely, as happens in bfloat16.

The partition of the vocabulary at a position: the base model's k likeliest tokens, each for itself,
and all others as one. Summing probabilities over the cells of any partition cannot raise the KL
divergence, by the log-sum inequality (Cover and Thomas, Elements of Information Theory, 2.7.1), so

    KL_k = sum_{i in top} p_i (log p_i - log q_i) + p_rest (log p_rest - log q_rest) <= KL(p || q)

with equality where q / p is constant over the rest. So k + 1 numbers a position are all that is
kept of the base model, k = 64 of SmolLM2's 49,152: 2.5 MB, not 0.6 GB. Measured after 15 steps of
Shakespeare, KL_k is 84 % of the whole on Wikipedia, 93 to 97 % on chat, in 0.4 times the time of
running the base model beside. And where weights were merged, or trained without adapters, there is
no base model left to run.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from strategies.base import wide
from torch import Tensor, nn

from secura_kernels.checks import check_choice, check_int, fail
from secura_kernels.finetune.corpus import Corpus
from secura_kernels.finetune.downloads import cache_folder
from secura_kernels.finetune.wikipedia import wikipedia
from secura_kernels.train.adapted import evaluating

from .hub_texts import HUB_TEXTS, hub_text
from .language import Tick, encode

TOP = 64
FIELDS = ("ids", "scored", "top_ids", "top_logs", "rest_logs")


@dataclass(frozen=True, eq=False)
class Passages:
    """Token rows of one kind, padded on the right, where a causal model does not see it.

    Attributes:
        ids: (rows, length) int64. scored: (rows, length - 1) bool, which predictions count: the one
            at a position is of the token after it.
    """

    ids: Tensor
    scored: Tensor

    def __post_init__(self):
        rows, length = self.ids.shape
        if self.scored.shape != (rows, length - 1) or not self.scored.any():
            raise fail("scored", self.scored, f"{(rows, length - 1)} with one True at least")


@dataclass(frozen=True, eq=False)
class Kept(Passages):
    """Passages with what is kept of the base model's predictions at their scored tokens.

    Attributes:
        top_ids: (tokens, k) int64, its likeliest next tokens, the likeliest first. top_logs:
            (tokens, k), their log-probabilities, in at least float32. rest_logs: (tokens,), the
            log of the probability of all others together.
    """

    top_ids: Tensor
    top_logs: Tensor
    rest_logs: Tensor


@dataclass(frozen=True, eq=False)
class Reference:
    """What tuned models are measured against: kept predictions by kind."""

    kinds: dict[str, Kept]

    @classmethod
    def of(
        cls,
        base: nn.Module,
        kinds: Mapping[str, Passages],
        k: int = TOP,
        batch_size: int = 8,
        tick: Tick = lambda: None,
    ) -> "Reference":
        """Of a base model in evaluation mode; ``tick`` follows each batch."""
        return cls(
            {name: _kept(base, passages, k, batch_size, tick) for name, passages in kinds.items()}
        )

    def measure(
        self, model: nn.Module, batch_size: int = 8, tick: Tick = lambda: None
    ) -> dict[str, float]:
        """{"<kind> perplexity", "<kind> kl", "<kind> agreement"}, in evaluation mode; the model's
        mode stays as it is. ``tick`` follows each batch.

        The base model itself has kl 0 and agreement 1, exactly at the batch size of ``of`` and the
        same device, else to rounding.
        """
        return {
            f"{name} {measure}": value
            for name, kept in self.kinds.items()
            for measure, value in _measured(model, kept, batch_size, tick).items()
        }

    def save(self, path: Path, key: str) -> None:
        """As safetensors, in one step; ``key``: what it was made from."""
        tensors = {
            f"{kind}.{field}": getattr(kept, field).contiguous()
            for kind, kept in self.kinds.items()
            for field in FIELDS
        }
        save_in_one_step(tensors, path, {"key": key, "kinds": "\n".join(self.kinds)})

    @classmethod
    def load(cls, path: Path, key: str) -> "Reference":
        """Raises ValueError where the file was made from something else than ``key`` says."""
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            if found.get("key") != key:
                raise fail("path", str(path), f"a reference made from {key}")
            return cls(
                {
                    kind: Kept(*(file.get_tensor(f"{kind}.{field}") for field in FIELDS))
                    for kind in found["kinds"].split("\n")
                }
            )


def save_in_one_step(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file that is there whole or not at all, also where others write it too."""
    unfinished = path.with_name(f".{path.name}-{os.getpid()}")
    save_file(tensors, unfinished, metadata)
    os.replace(unfinished, path)


def base_reference(
    base: nn.Module,
    tokenizer,
    part: str = "test",
    *,
    general: str = "wikipedia",
    seq_len: int = 128,
    tokens: int = 2048,
    answer: int = 48,
    batch_size: int = 8,
    folder: Path | None = None,
    tick: Tick = lambda: None,
) -> Reference:
    """The reference of a base model without adapters, on general prompts of four kinds.

    ``general``, "wikipedia" (finetune/wikipedia.py) or one of ``HUB_TEXTS``: windows of ``seq_len``
    tokens, about ``tokens`` in all, of its part "validation" or "test". The kinds of ``CHAT``, if
    the tokenizer has a chat template: each prompt in it and the base's greedy answer of at most
    ``answer`` tokens, which alone is scored.

    Made once: it is kept in ``folder`` (the cache) under a hash of weights, prompts, sizes and how
    the model computes: autocast and attention.
    ``tick`` follows each batch. Raises DownloadError if Wikipedia's text cannot be fetched.
    """
    check_choice("part", part, ("validation", "test"))
    check_int("answer", answer, 1, 2**31 - 1)
    check_choice("general", general, ("wikipedia", *HUB_TEXTS))
    text = encode(tokenizer, (wikipedia() if general == "wikipedia" else hub_text(general))[part])
    check_int("seq_len", seq_len, 2, len(text), f", the tokens in the {part} part of {general}")
    windows = Corpus({general: text}).held_out(general, seq_len, tokens)
    chats = {
        kind: [chat_ids(tokenizer, prompt) for prompt in prompts]
        for kind, prompts in (CHAT if tokenizer.chat_template else {}).items()
    }
    device = next(base.parameters()).device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    attention = base.config._attn_implementation  # changes bits, and so makes a distance of its own
    sizes = f"{general} {windows.tolist()} {chats} {answer} {TOP} {batch_size}"
    made_from = f"{weights_sha256(base)} {sizes} {precision} {attention}"
    key = hashlib.sha256(made_from.encode()).hexdigest()
    path = (folder or cache_folder()) / f"language-retention-{key[:16]}.safetensors"
    if path.exists():
        return Reference.load(path, key)
    kinds = {general: Passages(windows, torch.ones_like(windows[:, 1:], dtype=torch.bool))}
    for kind, prompts in chats.items():
        kinds[kind] = answered(base, prompts, answer, tokenizer.eos_token_id, batch_size, tick)
    reference = Reference.of(base, kinds, TOP, batch_size, tick)
    reference.save(path, key)
    return reference


def chat_ids(tokenizer, prompt: str) -> list[int]:
    """A user's message in the chat template, up to where the answer starts."""
    if not tokenizer.chat_template:
        raise fail("tokenizer", type(tokenizer).__name__, "one with a chat template")
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def answered(
    base: nn.Module,
    prompts: list[list[int]],
    length: int,
    end: int,
    batch_size: int,
    tick: Tick = lambda: None,
) -> Passages:
    """Each prompt with the model's greedy answer: at most ``length`` tokens, up to and with the
    token ``end``. The answers' tokens are scored."""
    device = next(base.parameters()).device
    rows: list[tuple[list[int], int]] = []
    with evaluating(base):
        for i in range(0, len(prompts), batch_size):
            batch = prompts[i : i + batch_size]
            longest = max(map(len, batch))
            # generate() continues rows at their right end, so here padding is on the left.
            ids = torch.tensor([[end] * (longest - len(p)) + p for p in batch], device=device)
            mask = torch.tensor(
                [[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=device
            )
            out = base.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=length,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
            )
            for prompt, new in zip(batch, out[:, longest:].tolist(), strict=True):
                stop = new.index(end) + 1 if end in new else len(new)
                rows.append((prompt + new[:stop], len(prompt)))
            tick()
    longest = max(len(row) for row, _ in rows)
    ids = torch.tensor([row + [end] * (longest - len(row)) for row, _ in rows])
    place = torch.arange(longest - 1)
    scored = torch.stack([(place >= start - 1) & (place < len(row) - 1) for row, start in rows])
    return Passages(ids, scored)


def weights_sha256(model: nn.Module) -> str:
    """Of the names, dtypes, shapes and bytes of a model's state."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _kept(base: nn.Module, passages: Passages, k: int, batch_size: int, tick: Tick) -> Kept:
    cells = []
    for logits, _ in _predictions(base, passages, batch_size, tick):
        check_int("k", k, 1, logits.shape[-1] - 1, ", less than the vocabulary")
        top_ids = logits.topk(k).indices
        cells.append([part.cpu() for part in (top_ids, *_cells(logits, top_ids))])
    return Kept(passages.ids, passages.scored, *map(torch.cat, zip(*cells, strict=True)))


def _measured(model: nn.Module, kept: Kept, batch_size: int, tick: Tick) -> dict[str, float]:
    sums = torch.zeros(3, dtype=torch.float64)
    done = 0
    for logits, targets in _predictions(model, kept, batch_size, tick):
        of = slice(done, done := done + len(logits))
        top_ids, p_top, p_rest = (
            part[of].to(logits.device) for part in (kept.top_ids, kept.top_logs, kept.rest_logs)
        )
        q_top, q_rest = _cells(logits, top_ids)
        kl = (p_top.exp() * (p_top - q_top)).sum(-1) + p_rest.exp() * (p_rest - q_rest)
        same = logits.gather(-1, top_ids[:, :1])[:, 0] == logits.amax(-1)
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        sums += torch.stack([loss, kl.sum(), same.sum()]).cpu()
    loss, kl, same = sums / done
    return {"perplexity": loss.exp().item(), "kl": kl.item(), "agreement": same.item()}


def _cells(logits: Tensor, top_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the partition's cells, (tokens, k) and (tokens,): the rest's own
    logsumexp, since 1 - sum(top) would lose all digits of a small rest."""
    whole = logits.logsumexp(-1)
    rest = logits.scatter(-1, top_ids, -torch.inf).logsumexp(-1)
    return logits.gather(-1, top_ids) - whole[:, None], rest - whole


@torch.no_grad()
def _predictions(
    model: nn.Module, passages: Passages, batch_size: int, tick: Tick
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each batch of rows the logits (tokens, vocabulary), in at least float32, at what is
    scored, and the tokens (tokens,) that came next."""
    device = next(model.parameters()).device
    with evaluating(model):
        for ids, scored in zip(
            passages.ids.split(batch_size), passages.scored.split(batch_size), strict=True
        ):
            ids, scored = ids.to(device), scored.to(device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1][scored]
            yield wide(logits), ids[:, 1:][scored]
            tick()


# No code, which is a domain that is learned.
CHAT = {
    "questions": (
        "What is the capital of Australia?",
        "Why is the sky blue?",
        "Who was Marie Curie?",
        "What does a vaccine do?",
        "How do plants make their food?",
        "What causes the seasons on Earth?",
        "Name three planets that are larger than Earth.",
        "What is the boiling point of water, and why does it change with altitude?",
        "What is inflation in economics?",
        "Which languages are spoken in Switzerland?",
    ),
    "writing": (
        "Write a short poem about the first snow of winter.",
        "Write an email asking a colleague to move a meeting to Friday.",
        "Describe a busy market in the morning.",
        "Write the opening of a story about a lighthouse keeper.",
        "Write a thank-you note to a teacher.",
        "Give me a simple recipe for tomato soup.",
        "Rewrite this politely: Send me the report now.",
        "Summarize: The bridge was closed for a month because two of its cables had rusted.",
        "Translate into French: Good morning, where is the station?",
        "List five things to pack for a hiking trip.",
    ),
    "reasoning": (
        "A shop sells pens at 3 dollars each. How much do 7 pens cost?",
        "Tom is older than Ann, and Ann is older than Ben. Who is the youngest?",
        "If a train travels 60 miles in an hour, how far does it go in 4 hours?",
        "Which is heavier, a kilogram of iron or a kilogram of feathers? Explain.",
        "I have 12 apples and give away a third of them. How many are left?",
        "All cats are animals. Felix is a cat. What follows?",
        "Is 51 a prime number? Explain your answer.",
        "It is Tuesday today. What day will it be in 10 days?",
        "A glass falls off a table onto a stone floor. What probably happens, and why?",
        "Should you bring an umbrella if the forecast says 90 percent rain? Why?",
    ),
}
