"""General text that a language model writes itself, so that nobody needs its former data."""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checks import check_int, fail

ROWS = 8  # of a batch that is handed on, whose logits take memory
BETWEEN = "<|endoftext|>"
MARK = "\N{SECTION SIGN}content\N{SECTION SIGN}"


@torch.no_grad()
def own_text(
    model: nn.Module,
    tokens: int = 4096,
    *,
    tokenizer=None,
    length: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[dict]:
    """Samples text from ``model``, at temperature 1 and from all of its vocabulary.

    A chat model is given its template up to where a user's message starts, and writes the message,
    the answer and what follows; in half of the rows the start of a document, as in its pretraining,
    so that what it knows beside chat is in the text too. A base model writes documents alone. It
    does not stop at the end of a text.

    Args:
        model: with ``generate`` of transformers. tokens: how many in all, rounded up to rows.
        tokenizer: whose chat template and start of a document are used; None, or one without a
            template: no chat.
        length: tokens a row. batch_size: rows written at once. seed: of the sampling.

    Yields:
        dicts of ``input_ids`` (8 rows or fewer, length) and ``attention_mask`` of ones.

    Raises:
        ValueError: a model that cannot generate or says no first token.
    """
    check_int("tokens", tokens, 1, 2**31)
    check_int("length", length, 2, 2**31)
    check_int("batch_size", batch_size, 1, 2**31)
    if not hasattr(model, "generate"):
        raise fail("general", None, f"batches of text: a {type(model).__name__} cannot generate")
    device, starts = next(model.parameters()).device, _starts(model, tokenizer)
    sizes = [min(batch_size, rows) for rows in range(-(-tokens // length), 0, -batch_size)]
    devices = [device] if device.type == "cuda" else []
    for i, rows in enumerate(
        tqdm(sizes, desc="write", unit="batch", disable=not progress, file=sys.stderr)
    ):
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed + i)
            parts = [
                _written(
                    model,
                    start,
                    rows * (i + 1) // len(starts) - rows * i // len(starts),
                    length,
                    device,
                )
                for i, start in enumerate(starts)
            ]
        for part in torch.cat(parts).split(ROWS):
            yield dict(input_ids=part, attention_mask=torch.ones_like(part))


def _written(
    model: nn.Module, start: list[int], rows: int, length: int, device: torch.device
) -> Tensor:
    """(rows, length), each from ``start`` on."""
    ids = torch.tensor(start[:length], device=device).expand(rows, -1)
    if not rows or len(start) >= length:
        return ids if rows else ids.new_empty(0, length)
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=start[0],
        max_new_tokens=length - len(start),
        use_cache=True,
    )


def _starts(model: nn.Module, tokenizer) -> list[list[int]]:
    """The tokens that come before a chat and before a document."""
    starts = [[_document_start(model, tokenizer)]]
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
        starts.append(tokenizer(text.split(MARK)[0], add_special_tokens=False)["input_ids"])
    return starts


def _document_start(model: nn.Module, tokenizer) -> int:
    """The token between the documents of the pretraining, where the vocabulary has one by its
    usual name: a chat model's first token may be that of a turn. Else the model's first token."""
    if tokenizer is not None and BETWEEN in tokenizer.get_vocab():
        return tokenizer.get_vocab()[BETWEEN]
    config = getattr(model, "generation_config", None)
    for name in ("bos_token_id", "decoder_start_token_id", "eos_token_id"):
        found = getattr(config, name, None)
        if isinstance(found, Tensor | list):
            found = int(found[0])
        if found is not None:
            return found
    raise fail(
        "general", None, "batches of text: the model's generation_config names no first token"
    )
