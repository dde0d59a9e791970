"""What is looked for before csrc/ is compiled, and what is said where it is missing or does not
fit; with CUDA toolkits that only look like one."""

import shutil
from pathlib import Path

import pytest
import torch
from cuda_sources import fake_toolkit, write_tiny

from secura_kernels.backends.cuda import compiler, toolchain


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes a machine's PATH out of these programs alone, each a link to a real one."""
    for name in ("CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain, "DEFAULT_CUDA", tmp_path)
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def only(**programs: str) -> None:
        folder = tmp_path / "path"
        folder.mkdir()
        for name, real in programs.items():
            (folder / name.replace("cxx", "c++").replace("gxx", "g++")).symlink_to(
                shutil.which(real) or pytest.skip(f"{real} is missing")
            )
        monkeypatch.setenv("PATH", str(folder))

    return only


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """Makes a toolkit that only looks like one, and CUDA_HOME name it."""
    monkeypatch.setattr(torch.version, "cuda", None)  # torch's builder would call a real g++ too

    def make(version: str = "13.0", chips: str = "75 80 86 89 90 100 120") -> Path:
        home = fake_toolkit(tmp_path / f"cuda-{version}", version, chips)
        monkeypatch.setenv("CUDA_HOME", str(home))
        return home

    return make


def compiled(tmp_path: Path, home: Path, arches=None) -> str:
    """What nvcc was called with."""
    source = write_tiny(tmp_path / "source")
    compiler.compile_library(source, tmp_path / "lib.so", arches, progress=False)
    return (home / "calls").read_text()


def test_missing_tools_are_named_together(machine):
    machine()
    with pytest.raises(RuntimeError, match="missing") as caught:
        toolchain.tools()
    for part in ("nvcc", "CUDA_HOME", "g++", "ninja: pip install ninja"):
        assert part in str(caught.value)


def test_no_ninja(machine, toolkit):
    machine(gxx="g++")
    toolkit()
    with pytest.raises(RuntimeError, match=r"missing:\n- ninja: pip install ninja$"):
        toolchain.tools()


def test_no_compiler_by_the_name_of_gxx(machine, toolkit, monkeypatch):
    machine(cxx="c++", ninja="ninja")
    toolkit()
    assert Path(toolchain.tools().host).name == "c++"
    monkeypatch.setenv("CXX", "g++-99")
    with pytest.raises(RuntimeError, match=r"CXX is 'g\+\+-99', which is not there; correct or"):
        toolchain.tools()


@pytest.mark.parametrize("value", ["my-c++", "env my-c++ -m64"])
def test_cxx_is_what_nvcc_calls(machine, toolkit, tmp_path, monkeypatch, value):
    machine(**{"gxx": "g++", "my-cxx": "g++", "ninja": "ninja", "sh": "sh"})
    home = toolkit()
    monkeypatch.setenv("CXX", value)
    calls = compiled(tmp_path, home, ["80"]).splitlines()
    assert len(calls) == 3 and all(f"{tmp_path}/path/my-c++ " in call for call in calls)


def test_nvccs_own_variable_goes_before_cxx(machine, toolkit, monkeypatch):
    """For nvcc alone."""
    machine(gxx="g++", ninja="ninja")
    toolkit()
    monkeypatch.setenv("CXX", "g++")
    monkeypatch.setenv("NVCC_CCBIN", "/opt/other/g++")
    found = toolchain.tools()
    assert found.ccbin == "/opt/other/g++" and Path(found.host).name == "g++"


@pytest.mark.parametrize("version, torchs", [("12.4", "13.0"), ("13.0", "12.8")])
def test_toolkit_of_another_cuda_than_torchs(toolkit, monkeypatch, version, torchs):
    home = toolkit(version)
    monkeypatch.setattr(torch.version, "cuda", torchs)
    with pytest.raises(RuntimeError, match="first numbers must be equal") as caught:
        toolchain.tools()
    assert f"{home}/bin/nvcc is of CUDA {version}.1, torch of CUDA {torchs}" in str(caught.value)
    assert f"the folder of a CUDA {torchs[:2]} toolkit" in str(caught.value)
    monkeypatch.setattr(torch.version, "cuda", version)
    assert toolchain.tools().version == f"{version}.1"


def test_nvcc_that_does_not_run(toolkit, tmp_path):
    nvcc = toolkit() / "bin/nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(RuntimeError, match="--version names no version; set CUDA_HOME"):
        toolchain.tools()
    nvcc.write_text(f"#!{tmp_path}/no-such-program\n")
    with pytest.raises(RuntimeError, match=r"does not run: .*; set CUDA_HOME"):
        toolchain.tools()


def test_all_chips_that_nvcc_knows_and_ptx_of_the_newest(toolkit, tmp_path):
    home = toolkit("12.4", "50 70 75 80 86 87 89 90")
    flags = compiled(tmp_path, home)
    for chip in (75, 80, 86, 89, 90):
        assert f"-gencode=arch=compute_{chip},code=sm_{chip} " in flags
    assert "sm_87" not in flags and "_100" not in flags
    assert flags.count("code=compute_") == flags.count("code=compute_90") > 0
    assert all(chip.isdigit() for chip in toolchain.CHIPS)


def test_chips_that_nvcc_does_not_know(toolkit, tmp_path):
    home = toolkit("12.4", "80 90")
    with pytest.raises(RuntimeError, match="does not know the chips 100, 120a, only 80, 90; inst"):
        compiled(tmp_path, home, ["80", "100", "120a"])
    with pytest.raises(RuntimeError, match=r"does not know the chips 75, .*120, only 50"):
        toolchain.chips_for(str(toolkit("10.1", "50") / "bin/nvcc"), None)


def test_ptx_is_of_a_chip_without_a_letter():
    assert toolchain.gencode(["80", "90a"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    assert toolchain.gencode(["80"])[-1] == "-gencode=arch=compute_80,code=compute_80"


def test_gpu_newer_than_nvcc(toolkit, tmp_path, monkeypatch):
    """Compiled for the last chip that nvcc knows, whose PTX the driver translates; but kept as that
    of the GPU, so that it is found."""
    home = toolkit("12.4", "80 90")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_name", lambda arches: "103" if arches is None else arches[0])
    source = write_tiny(tmp_path / "source")
    library = compiler.build(source=source, progress=False)
    assert compiler.cached(source=source) == library
    assert compiler.cached(["90"], source=source) is None
    calls = (home / "calls").read_text()
    assert "code=sm_90 " in calls and "code=compute_90 " in calls and "103" not in calls


def test_toolkits_folder(tmp_path):
    """nvcc may be a script that calls the real one."""
    home = fake_toolkit(tmp_path / "here")
    assert toolchain.toolkit(str(home / "bin/nvcc")) == home
    script = tmp_path / "bin/nvcc"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho '#$ _HERE_=/opt/cuda-13.0/bin' >&2\n")
    script.chmod(0o755)
    assert toolchain.toolkit(str(script)) == Path("/opt/cuda-13.0")
