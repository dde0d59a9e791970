"""The command that compiles csrc/, by torch's own builder or by nvcc alone, and its run.

setup.py loads this file without its package, so importing it needs the standard library alone.
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .toolchain import Tools, gencode, toolkit

LIBRARY = "secura_cuda.so"
SUFFIXES = {".cu", ".cuh", ".cpp", ".h"}
# The oldest torch whose stable ABI the library is held to; it runs in every later one.
TORCH_TARGET = "0x020b000000000000"  # 2.11
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
]
FLAGS = [
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-Xptxas",
    "-v",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
]
# torch is loaded before the library, but its symbols are not global: naming libtorch_cpu, which
# every build of torch has, is what makes the loader find them. No undefined symbol may be left, so
# that what only libtorch_cuda has is found here and not on a user's machine.
LINK_FLAGS = ["-shared", "-cudart", "static", "-ltorch_cpu", "-Xlinker", "--no-undefined"]
# The same for g++, as torch's builder links. It names more libraries behind these, of which none
# is needed: they would tie the library to this torch's CUDA and to this Python.
CXX_LINK_FLAGS = [
    "-Wl,--as-needed",
    "-ltorch_cpu",
    "-lcudart_static",
    "-ldl",
    "-lrt",
    "-lpthread",
    "-Wl,--no-undefined",
]
ALL_FLAGS = [*CXX_FLAGS, *FLAGS, *LINK_FLAGS, *CXX_LINK_FLAGS]
# torch's own way to compile, where torch has CUDA. In a process of its own, since it prints to file
# descriptor 1 what the compilers say, and loads the library.
LOAD = (
    "import json, sys; from torch.utils.cpp_extension import load; load(**json.loads(sys.argv[1]))"
)


def files_of(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*") if path.suffix in SUFFIXES)


def digest(source: Path) -> str:
    """Of the sources; ops.cpp puts it into the library."""
    key = hashlib.sha256()
    for path in files_of(source):
        name, text = str(path.relative_to(source)).encode(), path.read_bytes()
        key.update(b"%d %s %d " % (len(name), name, len(text)) + text)
    return key.hexdigest()


def units(source: Path) -> list[Path]:
    """What a compiler is called with."""
    return [file for file in files_of(source) if file.suffix in (".cu", ".cpp")]


def stamp(source: Path) -> str:
    """The flag that gives ops.cpp the digest."""
    return f"-DSECURA_SOURCES={digest(source)}"


def torch_command(
    source: Path, found: Tools, arches: Sequence[str], build_dir: Path
) -> tuple[list[str], dict[str, str]]:
    """``torch.utils.cpp_extension.load``, and what is to be in its environment."""
    (build_dir / "lock").unlink(missing_ok=True)  # of a load that was killed; it would be awaited
    arguments = dict(
        name=LIBRARY.removesuffix(".so"),
        sources=[str(file) for file in units(source)],
        extra_include_paths=[str(source)],
        build_directory=str(build_dir),
        extra_cflags=[*CXX_FLAGS, stamp(source)],
        extra_cuda_cflags=[*FLAGS, *gencode(arches)],
        extra_ldflags=CXX_LINK_FLAGS,
        is_python_module=False,
        verbose=True,
    )
    return [sys.executable, "-P", "-c", LOAD, json.dumps(arguments)], torch_environment(found)


def torch_environment(found: Tools) -> dict[str, str]:
    """Where torch's builder looks for what ``tools`` has found."""
    path = os.pathsep.join([str(Path(found.ninja).parent), os.environ.get("PATH", "")])
    return {
        "CUDA_HOME": str(toolkit(found.nvcc)),
        "CXX": found.host,
        "PATH": path,
        "MAX_JOBS": str(jobs()),
        "NVCC_CCBIN": found.ccbin,
    }


def nvcc_command(source: Path, found: Tools, arches: Sequence[str], build_dir: Path) -> list[str]:
    """ninja, on a file that it finds in ``build_dir``."""
    (build_dir / "build.ninja").write_text(_ninja_file(source, found, arches))
    return [found.ninja, "-v", "-C", str(build_dir), "-j", str(jobs())]


def _ninja_file(source: Path, found: Tools, arches: Sequence[str]) -> str:
    def path(value: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(value))

    def words(values: Sequence[object]) -> str:
        return shlex.join(map(str, values)).replace("$", "$$")

    chips = gencode(arches)
    includes = ["-I", source, "-isystem", found.torch / "include"]
    lines = [
        f"compile = {words([found.nvcc, '-c', *FLAGS, *chips, *includes])}",
        f"link = {words([found.nvcc, *chips, '-L', found.torch / 'lib'])}",
        f"link_flags = {words(LINK_FLAGS)}",
        "rule compile",
        "  command = $compile $stamp $in -o $out -MD -MF $out.d",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $link $in $link_flags -o $out",
    ]
    objects = []
    for file in units(source):
        objects.append(path(f"{file.relative_to(source)}.o"))
        lines.append(f"build {objects[-1]}: compile {path(file)}")
        if file.suffix == ".cpp":
            lines.append(f"  stamp = {stamp(source)}")
    return "\n".join([*lines, f"build {LIBRARY}: link {' '.join(objects)}", ""])


def jobs() -> int:
    number = os.environ.get("MAX_JOBS", "")
    return int(number) if number.isdigit() and int(number) else len(os.sched_getaffinity(0))


def run(
    command: list[str],
    env: dict[str, str],
    log: Path,
    head: str,
    progress: bool | None,
    arches: Sequence[str],
) -> int:
    """Runs ``command``, its output to ``log``; returns its exit status."""
    title = "compiling secura_kernels CUDA kernels"
    bar = None
    if sys.stderr.isatty() if progress is None else progress:
        with contextlib.suppress(ImportError):  # a build environment may lack it
            from tqdm import tqdm

            bar = tqdm(desc=title, unit="file")
    if bar is None:
        print(f"{title} for {', '.join(arches)}; log: {log}", file=sys.stderr, flush=True)
    with log.open("w") as file, contextlib.nullcontext() if bar is None else bar:
        file.write(head)
        process = subprocess.Popen(
            command,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            for line in process.stdout:
                file.write(line)
                step = re.match(r"\[(\d+)/(\d+)\] ", line)
                if bar is not None and step:
                    bar.total = int(step[2])
                    bar.update(int(step[1]) - bar.n)
            return process.wait()
        finally:
            # Interrupted: ninja, asked to end, ends its compilers and drops their half outputs.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.communicate(timeout=10)  # until the last of them is gone
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            process.stdout.close()


def first_errors(output: str, count: int = 10) -> list[str]:
    """The first errors of the compiler or linker, else the last lines."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    errors = [
        line
        for line in lines
        if re.search(r"\berror\b|\bfatal\b|undefined reference|cannot find", line)
        and not line.startswith("[")
    ]
    return errors[:count] or lines[-count:]
