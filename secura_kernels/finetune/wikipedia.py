"""General English: the Wikipedia sample that lies among gensim's test data, as plain prose.

The wheel is different for every platform, the sample inside is not: any one wheel will do, so one
fixed wheel is fetched whatever the platform, and the sample's own hash is checked.
"""

import bz2
import html
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from .downloads import cache_folder, check_sha256, pip_download

REQUIREMENT = "gensim==4.4.0"
WHEEL_OPTIONS = ("--only-binary", ":all:", "--platform", "manylinux_2_28_x86_64")
WHEEL_OPTIONS += ("--python-version", "3.12")
MEMBER = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
MEMBER_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"

_DROPPED = re.compile(
    r"<!--.*?-->|<ref[^<>]*/>"
    r"|<(ref|math|gallery|timeline|source|code|pre|table|div)\b[^<>]*>.*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_INNERMOST_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_INNERMOST_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_INNERMOST_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_NAMESPACE = re.compile(r"\s*(file|image|category|media|[a-z]{2,3}(-[a-z]+)?):", re.IGNORECASE)
_EXTERNAL_LINK = re.compile(r"\[(?:https?:)?//\S+\s*([^\]]*)\]")
_CLOSING_SECTION = re.compile(
    r"^==+\s*(see also|references|notes|footnotes|bibliography|further reading|external links"
    r"|sources|citations)\s*==+\s*$",
    re.MULTILINE | re.IGNORECASE,
)
SHORTEST_PARAGRAPH = 80  # characters; shorter lines are captions and leftovers of markup


def strip_markup(source: str) -> str:
    """Wikitext → its paragraphs of prose, one a line; headings, lists and tables are dropped."""
    if section := _CLOSING_SECTION.search(source):
        source = source[: section.start()]
    text = _until_stable(_DROPPED, "", source)
    text = _until_stable(_INNERMOST_TEMPLATE, "", text)
    text = _until_stable(_INNERMOST_TABLE, "", text)
    text = _until_stable(_INNERMOST_LINK, _link_text, text)
    text = _EXTERNAL_LINK.sub(r"\1", text)
    text = re.sub(r"'{2,}", "", _TAG.sub("", text))
    text = html.unescape(text).replace("\xa0", " ")
    text = re.sub(r"\(\s*[;,]\s*", "(", text)  # what an inline template leaves: "(, born 1879)"
    text = re.sub(r"\s*\(\s*\)", "", text)
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines())
    long = (line for line in lines if len(line) >= SHORTEST_PARAGRAPH)
    return "\n".join(line for line in long if line[0] not in "*#:;|!{}=")


def _until_stable(pattern: re.Pattern, replacement, text: str) -> str:
    """Substitute until nothing changes: markup nests, and each pass takes the innermost away."""
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text


def _link_text(link: re.Match) -> str:
    inside = link.group(1)
    return "" if _NAMESPACE.match(inside) else inside.rsplit("|", 1)[-1]


def wikipedia() -> dict[str, str]:
    """{"validation", "test"} → prose; every other article belongs to each.

    Raises DownloadError if the sample cannot be fetched or is another one.
    """
    path = cache_folder() / Path(MEMBER).name
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            wheel = pip_download(REQUIREMENT, Path(folder), *WHEEL_OPTIONS)
            with zipfile.ZipFile(wheel) as archive:
                member = Path(archive.extract(MEMBER, folder))
            check_sha256(member, MEMBER_SHA256)
            member.rename(path)
    check_sha256(path, MEMBER_SHA256)
    articles = [text for text in map(strip_markup, _sources(path)) if text]
    return {"validation": "\n\n".join(articles[0::2]), "test": "\n\n".join(articles[1::2])}


def _sources(path: Path) -> Iterator[str]:
    """The wikitext of every article proper: redirects and other namespaces are passed over."""
    with bz2.open(path) as file:
        pages = ElementTree.parse(file).getroot().iterfind("{*}page")
    for page in pages:
        if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
            yield page.findtext("{*}revision/{*}text") or ""
