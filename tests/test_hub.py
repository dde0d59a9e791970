"""The form for the Hugging Face kernel hub: the assembled project loads as the hub's kernels do,
beside the installed package, and computes the same to the bit.

Building it takes kernel-builder and Nix, which these tests do without: for a kernel without
compiled parts a build is the files of ``torch-ext/`` and ``metadata.json``.
"""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import secura_kernels
from secura_kernels.functional import cur_epilogue

ROOT = Path(__file__).parents[1]
ID = "_secura_kernels_cpu_0123abc"  # as kernel-builder names a build, and its ops' namespace


def assemble(out: Path) -> Path:
    done = subprocess.run(
        [sys.executable, ROOT / "hub/assemble.py", out], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return assemble(tmp_path_factory.mktemp("hub") / "secura-kernels")


@pytest.fixture(scope="module")
def built(project) -> Path:
    """The project with what a build for CPUs adds to it."""
    variant = project / "build" / "torch-cpu"
    shutil.copytree(project / "torch-ext" / "secura_kernels", variant)
    general = tomllib.loads((project / "build.toml").read_text())["general"]
    metadata = dict(
        {name: general[name] for name in ("name", "version", "license")},
        **{"id": ID, "python-depends": [], "backend": {"type": "cpu"}},
    )
    (variant / "metadata.json").write_text(json.dumps(metadata))
    return project


@pytest.fixture(scope="module")
def kernel(built):
    """Imported as the hub's loader does: by path, under the build's name."""
    path = built / "build" / "torch-cpu" / "__init__.py"
    spec = importlib.util.spec_from_file_location(ID, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[ID] = module
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == ID]:
        del sys.modules[name]


def test_its_functions_are_the_packages_beside_it(kernel):
    assert sorted(kernel.__all__) == kernel.__all__ and all(
        hasattr(kernel, n) for n in kernel.__all__
    )
    assert kernel.cur_linear is not secura_kernels.cur_linear
    torch.manual_seed(0)
    W, bias, x = torch.randn(24, 40), torch.randn(24), torch.randn(5, 40, requires_grad=True)
    core = torch.randn(8, 8, requires_grad=True)
    cols, rows = kernel.select(W, 8, "lowest")

    def both(package, epilogue):
        norm = package.SMagNorm()
        y = package.cur_linear(x, W, core, cols=cols, rows=rows, bias=bias, norm=norm)
        z = epilogue(x @ W.T, x @ W[rows].T, core, W[:, cols], norm=norm)
        return y, z, *torch.autograd.grad((y * z).sum(), [x, core])

    for ours, theirs in zip(
        both(kernel, kernel.cur_epilogue), both(secura_kernels, cur_epilogue), strict=True
    ):
        assert torch.equal(ours, theirs)
    compiled = torch.compile(kernel.cur_linear, backend="eager", fullgraph=True)
    assert torch.equal(
        compiled(x, W, core, cols=cols, rows=rows),
        kernel.cur_linear(x, W, core, cols=cols, rows=rows),
    )


def test_ops_are_registered_under_the_builds_name(kernel):
    """The hub asks for this, so that several versions can be loaded at once."""
    assert hasattr(torch.ops, ID) and hasattr(getattr(torch.ops, ID), "cur_linear_fwd")
    sharding = sys.modules[f"{ID}.ops.sharding"]
    assert sharding.NAMESPACE == ID
    assert sys.modules["secura_kernels.ops.sharding"].NAMESPACE == "secura"


def test_without_the_cuda_kernels(kernel):
    """They are in the package alone; asked for by name, or by ``"auto"``, that is said."""
    W, core, indices = torch.randn(16, 16), torch.zeros(4, 4), torch.arange(4)
    with pytest.raises(RuntimeError, match="in the package secura-kernels"):
        kernel.cur_linear(W, W, core, cols=indices, rows=indices, impl="cuda")
    registry = sys.modules[f"{ID}.ops.registry"]
    assert "kernel hub" in registry.why_unavailable("cuda", torch.device("cuda"))


def test_imports_are_what_the_hub_allows(project):
    """The standard library, torch, Triton, and the kernel itself by relative imports; numpy only in
    the module that mends Triton's interpreter, which no user's GPU runs."""
    root = project / "torch-ext" / "secura_kernels"
    files = list(root.rglob("*.py"))
    assert len(files) > 30 and not list(root.rglob("*.so"))
    assert not (root / root.name).exists()  # the hub puts a folder of this name there itself
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in files:
        extra = {"numpy"} if path.name == "interpreter.py" else set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found = {node.module.partition(".")[0]}
            else:
                continue
            assert found <= allowed | extra, (path, found)


def test_project_names_what_it_holds(project):
    build = tomllib.loads((project / "build.toml").read_text())
    assert build["general"]["edition"] == 5 and "torch-noarch" in build
    assert build["general"]["name"].replace("-", "_") == "secura_kernels"
    assert build["general"]["license"] == secura_license()
    init = (project / "torch-ext" / "secura_kernels" / "__init__.py").read_text()
    for name in ast.literal_eval(init.rpartition("__all__ = ")[2]):
        assert f"`{name}`" in (project / "CARD.md").read_text(), name


def secura_license() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"].lower()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("")
    done = subprocess.run(
        [sys.executable, ROOT / "hub/assemble.py", tmp_path], capture_output=True, text=True
    )
    assert done.returncode != 0 and "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_kernels_own_loader_and_benchmark(built):
    """The package ``kernels`` itself: its schema of build.toml, its loader, its benchmark."""
    kernels = pytest.importorskip("kernels")
    pytest.importorskip("tabulate")
    from kernels._rust import Backend, Build

    assert Build.open(built).general.backends == [Backend.CPU, Backend.CUDA]
    assert callable(kernels.get_local_kernel(built, backend="cpu").cur_linear)
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from kernels.cli import main; main()"),
            *("benchmark", built, "--iterations", "1", "--warmup", "0"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("✓") >= 3, done.stderr
