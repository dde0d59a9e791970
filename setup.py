"""Pure Python by default. With SECURA_BUILD_CUDA=1 the wheel (or the checkout, if editable) also
gets csrc/ compiled, for the chips in SECURA_CUDA_ARCHES (default: those of CHIPS in
cuda/toolchain.py that nvcc knows)."""

import importlib
import importlib.util
import os
import re
import shutil
import sys
import types
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError, LinkError

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("secura_kernels", "backends", "cuda")
OBJECTS = Path("build", "csrc")
COMPILE = os.environ.get("SECURA_BUILD_CUDA", "") not in ("", "0")
ARCHES = os.environ.get("SECURA_CUDA_ARCHES") or None
NO_TORCH = (
    "SECURA_BUILD_CUDA=1 compiles against the torch that is installed, and there is none, "
    "or pip's isolated build does not see it: pip install 'torch>=2.11' 'setuptools>=77' "
    "ninja, then SECURA_BUILD_CUDA=1 pip install --no-build-isolation ."
)


def part(name):
    """A module of cuda/ without the package, which would need its dependencies."""
    package = types.ModuleType("secura_build")
    package.__path__ = [str(ROOT / PACKAGE)]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.{name}")


class BuildCsrc(Command):
    """Puts csrc/ into the package, and with SECURA_BUILD_CUDA=1 the library made of it."""

    user_options = ()
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        package = ROOT / PACKAGE
        if not self.editable_mode:
            package = Path(self.build_lib, PACKAGE)
            shutil.rmtree(package / "csrc", ignore_errors=True)  # of an earlier build
            shutil.copytree(ROOT / "csrc", package / "csrc")
        if COMPILE:
            if importlib.util.find_spec("torch") is None:
                sys.exit(NO_TORCH)
            try:
                compile_to(package)
            except (OSError, RuntimeError, ValueError, CompileError, LinkError) as error:
                sys.exit(f"SECURA_BUILD_CUDA=1: {error}")  # no traceback for the user

    def get_source_files(self):
        return []  # MANIFEST.in names them

    def get_outputs(self):
        return []  # found in build_lib


def compile_to(package):
    """The library, by torch's builder where torch has CUDA, else by nvcc alone."""
    compiler, toolchain = part("compiler"), part("toolchain")
    arches = ARCHES and toolchain.check_arches("SECURA_CUDA_ARCHES", re.split("[;,]", ARCHES))
    if toolchain.torch_cuda() is None:
        compiler.compile_library(ROOT / "csrc", package / compiler.LIBRARY, arches, ROOT / OBJECTS)
        return
    commands, found = part("commands"), toolchain.tools()
    os.environ |= commands.torch_environment(found)
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    chips = toolchain.gencode(toolchain.chips_for(found.nvcc, arches))
    extension = CUDAExtension(
        Path(commands.LIBRARY).stem,
        [str(unit) for unit in commands.units(Path("csrc"))],
        include_dirs=["csrc"],
        py_limited_api=True,
        extra_link_args=commands.CXX_LINK_FLAGS,
        extra_compile_args={
            "cxx": [*commands.CXX_FLAGS, commands.stamp(ROOT / "csrc")],
            "nvcc": [*commands.FLAGS, *chips],
        },
    )
    extension.libraries = []  # CUDAExtension's tie the library to this torch's CUDA
    build_ext = BuildExtension(
        Distribution({"ext_modules": [extension]}), no_python_abi_suffix=True
    )
    build_ext.build_lib, build_ext.build_temp = str(package), str(OBJECTS)
    build_ext.ensure_finalized()
    build_ext.run()


class PlatformDistribution(Distribution):
    """Bound to a platform where it carries the library."""

    def has_ext_modules(self):
        return COMPILE


class Wheel(bdist_wheel):
    """The library knows torch's stable ABI alone, so one wheel fits every Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


build.sub_commands = [*build.sub_commands, ("build_csrc", None)]
setup(distclass=PlatformDistribution, cmdclass={"build_csrc": BuildCsrc, "bdist_wheel": Wheel})
