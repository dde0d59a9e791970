"""What compiles csrc/: nvcc and the chips it knows, the C++ compiler, ninja, torch's headers.

setup.py loads this file without its package, so importing it needs the standard library alone.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# What an installed library is compiled for, of these what nvcc knows. No letters: code of sm_100
# runs on 10.3 as well, code of sm_100a on 10.0 alone. Later chips take the newest one's PTX.
CHIPS = ("75", "80", "86", "89", "90", "100", "120")
DEFAULT_CUDA = Path("/usr/local/cuda")


class Tools(NamedTuple):
    nvcc: str
    ninja: str
    torch: Path  # its folder
    host: str  # the C++ compiler
    ccbin: str  # the one that nvcc calls
    version: str  # nvcc's, such as 13.0.88


def tools() -> Tools:
    """What compiles here.

    Raises:
        RuntimeError: names everything that is missing, and how to get it; or an nvcc that does not
            go with torch.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [str(Path(home, "bin")) for home in homes if home]
    path = os.environ.get("PATH", "")
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*folders, path, str(DEFAULT_CUDA / "bin")]))
    # The scripts of a virtual environment that runs without having been activated.
    ninja = shutil.which("ninja", path=os.pathsep.join([sysconfig.get_path("scripts"), path]))
    found = importlib.util.find_spec("torch")
    torch = Path(next(iter(found.submodule_search_locations))) if found else None
    host, why_not = _host_compiler()
    missing = []
    if sys.platform != "linux":
        missing.append("Linux: the CUDA kernels are built there only")
    if nvcc is None:
        missing.append(
            "nvcc: install the CUDA toolkit (developer.nvidia.com/cuda-downloads) and "
            "set CUDA_HOME to its folder; looked in $CUDA_HOME/bin, $CUDA_PATH/bin, "
            f"$PATH and {DEFAULT_CUDA}/bin"
        )
    if host is None:
        missing.append(why_not)
    if ninja is None:
        missing.append("ninja: pip install ninja")
    if torch is None or not (torch / "include/torch/csrc/stable/library.h").is_file():
        missing.append(
            "torch's headers: pip install 'torch>=2.11', and let pip's build see it: "
            "SECURA_BUILD_CUDA=1 pip install --no-build-isolation ."
        )
    if missing:
        raise RuntimeError(
            "the CUDA kernels cannot be compiled here; missing:\n- " + "\n- ".join(missing)
        )
    version = nvcc_version(nvcc)
    _check_version(nvcc, version)
    return Tools(nvcc, ninja, torch, host, os.environ.get("NVCC_CCBIN") or host, version)


def torch_cuda() -> str | None:
    """The CUDA that torch was built with, such as 13.0; None: a CPU build (or one for AMD)."""
    import torch

    return torch.version.cuda


def _host_compiler() -> tuple[str | None, str]:
    """CXX, else NVCC_CCBIN, which nvcc itself reads, else g++ or c++; or None, and why."""
    if named := os.environ.get("CXX"):
        # CXX="ccache g++ -m64": nvcc and torch's builder take the compiler's name alone.
        program = [word for word in shlex.split(named) if not word.startswith("-")][-1:]
        found = shutil.which(*program) if program else None
        return found, f"a C++ compiler: CXX is {named!r}, which is not there; correct or unset it"
    named = os.environ.get("NVCC_CCBIN") or "g++"  # a folder, as nvcc allows, is not found
    found = shutil.which(named) or shutil.which("g++") or shutil.which("c++")
    return found, "a C++ compiler: install g++ (apt install g++), or set CXX to one"


def nvcc_version(nvcc: str) -> str:
    """Such as 13.0.88.

    Raises:
        RuntimeError: it does not say.
    """
    found = re.search(r"\bV(\d+\.\d+[.\d]*)", _ask(nvcc, "--version"))
    if found is None:
        raise RuntimeError(
            f"{nvcc} --version names no version; set CUDA_HOME to the folder of a CUDA toolkit"
        )
    return found[1]


def known_chips(nvcc: str) -> list[int]:
    """The chips that nvcc compiles for, in rising order."""
    return sorted(
        {int(chip) for chip in re.findall(r"\bcompute_(\d+)", _ask(nvcc, "--list-gpu-arch"))}
    )


def _ask(nvcc: str, question: str) -> str:
    try:
        done = subprocess.run([nvcc, question], capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(
            f"{nvcc} does not run: {error}; set CUDA_HOME to the folder of a CUDA "
            "toolkit for this machine"
        ) from error
    return done.stdout


def _check_version(nvcc: str, version: str) -> None:
    """What torch's own builder checks too, but not its ``load``."""
    wanted = torch_cuda()
    if wanted and wanted.partition(".")[0] != version.partition(".")[0]:
        major = wanted.partition(".")[0]
        raise RuntimeError(
            f"the CUDA kernels cannot be compiled here: {nvcc} is of CUDA {version}, torch of CUDA "
            f"{wanted}, and the first numbers must be equal; set CUDA_HOME to the folder of a CUDA "
            f"{major} toolkit, or install a torch for CUDA {version.partition('.')[0]}"
        )


def toolkit(nvcc: str) -> Path:
    """The toolkit's folder. nvcc may be a script that calls the real one, so it is asked."""
    done = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True)
    here = re.search(r"^#\$ _HERE_=(.+)$", done.stderr, re.MULTILINE)
    return Path(here[1] if here else Path(nvcc).parent).parent


def chips_for(nvcc: str, arches: Sequence[str] | None) -> list[str]:
    """The chips to compile for: ``arches``, or those of ``CHIPS`` that nvcc knows.

    Raises:
        RuntimeError: nvcc does not know one of ``arches``, or none of ``CHIPS``.
    """
    known = known_chips(nvcc)
    good = [arch for arch in arches or CHIPS if int(arch.rstrip("af")) in known]
    unknown = sorted(set(arches or CHIPS) - set(good), key=lambda arch: (len(arch), arch))
    if unknown and (arches or not good):
        raise RuntimeError(
            f"{nvcc} does not know the chips {', '.join(unknown)}, only "
            f"{', '.join(map(str, known)) or 'none'}; install a newer CUDA toolkit "
            "and set CUDA_HOME to its folder, or name other chips"
        )
    return good


def nearest_chip(nvcc: str, chip: int) -> str:
    """The chip to compile for so that it runs on ``chip``: an nvcc older than the GPU compiles for
    the last one it knows, and the driver translates its PTX."""
    below = [known for known in known_chips(nvcc) if known <= chip]
    return str(max(below, default=chip))


def gencode(arches: Sequence[str]) -> list[str]:
    """nvcc's flags for these chips in rising order, with the newest one's PTX for later chips."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in arches]
    if arches[-1].isdigit():  # PTX of a chip with a letter is for that chip alone
        flags.append(f"-gencode=arch=compute_{arches[-1]},code=compute_{arches[-1]}")
    return flags


def check_arches(argument: str, value: object) -> list[str]:
    """The chips in rising order, each once.

    Raises:
        ValueError: not a list of chips, named as ``argument`` (the form of errors of checks.py,
        which this file cannot import).
    """
    good = (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and value
        and all(
            isinstance(arch, str) and re.fullmatch(r"(7[5-9]|8\d|(9|[1-9]\d)\d[af]?)", arch)
            for arch in value
        )
    )
    if not good:
        raise ValueError(
            f"{argument}={value!r} is not allowed: it must be a list of one or more "
            "chips as nvcc names them, without sm_, such as ['80', '90', '120'], "
            "from '75' on, and with the letter only from '90' on"
        )
    return sorted(set(value), key=lambda arch: (int(arch.rstrip("af")), arch))
