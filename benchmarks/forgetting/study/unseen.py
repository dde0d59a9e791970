"""Text of kinds that no task is of: is what the model knew of it kept? Of JavaScript a calibration
may have other scripts, ``jquery``.

- ``javascript``: the scripts of Django's admin pages (BSD-3-Clause), another language than the one
  that is learned.
- ``mmlu``: questions of MMLU's development set (Hendrycks et al. 2021, arXiv 2009.03300) with
  worked answers, as lm-eval carries them (MIT).
- ``languages``: spaCy's example sentences in six European languages (MIT).
- ``arithmetic``: sums of two numbers below 50; the digits of the answers alone are scored.
"""

import ast
import json
import random
import zipfile
from collections.abc import Callable

import torch
from torch import nn

from secura_kernels.finetune.corpus import Corpus
from secura_kernels.finetune.downloads import package_files

from . import language_retention
from .language import DJANGO, encode
from .language_retention import Passages, Reference

LENGTH, TOKENS = 128, 2048  # of a row, and of a kind at most
ROWS, SUMS = 16, 12  # of arithmetic, and in a row

SCRIPTS = "django/contrib/admin/static/admin/js/"
VENDORED = "/vendor/"  # under other licences
JQUERY = f"{SCRIPTS}vendor/jquery/jquery.js"
LM_EVAL = (
    "lm-eval==0.4.9.1",
    "315e5a3af7a600c8e4240e059e132376d6582538e1aa6484ccba647f6ea3fae9",
    "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json",
)
SPACY = (
    "spacy==3.8.7",
    "d9d83e006df66decccefa3872fa958b3756228fb216d83783595444cf42ca10c",
)
# The wheel is different for every platform, the sentences are not: one fixed wheel will do.
SPACY_OPTIONS = ("--platform", "manylinux2014_x86_64", "--python-version", "3.12")
LANGUAGES = ("de", "es", "fr", "it", "nl", "pt")


def javascript() -> str:
    with zipfile.ZipFile(DJANGO.path()) as archive:
        names = [
            name
            for name in sorted(archive.namelist())
            if name.startswith(SCRIPTS) and name.endswith(".js") and VENDORED not in name
        ]
        return "\n".join(archive.read(name).decode("utf-8") for name in names)


def jquery() -> str:
    """JavaScript that is not measured: jQuery's source (MIT), as Django carries it."""
    with zipfile.ZipFile(DJANGO.path()) as archive:
        return archive.read(JQUERY).decode("utf-8")


def mmlu() -> str:
    file = package_files(*LM_EVAL) / LM_EVAL[-1]
    prompts = json.loads(file.read_text(encoding="utf-8"))
    return "\n\n".join(prompts[subject].strip() for subject in sorted(prompts))


def languages() -> str:
    """The modules are read as text, not run."""
    files = {name: f"spacy/lang/{name}/examples.py" for name in LANGUAGES}
    folder = package_files(*SPACY, tuple(files.values()), *SPACY_OPTIONS)
    sentences: list[str] = []
    for file in files.values():
        tree = ast.parse((folder / file).read_text(encoding="utf-8"))
        (value,) = [node.value for node in tree.body if isinstance(node, ast.Assign)]
        sentences += ast.literal_eval(value)
    return "\n".join(sentences)


TEXTS: dict[str, Callable[[], str]] = {
    "javascript": javascript,
    "mmlu": mmlu,
    "languages": languages,
}
KINDS = (*TEXTS, "arithmetic")


def unseen_reference(base: nn.Module, tokenizer) -> Reference:
    """What the base model, in evaluation mode, predicts of each kind.

    Raises DownloadError if an archive cannot be fetched or is another one.
    """
    kinds = {}
    for name, text in TEXTS.items():
        rows = Corpus({name: encode(tokenizer, text())}).held_out(name, LENGTH, TOKENS)
        kinds[name] = Passages(rows, torch.ones_like(rows[:, 1:], dtype=torch.bool))
    kinds["arithmetic"] = sums(tokenizer)
    return Reference.of(base, kinds, language_retention.TOP)


def sums(tokenizer) -> Passages:
    """Rows of sums, the same on every machine: ``17 + 25 = 42``, a line each."""
    numbers = random.Random(0)
    rows: list[tuple[list[int], list[bool]]] = []
    for _ in range(ROWS):
        ids: list[int] = []
        scored: list[bool] = []
        for _ in range(SUMS):
            a, b = numbers.randrange(50), numbers.randrange(50)
            for piece, answers in ((f"{a} + {b} = ", False), (f"{a + b}", True), ("\n", False)):
                tokens = encode(tokenizer, piece).tolist()
                ids += tokens
                scored += [answers] * len(tokens)
        rows.append((ids, scored))
    longest = max(len(ids) for ids, _ in rows)
    padding = encode(tokenizer, "\n").tolist()[:1]
    ids = torch.tensor([ids + padding * (longest - len(ids)) for ids, _ in rows])
    scored = torch.tensor([marks + [False] * (longest - len(marks)) for _, marks in rows])
    return Passages(ids, scored[:, 1:])
