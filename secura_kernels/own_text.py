"""General text that a language model writes itself, so that nobody needs its former data."""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .checks import check_int, fail

ROWS = 8  # of a batch that is handed on, whose logits take memory
MARK = "\N{SECTION SIGN}content\N{SECTION SIGN}"


@torch.no_grad()
def own_text(model: nn.Module, tokens: int = 4096, *, tokenizer=None, length: int = 128,
             batch_size: int = 32, seed: int = 0, progress: bool = True) -> Iterator[dict]:
    """Samples text from ``model``, at temperature 1 and from all of its vocabulary.

    A chat model is given its template up to where a user's message starts, and writes the message,
    the answer and what follows; a base model goes on from its first token. It does not stop at the
    end of a text.

    Args:
        model: with ``generate`` of transformers. tokens: how many in all, rounded up to rows.
        tokenizer: whose chat template is used; None, or one without a template: no chat.
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
    device, start = next(model.parameters()).device, _start(model, tokenizer)
    sizes = [min(batch_size, rows) for rows in
             range(-(-tokens // length), 0, -batch_size)]
    devices = [device] if device.type == "cuda" else []
    for i, rows in enumerate(tqdm(sizes, desc="write", unit="batch", disable=not progress,
                                  file=sys.stderr)):
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed + i)
            ids = torch.tensor([start] * rows, device=device)
            ids = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True,
                temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=start[0],
                max_new_tokens=max(1, length - len(start)))
        for part in ids.split(ROWS):
            yield dict(input_ids=part, attention_mask=torch.ones_like(part))


def _start(model: nn.Module, tokenizer) -> list[int]:
    """The tokens that come before everything."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
        return tokenizer(text.split(MARK)[0], add_special_tokens=False)["input_ids"]
    config = getattr(model, "generation_config", None)
    for name in ("bos_token_id", "decoder_start_token_id", "eos_token_id"):
        found = getattr(config, name, None)
        if isinstance(found, Tensor | list):
            found = int(found[0])
        if found is not None:
            return [found]
    raise fail("general", None, "batches of text: the model's generation_config names no first "
                                "token")
