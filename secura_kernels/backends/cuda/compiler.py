"""Compiles csrc/ into one library of torch ops: when first wanted (``build``), or by setup.py.

setup.py loads this file without its package, so importing it needs the standard library alone.
"""

import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .commands import (
    ALL_FLAGS,
    LIBRARY,
    digest,
    files_of,
    first_errors,
    nvcc_command,
    run,
    torch_command,
)
from .toolchain import check_arches, chips_for, nearest_chip, tools, torch_cuda

HERE = Path(__file__).resolve().parent


def sources() -> Path:
    """The folder csrc: of the installed package, else of the checkout.

    Raises:
        FileNotFoundError: neither is there.
    """
    places = HERE / "csrc", HERE.parents[2] / "csrc"
    for place in places:
        if (place / "passes.h").is_file():
            return place
    raise FileNotFoundError(
        "the CUDA sources are missing: neither "
        + " nor ".join(map(str, places))
        + " holds passes.h"
    )


def build(
    arches: Sequence[str] | None = None,
    *,
    force: bool = False,
    source: Path | None = None,
    progress: bool | None = None,
) -> Path:
    """Compiles the kernels once for this user, and returns the library; later calls find it.

    Args:
        arches: chips as nvcc names them, such as ["80", "90"]; None: that of the current GPU.
        force: compile even if these sources were compiled for these chips by this nvcc before.
        source: the folder of the sources; None: ``sources()``. progress: as in
            ``compile_library``.

    Raises:
        ValueError: bad ``arches``. RuntimeError: no GPU to choose ``arches`` by, no folder that can
        be written, and what ``compile_library`` raises.
    """
    source = source or sources()
    name = _name(arches)
    if name is None:
        raise RuntimeError(
            "no NVIDIA GPU from compute capability 7.5 on is visible: name the "
            "chips to compile for, such as arches=['80', '90']"
        )
    try:
        nvcc, *_, version = tools()
    except RuntimeError:
        library = None if force else _newest(source, name)
        if library is None:
            raise
        return library
    library = _cache() / f"{_entry(source, name)}{version}" / LIBRARY
    with contextlib.ExitStack() as stack:
        try:
            if force or not library.is_file():
                stack.enter_context(_locked(library.parent))
        except OSError as error:
            raise RuntimeError(
                f"the compiled CUDA kernels cannot be kept in {library.parent}: "
                f"{error.strerror}; set XDG_CACHE_HOME to a folder that can be "
                "written"
            ) from error
        if force or not library.is_file():  # not built by whoever held the lock
            arches = arches or [nearest_chip(nvcc, int(name))]
            compile_library(source, library, arches, progress=progress)
        with contextlib.suppress(OSError):  # of a folder that can only be read
            os.utime(library, ns=(time.time_ns(),) * 2)  # the one to be found from now on
    return library


def cached(arches: Sequence[str] | None = None, *, source: Path | None = None) -> Path | None:
    """The library that ``build`` with these arguments has made last, by whatever nvcc, or None;
    compiles nothing.

    Raises:
        ValueError: bad ``arches``. RuntimeError: the folder cannot be read.
    """
    name = _name(arches)
    return None if name is None else _newest(source or sources(), name)


def _newest(source: Path, name: str) -> Path | None:
    """nvcc is not asked: a machine that has the library may have no nvcc."""
    folder, entry = _cache(), _entry(source, name)
    try:
        found = [
            folder / other / LIBRARY for other in os.listdir(folder) if other.startswith(entry)
        ]
        built = [(library.stat().st_mtime_ns, library) for library in found if library.exists()]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RuntimeError(
            f"the compiled CUDA kernels in {folder} cannot be read: "
            f"{error.strerror}; set XDG_CACHE_HOME to a folder that can be read, "
            "and secura_kernels.backends.cuda.build() compiles "
            "them there"
        ) from error
    return max(built)[1] if built else None


def compile_library(
    source: Path,
    output: Path,
    arches: Sequence[str] | None,
    build_dir: Path | None = None,
    progress: bool | None = None,
) -> Path:
    """Compiles every .cu and .cpp under ``source`` and links them to the library ``output``, which
    appears whole or not at all: by ``torch.utils.cpp_extension.load`` where torch has CUDA, else by
    nvcc alone. MAX_JOBS is the number of compilers at once (default: of CPUs).

    Args:
        arches: chips as nvcc names them, such as ["80", "90"]; None: all of ``CHIPS`` that nvcc
            knows.
        build_dir: keeps the objects, so that the next run compiles only what has changed; None:
            they are dropped.
        progress: a progress bar; None: one where stderr is a terminal, else one line.

    Returns:
        The log, with ptxas' registers and spills of each kernel that this run compiled; in
        ``build_dir``, else beside ``output``.

    Raises:
        ValueError: bad ``arches``. RuntimeError: a tool is missing, nvcc does not know a chip or
        does not go with torch, or the compilation failed. FileNotFoundError: ``source`` holds no
        .cu.
    """
    if arches is not None:
        arches = check_arches("arches", arches)
    output = Path(output).resolve()
    source = Path(source).resolve()
    if not any(path.suffix == ".cu" for path in files_of(source)):
        raise FileNotFoundError(f"no CUDA source (*.cu) in {source}")
    found = tools()
    arches = chips_for(found.nvcc, arches)
    output.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"NVCC_CCBIN": found.ccbin}
    with contextlib.ExitStack() as stack:
        if build_dir is None:
            build_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            env["TMPDIR"] = str(build_dir)  # nvcc, interrupted, leaves its files
            log = output.with_suffix(".log")
        else:
            build_dir = Path(build_dir).resolve()
            stack.enter_context(_locked(build_dir))
            log = build_dir / "build.log"
        if torch_cuda():
            command, more = torch_command(source, found, arches, build_dir)
            env |= more
        else:
            command = nvcc_command(source, found, arches, build_dir)
        head = f"nvcc {found.version} ({found.nvcc})\n{shlex.join(command)}\n\n"
        if run(command, env, log, head, progress, arches):
            raise RuntimeError(
                "the CUDA kernels did not compile:\n  "
                + "\n  ".join(first_errors(log.read_text()))
                + f"\nnvcc's whole output is in {log}"
            )
        part = output.with_name(f"{output.name}.{os.getpid()}.part")
        try:
            shutil.copy(build_dir / LIBRARY, part)
            os.replace(part, output)
        finally:
            part.unlink(missing_ok=True)
    return log


def _name(arches: Sequence[str] | None) -> str | None:
    """A library's chips, in the name of its folder; None: no GPU is here."""
    if arches is not None:
        return "+".join(check_arches("arches", arches))
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" if (major, minor) >= (7, 5) else None


def digest_of(library: Path) -> str | None:
    """The digest of the sources that a library was made of, read without loading it: the ops of
    a library that was loaded stay for the life of the process."""
    found = re.search(rb"secura_cuda sources ([0-9a-f]{64})\0", library.read_bytes())
    return found[1].decode() if found else None


def _cache() -> Path:
    """Where ``build`` keeps the libraries.

    Raises:
        RuntimeError: neither XDG_CACHE_HOME nor a home.
    """
    folder = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(folder or Path.home() / ".cache") / "secura_kernels"
    except RuntimeError as error:
        raise RuntimeError(
            "there is no folder for compiled CUDA kernels: neither XDG_CACHE_HOME "
            "nor HOME is set; set XDG_CACHE_HOME to a folder that can be "
            "written"
        ) from error


def _entry(source: Path, name: str) -> str:
    """A library's folder but for nvcc's version: one each set of sources, flags and chips."""
    key = hashlib.sha256(" ".join([*ALL_FLAGS, platform.machine(), digest(source)]).encode())
    return f"cuda-{key.hexdigest()[:16]}-sm_{name}-nvcc_"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time in ``folder``, which is made; a process that dies lets go."""
    import fcntl  # of Unix only

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"waiting for another process that compiles in {folder}",
                file=sys.stderr,
                flush=True,
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
