"""The tasks of CURLoRA's own tables (arXiv 2408.14572), for those who can reach the Hugging Face
hub: MRPC, SST-2 and Sentiment140, loaded by `datasets`, which is imported when they are.
"""

from collections.abc import Callable, Iterator, Mapping

from .classification import ClassificationTask, make_task

MOST = 50_000  # rows read of one split, at even distances, as Sentiment140 is sorted by its labels
SEPARATOR = " [SEP] "  # between the texts of a pair; BERT's tokenizers read it as their own mark


def mrpc() -> ClassificationTask:
    """Do two sentences say the same? The hub's test split (1,725 pairs) is the test part."""
    hub = _load("nyu-mll/glue", "mrpc")
    rows = [*_pairs(hub["train"]), *_pairs(hub["validation"])]
    return make_task("mrpc", rows, _pairs(hub["test"]))


def sst2() -> ClassificationTask:
    """Is a sentence of a film review negative or positive? The hub's test split has no labels, so
    its validation split (872 sentences) is the test part. The training split is phrases, some of
    them of one sentence, so the validation part is easier than the test part."""
    hub = _load("nyu-mll/glue", "sst2")
    return make_task("sst2", _sentences(hub["train"]), _sentences(hub["validation"]))


def sentiment140() -> ClassificationTask:
    """Had a tweet a sad or a happy smiley? All parts come from the training split: the test split
    has 498 tweets, labelled by hand and by another rule.

    The hub holds this set as a script, which `datasets` no longer runs, and as Parquet files on a
    branch of their own, which are read.
    """
    hub = _load("stanfordnlp/sentiment140", revision="refs/convert/parquet")
    return make_task(
        "sentiment140",
        _labelled(
            hub["train"], lambda row: row["text"], "sentiment", {0: "negative", 4: "positive"}
        ),
    )


def _load(*arguments: str, **settings: str) -> Mapping:
    from datasets import load_dataset

    return load_dataset(*arguments, **settings)


def _pairs(split) -> Iterator[tuple[str, str]]:
    return _labelled(
        split,
        lambda row: row["sentence1"] + SEPARATOR + row["sentence2"],
        "label",
        {0: "different", 1: "equivalent"},
    )


def _sentences(split) -> Iterator[tuple[str, str]]:
    return _labelled(split, lambda row: row["sentence"], "label", {0: "negative", 1: "positive"})


def _labelled(
    split, text: Callable[[Mapping], str], column: str, names: Mapping[int, str]
) -> Iterator[tuple[str, str]]:
    """Texts and names of labels; rows whose label has no name are passed over."""
    for place in range(0, len(split), -(-len(split) // MOST)):
        row = split[place]
        if row[column] in names:
            yield text(row).strip(), names[row[column]]
