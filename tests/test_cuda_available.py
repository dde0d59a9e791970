"""Whether impl="cuda" can run, and what is said where it cannot; no library is loaded here."""

import os
from pathlib import Path

import pytest
import torch
from cuda_sources import write_tiny

from secura_kernels.__main__ import info
from secura_kernels.backends.cuda import compiler, library
from secura_kernels.ops import resolve

A100, T4, ONE_DTYPE = torch.device("cuda", 0), torch.device("cuda", 1), (torch.bfloat16, 64)


class Machine:
    """Two GPUs, the package's folder, the user's cache, and what was loaded and asked."""

    def __init__(self, folder: Path) -> None:
        self.package, self.cache = folder / "package", folder / "cache/secura_kernels"
        self.source = write_tiny(self.package / "csrc")
        self.loaded, self.asked, self.trouble = [], [], {}

    def made(self, path: Path, of: str | None = None) -> Path:
        """A library of these sources, or of those with this digest."""
        path.parent.mkdir(parents=True, exist_ok=True)
        stamp = f"secura_cuda sources {of or compiler.digest(self.source)}"
        path.write_bytes(b"\x7fELF " + stamp.encode() + b"\0 and so on")
        return path

    def build(self, chip: str = "80") -> Path:
        entry = compiler._entry(self.source, chip)
        return self.made(self.cache / f"{entry}13.0.1" / compiler.LIBRARY)

    def install(self, of: str | None = None) -> Path:
        return self.made(self.package / compiler.LIBRARY, of)

    def probe(self, name: str, like: None, *arguments) -> None:
        self.asked.append(name)
        if trouble := self.trouble.get(len(self.asked)):
            raise RuntimeError(f"probe() failed: {trouble}\nand a stack")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    machine = Machine(tmp_path)
    monkeypatch.setattr(compiler, "HERE", machine.package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_capability",
        lambda device: [(8, 0), (7, 5)][getattr(device, "index", device)],
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.ops, "load_library", machine.loaded.append)
    monkeypatch.setattr(library, "SCHEMAS", {})
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(library, "call", machine.probe)
    monkeypatch.setattr(library, "_registered_for", lambda key: False)  # of no simulated GPU
    library._why_no_library.cache_clear()
    yield machine
    library._why_no_library.cache_clear()


def why(device: torch.device = A100) -> str | None:
    return library.why_unavailable(device, *ONE_DTYPE)


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="for a CPU build of torch")
def test_a_gpu_asked_of_a_cpu_build_of_torch():
    assert why() == "Torch not compiled with CUDA enabled"


def test_not_built(machine):
    assert "not built for compute capability 8.0: secura_kernels.backends.cuda.build()" in why()
    machine.build("75")
    assert "not built" in why()  # that one is another chip's


def test_too_old(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert why() == "the GPU has compute capability 7.0; the CUDA kernels need 7.5"


def test_built_is_found_loaded_and_asked_once(machine):
    path = machine.build()
    for _ in range(3):
        assert why() is None
    assert machine.loaded == [str(path)] and machine.asked == ["probe"]


def test_installed_goes_before_built(machine):
    machine.build()
    path = machine.install()
    assert why() is None and machine.loaded == [str(path)]


def test_installed_of_other_sources(machine):
    """It is refused before it is loaded: ops of a library stay for the life of the process."""
    path = machine.install(of="0" * 64)
    assert why() == (
        f"{path} was built from other sources than this version of secura_kernels; "
        "secura_kernels.backends.cuda.build() compiles these, or install again with "
        "SECURA_BUILD_CUDA=1"
    )
    with pytest.raises(RuntimeError, match="was built from other sources"):
        library.load(path)
    assert machine.loaded == []
    path.write_bytes(b"no library, or one of before there were digests")
    with pytest.raises(RuntimeError, match="was built from other sources"):
        library.load(path)
    built = machine.build()  # the remedy
    library._why_no_library.cache_clear()
    assert why() is None and machine.loaded == [str(built)]


@pytest.mark.parametrize(
    "trouble",
    [
        "no kernel image is available for execution on the device",
        "CUDA driver version is insufficient for CUDA runtime version",
    ],
)
def test_device_that_does_not_take_it(machine, trouble):
    """Asked of each device: the first may run what the second cannot."""
    path = machine.build()
    machine.trouble[2] = trouble
    assert why(A100) is None
    expected = (
        f"the CUDA kernels of {path} do not run on compute capability 7.5 here: probe() failed: "
        f"{trouble}; update the NVIDIA driver if it is older than the CUDA toolkit that compiled "
        "them, else compile them for every GPU that is here: SECURA_BUILD_CUDA=1 "
        "SECURA_CUDA_ARCHES='75;80' pip install --no-build-isolation ."
    )
    assert why(T4) == why(T4) == expected
    assert why(A100) is None and len(machine.asked) == 2 and machine.loaded == [str(path)]


def test_failed_load_is_no_library_for_another_device(machine, monkeypatch):
    machine.build("80")
    machine.build("75")
    monkeypatch.setattr(library, "SCHEMAS", {"none": "() -> ()"})  # its ops are found wanting
    for device in (A100, T4, A100):
        assert "was built from other sources" in why(device)
    assert machine.asked == []


def test_broken_library(machine, monkeypatch):
    path = machine.build()

    def load(path):
        raise OSError(f"{path}: file too short")

    monkeypatch.setattr(torch.ops, "load_library", load)
    assert why() == (
        f"the CUDA kernels cannot be loaded: {path}: file too short; "
        "secura_kernels.backends.cuda.build(force=True) compiles them again"
    )


def test_installed_that_does_not_load(machine, monkeypatch):
    """Such as one from a machine with a newer C library: what was built here is taken."""
    installed, built = machine.install(), machine.build()

    def load(path):
        if path == str(installed):
            raise OSError(f"version `GLIBC_2.99' not found (required by {path})")
        machine.loaded.append(path)

    monkeypatch.setattr(torch.ops, "load_library", load)
    assert why() is None and machine.loaded == [str(built)]


def refuse(*_):
    raise PermissionError(13, "Permission denied")


def test_unreadable_cache(machine, monkeypatch):
    machine.build()
    monkeypatch.setattr(os, "listdir", refuse)
    assert why() == (
        f"the compiled CUDA kernels in {machine.cache} cannot be read: Permission "
        "denied; set XDG_CACHE_HOME to a folder that can be read, and "
        "secura_kernels.backends.cuda.build() compiles them there"
    )


def test_no_home(machine, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert why().startswith("there is no folder for compiled CUDA kernels: neither XDG_CACHE_HOME")
    machine.install()  # needs none
    library._why_no_library.cache_clear()
    assert why() is None


def test_auto_and_info_say_why(machine, monkeypatch, capsys):
    machine.build()
    machine.trouble[1] = "no kernel image is available"
    monkeypatch.setattr("secura_kernels.backends.triton.why_unavailable", lambda *_: "no Triton")
    with pytest.warns(UserWarning, match="'reference' on cuda: no Triton; .* no kernel image"):
        assert resolve("auto", A100, *ONE_DTYPE) == "reference"
    monkeypatch.setattr("secura_kernels.__main__.check", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert info() == 0
    assert "cuda       cuda:0    cannot run: the CUDA kernels of" in capsys.readouterr().out
