"""Writes the kernel-builder project into an empty folder: this folder's files, and copies of the
package's modules that the hub form consists of, so that no copy is committed that could drift.

    python hub/assemble.py OUT
"""

import shutil
import sys
from pathlib import Path

HUB = Path(__file__).resolve().parent
PACKAGE = HUB.parent / "secura_kernels"
FILES = ("build.toml", "flake.nix", "CARD.md", "benchmarks", "torch-ext")
# ``functional`` and what it imports (tests/test_imports.py has the order of the levels). The CUDA
# kernels are left out: a library that a user compiles is not what the hub is for.
PARTS = ("functional", "ops", "backends", "selection.py", "settings.py", "checks.py")


def assemble(out: Path) -> None:
    """Writes the project.

    Args:
        out: a folder that is empty or not there yet.

    Raises:
        FileExistsError: it holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: name a new folder")
    for name in FILES:
        _copy(HUB / name, out / name)
    for name in PARTS:
        _copy(PACKAGE / name, out / "torch-ext" / "secura_kernels" / name)


def _copy(source: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__", "cuda"))
    else:
        shutil.copy(source, to)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    assemble(Path(sys.argv[1]))
