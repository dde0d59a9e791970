"""How csrc/ is compiled and cached, on a source folder of one small kernel."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from cuda_sources import (
    TINY,
    fake_toolkit,
    needed,
    torch_with_cuda,  # noqa: F401  a fixture
    write_tiny,
)

from secura_kernels.backends.cuda import compiler as builder
from secura_kernels.backends.cuda import toolchain

ROOT = Path(__file__).parents[1]
try:
    builder.tools()
    MISSING = ""
except RuntimeError as error:
    MISSING = str(error)
compiles = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """The sources, under a name that needs quoting; the user's cache is an empty folder. They are
    compiled by nvcc alone: torch's builder would call a g++ beside a toolkit that is none."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_tiny(tmp_path / "tiny source")


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """Makes a toolkit that only looks like one, and CUDA_HOME name it; "": none is there."""
    if shutil.which("ninja") is None:
        pytest.skip("ninja is missing")
    monkeypatch.setenv("NVCC_CCBIN", "g++")

    def use(version: str, **more: str) -> Path:
        home = tmp_path / f"cuda-{version}"
        if version and not home.exists():
            fake_toolkit(home, version, **more)
        monkeypatch.setenv("CUDA_HOME", str(home))
        if not version:
            monkeypatch.setattr(toolchain.shutil, "which", lambda *_, **__: None)
        return home

    return use


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """The library of the small source, and the log."""
    if MISSING:
        pytest.skip(MISSING)
    folder = tmp_path_factory.mktemp("built")
    source, library = write_tiny(folder / "src", op=True), folder / builder.LIBRARY
    log = builder.compile_library(source, library, ["80"], progress=False)
    return library, log.read_text()


def test_library_has_the_op_and_needs_little_of_torch(built):
    library, log = built
    program = (
        "import sys, torch\ntorch.ops.load_library(sys.argv[1])\n"
        "print(torch.ops.secura_tiny.twice.default._schema)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(library)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "secura_tiny::twice(Tensor x) -> Tensor", done.stderr
    assert "twice_kernel" in log and "registers" in log and "0 bytes spill stores" in log


def test_library_links_only_libtorch_cpu(built):
    assert needed(built[0]) == {"libtorch_cpu"}
    # A second CUDA runtime in the process would take over the calls.
    assert " cuda" not in subprocess.check_output(["nm", "-D", built[0]], text=True)


@compiles
@pytest.mark.usefixtures("torch_with_cuda")
def test_torchs_builder_where_torch_has_cuda(tmp_path, monkeypatch):
    """``torch.utils.cpp_extension.load``; the library is tied to this torch's CUDA no more than
    nvcc's, nor to this Python."""
    monkeypatch.setenv("CXX", "env g++ -m64")  # of which torch's builder would make one name
    library = tmp_path / "made" / builder.LIBRARY
    source = write_tiny(tmp_path / "the source", op=True)
    log = builder.compile_library(source, library, ["80"], progress=False).read_text()
    assert "torch.utils.cpp_extension" in log and "twice_kernel" in log and "registers" in log
    assert needed(library) <= {"libtorch_cpu", "libc10"}
    assert " cuda" not in subprocess.check_output(["nm", "-D", library], text=True)
    (source / "twice.cu").write_text("void twice() { unknown_name = 1; }\n")
    with pytest.raises(RuntimeError, match=r"did not compile:\n .*unknown_name"):
        builder.compile_library(source, library, ["80"], progress=False)


@compiles
@pytest.mark.gpu
def test_op_runs(built):
    """By its code for sm_80, or on a later chip by the PTX."""
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        pytest.skip(f"compiled for sm_80, this is sm_{major}{minor}")
    torch.ops.load_library(built[0])
    x = torch.randn(1000, device="cuda")
    assert torch.equal(torch.ops.secura_tiny.twice(x), 2 * x)


def test_build_is_cached_and_found_without_nvcc(tiny, toolkit, capsys):
    toolkit("13.0")
    assert builder.cached(["80"], source=tiny) is None
    library = builder.build(["80"], source=tiny, progress=True)
    assert "compiling secura_kernels CUDA kernels: 100%" in capsys.readouterr().err
    assert library.is_file() and library.with_suffix(".log").is_file()
    assert library.is_relative_to(os.environ["XDG_CACHE_HOME"])
    toolkit("")
    assert builder.build(["80", "80"], source=tiny) == library
    assert builder.cached(["80"], source=tiny) == library
    assert capsys.readouterr().err == ""
    with pytest.raises(RuntimeError, match="missing"):
        builder.build(["80"], source=tiny, force=True)
    assert builder.cached(["86"], source=tiny) is None
    (tiny / "passes.h").write_text(TINY["passes.h"] + "// changed\n")
    assert builder.cached(["80"], source=tiny) is None


def test_a_library_a_chip_and_nvcc(tiny, toolkit):
    """Each is compiled once; the one that ``build`` was last asked for is found."""
    calls = toolkit("13.0") / "calls"
    first = builder.build(["80"], source=tiny, progress=False)
    assert builder.build(["90"], source=tiny, progress=False) != first
    count = len(calls.read_text().splitlines())
    assert builder.build(["80"], source=tiny, progress=False) == first
    toolkit("13.1")
    second = builder.build(["80"], source=tiny, progress=False)
    assert second != first and builder.cached(["80"], source=tiny) == second
    toolkit("13.0")
    assert builder.build(["80"], source=tiny, progress=False) == first
    assert builder.cached(["80"], source=tiny) == first
    assert len(calls.read_text().splitlines()) == count


def test_force_compiles_again(tiny, toolkit):
    calls = toolkit("13.0") / "calls"
    library = builder.build(["80"], source=tiny, progress=False)
    count = len(calls.read_text().splitlines())
    library.write_text("spoiled")
    assert builder.build(["80"], source=tiny, progress=False) == library
    assert library.read_text() == "spoiled"
    assert builder.build(["80"], source=tiny, progress=False, force=True) == library
    assert library.read_text() == "made by 13.0\n"
    assert len(calls.read_text().splitlines()) == 2 * count


def test_nowhere_to_keep_it(tiny, toolkit, tmp_path, monkeypatch):
    toolkit("13.0")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # stands for one that is read-only
    with pytest.raises(RuntimeError, match=r"cannot be kept in .*/file/.* set XDG_CACHE_HOME to a"):
        builder.build(["80"], source=tiny)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    for call in builder.build, builder.cached:
        with pytest.raises(RuntimeError, match="neither XDG_CACHE_HOME nor HOME is set; set XDG"):
            call(["80"], source=tiny)


@compiles
def test_build_dir_compiles_only_what_changed(tiny, tmp_path):
    def run() -> str:
        return builder.compile_library(
            tiny, tmp_path / "lib.so", ["80"], tmp_path / "objects", progress=False
        ).read_text()

    assert "twice.cu.o" in run()
    (tiny / "ops.cpp").write_text(TINY["ops.cpp"] + "// changed\n")
    log = run()
    assert "-o ops.cpp.o" in log and "-o twice.cu.o" not in log


@compiles
def test_failed_compile_names_the_error_and_the_log(tiny, tmp_path):
    library = tmp_path / "lib.so"
    (tiny / "twice.cu").write_text("void twice() { unknown_name = 1; }\n")
    with pytest.raises(RuntimeError, match="unknown_name") as caught:
        builder.compile_library(tiny, library, ["80"], progress=False)
    assert str(library.with_suffix(".log")) in str(caught.value)
    assert "unknown_name" in library.with_suffix(".log").read_text()
    assert not library.exists()


@compiles
def test_undefined_symbol_fails_at_link_time(tiny, tmp_path):
    """Such as one that only libtorch_cuda has."""
    (tiny / "twice.cu").write_text("\n")
    with pytest.raises(RuntimeError, match=r"undefined reference to .*twice"):
        builder.compile_library(tiny, tmp_path / "lib.so", ["80"], progress=False)


def test_two_processes_at_once_compile_once(tiny, toolkit):
    calls = toolkit("13.0", compiles='sleep 0.3; : > "$out"') / "calls"
    program = (
        "import sys; from pathlib import Path\n"
        "from secura_kernels.backends.cuda import compiler\n"
        "import torch; torch.version.cuda = None\n"
        "print(compiler.build(['80'], source=Path(sys.argv[1]), progress=False))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tiny)],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    ends = [process.communicate(timeout=100) for process in both]
    assert ends[0][0] == ends[1][0] != "" and not any(process.returncode for process in both), ends
    assert Path(ends[0][0].strip()).is_file()
    assert len(calls.read_text().splitlines()) == 3


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ctrl_c_ends_the_compilers_and_leaves_no_library(tiny, toolkit, tmp_path):
    """nvcc is a stand-in here: it notes its process and sleeps."""
    notes = tmp_path / "pids"
    toolkit("13.0", compiles=f'echo $$ >> "{notes}"; exec sleep 60')

    def interrupt():
        while not notes.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        builder.build(["80"], source=tiny, progress=False)
    assert time.monotonic() - start < 15
    while any(map(is_running, notes.read_text().split())):
        assert time.monotonic() - start < 15
        time.sleep(0.02)
    assert builder.cached(["80"], source=tiny) is None


@pytest.mark.parametrize("bad", ["80", ["sm_80"], "abc", ["abc"], [], ["70"], ["80a"], [90], 80])
def test_bad_arches(tiny, tmp_path, bad):
    for call in (
        lambda: builder.build(bad, source=tiny),
        lambda: builder.cached(bad, source=tiny),
        lambda: builder.compile_library(tiny, tmp_path / "lib.so", bad),
    ):
        with pytest.raises(ValueError, match="is not allowed: it must be a list") as e:
            call()
        assert str(e.value).startswith(f"arches={bad!r} ")


def test_chip_of_the_current_gpu(tiny, toolkit, monkeypatch):
    toolkit("13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert builder._name(None) == "86"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"no NVIDIA GPU .*arches="):
        builder.build(source=tiny)
    assert builder.cached(source=tiny) is None


def test_sources(tiny, tmp_path, monkeypatch):
    assert builder.sources() == ROOT / "csrc"
    package = tmp_path / "site-packages/secura_kernels/backends/cuda"
    monkeypatch.setattr(builder, "HERE", package)
    with pytest.raises(FileNotFoundError, match="CUDA sources are missing"):
        builder.sources()
    assert write_tiny(package / "csrc") == builder.sources()
