"""A hook of MkDocs (``make docs``): the site is README.md, docs/ and every file of the repository
that they lead to by relative links. Each keeps its path, so that a link that works in the
repository works in the site, and a link to a file that is not there ends the build."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
START = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    own = [file for file in files if file.src_dir != config.docs_dir]  # the theme's
    return Files(
        own + [File(uri, str(ROOT), config.site_dir, config.use_directory_urls) for uri in linked()]
    )


def linked() -> list[str]:
    """Paths of the site's files from the repository's root."""
    found, waiting = set(), [*(ROOT / name for name in START), *(ROOT / "docs").glob("*.md")]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file() or not path.is_relative_to(ROOT):
            continue
        found.add(path)
        if path.suffix == ".md":
            waiting += [
                (path.parent / link).resolve()
                for link in LINK.findall(path.read_text(encoding="utf-8"))
            ]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)
