"""Runs PEFT's own tests of a method on ours: ``python tests/peft_suite/run.py [pytest arguments]``.

The tests are in PEFT's source distribution, which is fetched once, of the version that is
installed. Our configurations take the place of PEFT's in its lists of cases; see ``edits.py``.
No model is fetched: ``models.py`` makes tiny random ones under the names that the tests use.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))


def sources(cache: Path) -> Path:
    """PEFT's tests, fetched unless they are in the cache."""
    name = f"peft-{version('peft')}"
    archive, tests = cache / f"{name}.tar.gz", cache / name / "tests"
    if not archive.exists():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                f"peft=={version('peft')}",
                "--no-binary",
                ":all:",
                "--no-deps",
                "--no-build-isolation",
                "--quiet",
                "--dest",
                str(cache),
            ],
            check=True,
        )
    if not tests.exists():
        with tarfile.open(archive) as file:
            file.extractall(
                cache,
                [m for m in file.getmembers() if m.name.startswith(f"{name}/tests/")],
                filter="data",
            )
    return tests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / ".peft-suite",
        help="where the distribution and the models are kept",
    )
    options, arguments = parser.parse_known_args()
    from peft_suite import edits, models

    cache = options.cache.resolve()
    tests, folder = sources(cache), cache / f"run-{version('peft')}"
    shutil.rmtree(folder, ignore_errors=True)
    edits.write(tests, folder / "suite")
    models.write(folder)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -q --disable-warnings\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "peft_suite.plugin",
        "-p",
        "no:benchmark",
        "--rootdir",
        str(folder),
        "-c",
        str(folder / "pytest.ini"),
        *(arguments or ["--whole-suite"]),
    ]
    path = os.pathsep.join([str(HERE.parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | dict(
        PYTHONPATH=path, HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"
    )  # one core: the models are tiny
    return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
