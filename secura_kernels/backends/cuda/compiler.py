"""Compiles csrc/ into one library of torch ops: when first wanted (``build``), or by setup.py.

setup.py loads this file by its path, so importing it needs the standard library alone.
"""

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

LIBRARY = "secura_cuda.so"
SUFFIXES = {".cu", ".cuh", ".cpp", ".h"}
# The oldest torch whose stable ABI the library is held to; it runs in every later one.
TORCH_TARGET = "0x020b000000000000"  # 2.11
FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xptxas", "-v", "-Xcompiler",
         "-fPIC,-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
# torch is loaded before the library, but its symbols are not global: naming libtorch_cpu, which
# every build of torch has, is what makes the loader find them. No undefined symbol may be left, so
# that what only libtorch_cuda has is found here and not on a user's machine.
LINK_FLAGS = ["-shared", "-cudart", "static", "-ltorch_cpu", "-Xlinker", "--no-undefined"]
DEFAULT_CUDA = Path("/usr/local/cuda")
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
    raise FileNotFoundError("the CUDA sources are missing: neither " +
                            " nor ".join(map(str, places)) + " holds passes.h")


def build(arches: Sequence[str] | None = None, *, source: Path | None = None,
          progress: bool | None = None) -> Path:
    """Compiles the kernels once for this user, and returns the library; later calls find it.

    Args:
        arches: chips as nvcc names them, such as ["80", "90a"]; None: those of the visible GPUs.
        source: the folder of the sources; None: ``sources()``. progress: as in
            ``compile_library``.

    Raises:
        ValueError: bad ``arches``. RuntimeError: no GPU to choose ``arches`` by, and what
        ``compile_library`` raises.
    """
    source = source or sources()
    if arches is None:
        arches = _visible_arches()
        if not arches:
            raise RuntimeError("no NVIDIA GPU from compute capability 7.5 on is visible: name the "
                               "chips to compile for, such as arches=['80', '90a']")
    library = _cache_path(source, arches)
    with _locked(library.parent):
        if not library.is_file():  # not built by whoever held the lock
            compile_library(source, library, arches, progress=progress)
    return library


def cached(arches: Sequence[str] | None = None, *, source: Path | None = None) -> Path | None:
    """The library that ``build`` with these arguments has made, or None; compiles nothing.

    Raises:
        ValueError: bad ``arches``.
    """
    if arches is None:
        arches = _visible_arches()
        if not arches:
            return None
    library = _cache_path(source or sources(), arches)
    return library if library.is_file() else None


def compile_library(source: Path, output: Path, arches: Sequence[str],
                    build_dir: Path | None = None, progress: bool | None = None) -> Path:
    """Compiles every .cu and .cpp under ``source`` and links them to the library ``output``, which
    appears whole or not at all. MAX_JOBS is the number of compilers at once (default: of CPUs).

    Args:
        arches: chips as nvcc names them, such as ["80", "90a"].
        build_dir: keeps the objects, so that the next run compiles only what has changed; None:
            they are dropped.
        progress: a progress bar; None: one where stderr is a terminal, else one line.

    Returns:
        The log, with ptxas' registers and spills of each kernel that this run compiled; in
        ``build_dir``, else beside ``output``.

    Raises:
        ValueError: bad ``arches``. RuntimeError: a tool is missing, or the compilation failed.
        FileNotFoundError: ``source`` holds no .cu.
    """
    arches = check_arches("arches", arches)
    output = Path(output).resolve()
    source = Path(source).resolve()
    if not any(path.suffix == ".cu" for path in _files(source)):
        raise FileNotFoundError(f"no CUDA source (*.cu) in {source}")
    nvcc, ninja, torch = tools()
    output.parent.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ)
    with contextlib.ExitStack() as stack:
        if build_dir is None:
            build_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            env["TMPDIR"] = str(build_dir)  # nvcc, interrupted, leaves its files
            log = output.with_suffix(".log")
        else:
            build_dir = Path(build_dir).resolve()
            stack.enter_context(_locked(build_dir))
            log = build_dir / "build.log"
        (build_dir / "build.ninja").write_text(_ninja_file(source, nvcc, torch, arches))
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        command = [ninja, "-v", "-C", str(build_dir), "-j", str(_jobs())]
        if _run(command, env, log, f"{nvcc}\n{version}\n", progress, arches):
            raise RuntimeError("the CUDA kernels did not compile:\n  " +
                               "\n  ".join(_first_errors(log.read_text())) +
                               f"\nnvcc's whole output is in {log}")
        part = output.with_name(f"{output.name}.{os.getpid()}.part")
        try:
            shutil.copy(build_dir / LIBRARY, part)
            os.replace(part, output)
        finally:
            part.unlink(missing_ok=True)
    return log


def check_arches(argument: str, value: object) -> list[str]:
    """The chips in rising order, each once.

    Raises:
        ValueError: not a list of chips, named as ``argument`` (the form of errors of checks.py,
        which this file cannot import).
    """
    good = isinstance(value, Sequence) and not isinstance(value, str) and value and all(
        isinstance(arch, str) and re.fullmatch(r"(7[5-9]|8\d|(9|1[0-9])\d[af]?)", arch)
        for arch in value)
    if not good:
        raise ValueError(f"{argument}={value!r} is not allowed: it must be a list of one or more "
                         "chips as nvcc names them, without sm_, such as ['80', '90a', '120a'], "
                         "from '75' on, and with the letter only from '90' on")
    return sorted(set(value), key=lambda arch: (int(arch.rstrip("af")), arch))


def _visible_arches() -> list[str]:
    """Chips of the visible GPUs; the letter allows the instructions that only this chip has."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}{minor}{'a' if major >= 9 else ''}"
            for major, minor in sorted(found) if (major, minor) >= (7, 5)]


def _files(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*") if path.suffix in SUFFIXES)


def _cache_path(source: Path, arches: Sequence[str]) -> Path:
    """Where ``build`` keeps a library. nvcc's version is no part of the key: a machine that has
    the library may have no nvcc."""
    key = hashlib.sha256()
    arches = check_arches("arches", arches)
    parts = [*FLAGS, *LINK_FLAGS, *arches, platform.machine()]
    for path in _files(source):
        parts += [str(path.relative_to(source)), path.read_bytes()]
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        key.update(b"%d " % len(part) + part)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "secura_kernels" / f"cuda-{key.hexdigest()[:24]}" / LIBRARY


def tools() -> tuple[str, str, Path]:
    """nvcc, ninja, and torch's folder.

    Raises:
        RuntimeError: names everything that is missing, and how to get it.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [str(Path(home, "bin")) for home in homes if home]
    path = os.environ.get("PATH", "")
    nvcc = shutil.which("nvcc", path=os.pathsep.join(
        [*folders, path, str(DEFAULT_CUDA / "bin")]))
    # The scripts of a virtual environment that runs without having been activated.
    ninja = shutil.which("ninja", path=os.pathsep.join([sysconfig.get_path("scripts"), path]))
    found = importlib.util.find_spec("torch")
    torch = Path(next(iter(found.submodule_search_locations))) if found else None
    missing = []
    if sys.platform != "linux":
        missing.append("Linux: the CUDA kernels are built there only")
    if nvcc is None:
        missing.append("nvcc: install the CUDA toolkit (developer.nvidia.com/cuda-downloads) and "
                       "set CUDA_HOME to its folder; looked in $CUDA_HOME/bin, $CUDA_PATH/bin, "
                       f"$PATH and {DEFAULT_CUDA}/bin")
    if not (os.environ.get("NVCC_CCBIN") or shutil.which("g++")):
        missing.append("a C++ compiler: install g++ (apt install g++), or set NVCC_CCBIN to one")
    if ninja is None:
        missing.append("ninja: pip install ninja")
    if torch is None or not (torch / "include/torch/csrc/stable/library.h").is_file():
        missing.append("torch's headers: pip install 'torch>=2.11', and let pip's build see it: "
                       "SECURA_BUILD_CUDA=1 pip install --no-build-isolation .")
    if missing:
        raise RuntimeError("the CUDA kernels cannot be compiled here; missing:\n- " +
                           "\n- ".join(missing))
    return nvcc, ninja, torch


def _ninja_file(source: Path, nvcc: str, torch: Path, arches: Sequence[str]) -> str:
    def path(value: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(value))

    def words(values: Sequence[object]) -> str:
        return shlex.join(map(str, values)).replace("$", "$$")

    chips = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in arches]
    includes = ["-I", source, "-isystem", torch / "include"]
    lines = [
        f"compile = {words([nvcc, '-c', *FLAGS, *chips, *includes])}",
        f"link = {words([nvcc, *chips, '-L', torch / 'lib'])}",
        f"link_flags = {words(LINK_FLAGS)}",
        "rule compile", "  command = $compile $in -o $out -MD -MF $out.d",
        "  depfile = $out.d", "  deps = gcc",
        "rule link", "  command = $link $in $link_flags -o $out",
    ]
    objects = []
    for file in _files(source):
        if file.suffix in (".cu", ".cpp"):
            objects.append(path(f"{file.relative_to(source)}.o"))
            lines.append(f"build {objects[-1]}: compile {path(file)}")
    return "\n".join([*lines, f"build {LIBRARY}: link {' '.join(objects)}", ""])


def _jobs() -> int:
    jobs = os.environ.get("MAX_JOBS", "")
    return int(jobs) if jobs.isdigit() and int(jobs) else len(os.sched_getaffinity(0))


def _run(command: list[str], env: dict[str, str], log: Path, head: str, progress: bool | None,
         arches: Sequence[str]) -> int:
    """Runs ninja, its output to ``log``; returns its exit status."""
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
        ninja = subprocess.Popen(command, text=True, errors="replace", stdin=subprocess.DEVNULL,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)
        try:
            for line in ninja.stdout:
                file.write(line)
                step = re.match(r"\[(\d+)/(\d+)\] ", line)
                if bar is not None and step:
                    bar.total = int(step[2])
                    bar.update(int(step[1]) - bar.n)
            return ninja.wait()
        finally:
            # Interrupted: ninja, asked to end, ends its compilers and drops their half outputs.
            if ninja.poll() is None:
                ninja.terminate()
                try:
                    ninja.wait(10)
                except subprocess.TimeoutExpired:
                    ninja.kill()
            ninja.stdout.close()


def _first_errors(output: str, count: int = 10) -> list[str]:
    """The first errors of the compiler or linker, else the last lines."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(
        r"\berror\b|\bfatal\b|undefined reference|cannot find", line) and not line.startswith("[")]
    return errors[:count] or lines[-count:]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time in ``folder``, which is made; a process that dies lets go."""
    import fcntl  # of Unix only

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that compiles in {folder}", file=sys.stderr,
                  flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
