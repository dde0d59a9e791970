"""The texts of a run as token streams: what is trained on, and what is only ever measured."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .gutenberg import shakespeare, strip_gutenberg
from .settings import InputError
from .wikipedia import wikipedia


@dataclass(frozen=True)
class Corpus:
    """Three token streams, each (tokens,) int32: "train", and held out "task" and "general"."""

    streams: dict[str, Tensor]

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for name, stream in sorted(self.streams.items()):
            digest.update(f"{name} {len(stream)} ".encode())
            digest.update(stream.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        save_file(self.streams, path)

    @classmethod
    def load(cls, path: str | Path) -> "Corpus":
        return cls(load_file(path))

    def check_length(self, batch_size: int, seq_len: int) -> None:
        """Raise InputError unless there is a batch to train on and a window to measure on."""
        window = (seq_len, "one window of --seq-len")
        needed = {
            "train": ("--text", batch_size * seq_len, "one batch, --batch-size x --seq-len,"),
            "task": ("--text", *window),
            "general": ("--general-text", *window),
        }
        for name, (argument, least, what) in needed.items():
            if (length := len(self.streams[name])) < least:
                raise InputError(
                    f"argument {argument}: the text is too short: its {name} part has {length} "
                    f"tokens, {what} needs at least {least}"
                )

    def held_out(self, name: str, seq_len: int, tokens: int) -> Tensor:
        """Fixed windows of the stream `name`, (windows, seq_len) int64.

        They do not overlap and are spread evenly over the whole stream, so a small number of them
        still sees all of it.
        """
        stream = self.streams[name]
        whole = stream[: len(stream) // seq_len * seq_len].view(-1, seq_len)
        count = max(1, min(tokens // seq_len, len(whole)))
        return whole[torch.arange(count) * len(whole) // count].long()

    def batches(self, steps: int, batch_size: int, seq_len: int, seed: int) -> list[Tensor]:
        """`steps` batches (batch_size, seq_len) int64 from random places of the training text.

        The same seed gives every method the same batches in the same order.
        """
        stream = self.streams["train"]
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(
            len(stream) - seq_len + 1, (steps, batch_size, 1), generator=generator
        )
        return list(stream[starts + torch.arange(seq_len)].long())


def build_corpus(tokenizer, text: str | None, general: str | None, part: str) -> Corpus:
    """Tokenise the texts; in place of None, Shakespeare and Wikipedia.

    `part`, "validation" or "test", says which held-out part to take. Of a given task text 80 % are
    for training, then come 10 % validation and 10 % test; of a given general text the first half
    is validation, the second half test.
    """
    if text is None:
        works = shakespeare()
        train, task = (encode(tokenizer, works[name]) for name in ("train", part))
    else:
        stream = encode(tokenizer, strip_gutenberg(text))
        ends = (len(stream) * 8 // 10, len(stream) * 9 // 10)
        train, validation, test = stream.tensor_split(ends)
        task = {"validation": validation, "test": test}[part]
    if general is None:
        other = encode(tokenizer, wikipedia()[part])
    else:
        stream = encode(tokenizer, strip_gutenberg(general))
        validation, test = stream.tensor_split(2)
        other = {"validation": validation, "test": test}[part]
    streams = {"train": train, "task": task, "general": other}
    return Corpus({name: stream.clone() for name, stream in streams.items()})


def read_text(argument: str, path: Path | None) -> str | None:
    """The text of a file; raises InputError, naming the argument, if it is not UTF-8 text."""
    if path is None:
        return None
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"argument {argument}: cannot read '{path}': {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"argument {argument}: '{path}' is not UTF-8 text (byte {error.start}); save it as "
            "UTF-8"
        ) from None


def encode(tokenizer, passage: str) -> Tensor:
    """(tokens,) int32. In parts of 200 lines: on a list a tokenizer works with all cores."""
    lines = passage.splitlines(keepends=True)
    parts = ["".join(lines[i : i + 200]) for i in range(0, len(lines), 200)]
    ids = tokenizer(parts, add_special_tokens=False)["input_ids"] if parts else []
    return torch.tensor([token for part in ids for token in part], dtype=torch.int32)
