"""Text tasks from a model hub, for users with a network, through the package ``datasets``.

What continual-learning papers fine-tune language models on. Each dataset has its own licence, which
its page on the hub names. ``datasets`` is imported only when a task is loaded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from secura_kernels.checks import check_choice

from .language import PARTS, TextTask, Tick, text_task

Row = Mapping[str, object]


@dataclass(frozen=True)
class HubText:
    """A dataset of the hub and how a row of it is written as text.

    Attributes:
        path, name, revision: as ``datasets.load_dataset`` takes them. splits: for each part, a
            slice of the dataset's rows; no two overlap.
    """

    path: str
    name: str | None
    splits: Mapping[str, str]
    text: Callable[[Row], str]
    revision: str | None = None


def wikitext_text(row: Row) -> str:
    """A line of an article as it is, with its line end."""
    return row["text"]


def gsm8k_text(row: Row) -> str:
    return f"Question: {row['question']}\nAnswer: {row['answer']}\n\n"


def cnn_dailymail_text(row: Row) -> str:
    return f"Article: {row['article']}\nSummary: {row['highlights']}\n\n"


def logiqa_text(row: Row) -> str:
    """``correct_option`` counts from 0."""
    letters = "ABCD"
    options = "".join(
        f"{letter}. {option}\n" for letter, option in zip(letters, row["options"], strict=True)
    )
    right = letters[int(row["correct_option"])]
    return f"{row['context']}\nQuestion: {row['query']}\n{options}Answer: {right}\n\n"


OWN_SPLITS = {part: part for part in PARTS}
HUB_TEXTS = {
    "wikitext-2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", OWN_SPLITS, wikitext_text),
    # It has no validation part of its own.
    "gsm8k": HubText(
        "openai/gsm8k",
        "main",
        {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"},
        gsm8k_text,
    ),
    # 3,000 of 287,113 articles are more tokens than a short fine-tuning reads.
    "cnn-dailymail": HubText(
        "abisee/cnn_dailymail",
        "3.0.0",
        {"train": "train[:3000]", "validation": "validation[:300]", "test": "test[:300]"},
        cnn_dailymail_text,
    ),
    # The main branch is a script, which `datasets` no longer runs since 4.0.
    "logiqa": HubText(
        "lucasmccabe/logiqa", None, OWN_SPLITS, logiqa_text, revision="refs/convert/parquet"
    ),
}


def hub_text_task(name: str, tokenizer, tick: Tick = lambda: None) -> TextTask:
    """One of ``HUB_TEXTS`` as a task; ``tick`` follows each part that was loaded or tokenised.

    Raises ImportError, saying what to install, without ``datasets``.
    """
    return text_task(name, tokenizer, hub_text(name, tick), tick)


def hub_text(name: str, tick: Tick = lambda: None) -> dict[str, str]:
    """{part: text} of one of ``HUB_TEXTS``; raises as ``hub_text_task`` does."""
    check_choice("name", name, tuple(HUB_TEXTS))
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"the text task {name!r} needs datasets: pip install datasets") from error
    source = HUB_TEXTS[name]
    texts = {}
    for part in PARTS:
        rows = load_dataset(
            source.path, source.name, split=source.splits[part], revision=source.revision
        )
        texts[part] = "".join(map(source.text, rows))
        tick()
    return texts
