"""Pure Python by default. With SECURA_BUILD_CUDA=1 the wheel (or the checkout, if editable) also
gets csrc/ compiled, for the chips in SECURA_CUDA_ARCHES."""

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("secura_kernels", "backends", "cuda")
COMPILE = os.environ.get("SECURA_BUILD_CUDA", "") not in ("", "0")
ARCHES = os.environ.get("SECURA_CUDA_ARCHES") or "75;80;86;89;90a;100a;120a"


def builder():
    """compiler.py by its path: importing the package would need its dependencies."""
    spec = importlib.util.spec_from_file_location("secura_build", ROOT / PACKAGE / "compiler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
            compiler = builder()
            try:
                arches = compiler.check_arches("SECURA_CUDA_ARCHES", re.split("[;,]", ARCHES))
                compiler.compile_library(ROOT / "csrc", package / compiler.LIBRARY, arches,
                                         ROOT / "build" / "csrc")
            except (RuntimeError, ValueError) as error:  # no traceback for the user
                sys.exit(f"SECURA_BUILD_CUDA=1: {error}")

    def get_source_files(self):
        return []  # MANIFEST.in names them

    def get_outputs(self):
        return []  # found in build_lib


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
