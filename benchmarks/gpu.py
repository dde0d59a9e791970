"""Everything that needs an NVIDIA GPU, in stages; ``make gpu`` runs it.

    python benchmarks/gpu.py              # all stages that this commit has not passed here
    python benchmarks/gpu.py bars small   # these, again
    python benchmarks/gpu.py --limit 120 --archive results.tar.gz   # on a borrowed machine

Each stage writes its result as it ends, under ``benchmarks/results/<chip>/``. A stage that fails
does not stop the next one; a run that is stopped goes on with the stage it was in. Needs PyTorch,
Triton, pytest, hypothesis, rich, matplotlib, transformers and peft, and for the CUDA kernels ninja,
g++ and the CUDA toolkit; downloads nothing.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks/layer"))

import machine  # noqa: E402
from shapes import RANKS, TOKENS  # noqa: E402

LAYER = "benchmarks/layer/run.py"
# Files by name: others need packages that a GPU machine may lack. Hundreds of kernels are compiled,
# in several processes where pytest-xdist is installed.
TESTS = [
    "-m",
    "pytest",
    "-m",
    "gpu",
    "-p",
    "no:cacheprovider",
    "-rfE",
    "--tb=short",
    *(["-n", str(min(16, os.cpu_count()))] if importlib.util.find_spec("xdist") else []),
]
STAGES: dict[str, list[str]] = {
    "cuda-build": ["-c", "from secura_kernels.backends import cuda; print(cuda.build())"],
    "tests-cuda": [
        *TESTS,
        "tests/test_backends.py",
        "tests/test_kernel_ops.py",
        "tests/test_epilogue.py",
        "tests/test_gpu.py",
        "tests/test_cuda.py",
        "tests/test_cuda_build.py",
        "-k",
        "cuda",
    ],
    "tests-gpu": [*TESTS, "tests/test_gpu.py", "-k", "not cuda"],
    "tests-triton": [
        *TESTS,
        "tests/test_backends.py",
        "tests/test_kernel_ops.py",
        "tests/test_epilogue.py",
        "tests/test_batched.py",
        "-k",
        "not cuda",
    ],
    "sanitizer": ["benchmarks/sanitize.py"],
    "tune": [
        "-m",
        "secura_kernels",
        "tune",
        "--layer",
        "4096x4096",
        "8192x8192",
        "14336x4096",
        "4096x14336",
        "--tokens",
        "2048",
        "8192",
        "16384",
        "--rank",
        "16",
        "64",
    ],
    "bars": [
        LAYER,
        "--name",
        "bars",
        "--model",
        "square",
        "--layer",
        "4096",
        "8192",
        "--tokens",
        "8192",
        "16384",
        "--rank",
        "16",
        "64",
        "150",
        "--rounds",
        "20",
        "--no-compiled",
    ],
    # torch.compile takes most of a minute a case.
    "compiled": [
        LAYER,
        "--name",
        "compiled",
        "--model",
        "square",
        "--layer",
        "4096",
        "8192",
        "--tokens",
        "8192",
        "--rank",
        "64",
        "--compiled",
    ],
    "small": [
        LAYER,
        "--name",
        "small",
        "--model",
        "llama-3.1-8b",
        "--layer",
        "k_proj",
        "down_proj",
        "--tokens",
        "1",
        "64",
        "512",
        "--rank",
        "64",
        "--compiled",
    ],
    "sweep": [
        LAYER,
        "--name",
        "sweep",
        "--model",
        "llama-3.1-8b",
        "--layer",
        "q_proj",
        "--tokens",
        *map(str, TOKENS),
        "--rank",
        *map(str, RANKS),
        "--rounds",
        "20",
        "--no-compiled",
    ],
    "layer": [
        LAYER,
        "--name",
        "layer",
        "--model",
        "llama-3.1-8b",
        "llama-3-70b-tp8",
        "qwen2-1.5b",
        "qwen2-7b",
        "gemma-2-2b",
        "gpt2-large",
        "--layer",
        "q_proj",
        "gate_proj",
        "down_proj",
        "c_attn",
        "--tokens",
        "8192",
        "--rank",
        "64",
        "--rounds",
        "20",
        "--no-compiled",
    ],
    "passes": ["benchmarks/layer/passes.py"],
    "mixed": ["benchmarks/layer/mixed.py", "--N", "4096", "--K", "4096", "--tokens", "32"],
    "step-1b": ["benchmarks/step/run.py", "--model", "1b", "--name", "step-1b"],
    "step-8b": ["benchmarks/step/run.py", "--model", "8b", "--name", "step-8b"],
}
# What they make lies outside the results, so that a mark of passing says nothing about it here.
ALWAYS = ("cuda-build",)


def passed(marker: Path) -> bool:
    """Whether the stage passed for this commit."""
    if not marker.exists():
        return False
    content = json.loads(marker.read_text())
    return content["status"] == 0 and content["commit"] == machine.commit()


def run(name: str, folder: Path, limit: float | None) -> int:
    """One stage: its output on the screen and in a log, its status in ``<name>.stage.json``.
    ``limit``: seconds after which it is ended, with the status -9."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    start = time.time()
    with open(folder / f"{name}.log", "w") as log:
        # A session of its own: ended, it leaves no process of its own behind.
        process = subprocess.Popen(
            [sys.executable, *STAGES[name]],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        end = threading.Timer(
            limit or threading.TIMEOUT_MAX, lambda: os.killpg(process.pid, signal.SIGKILL)
        )
        end.daemon = True
        end.start()
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
            status = process.wait()
        finally:
            end.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    device = torch.device("cuda")
    content = dict(
        stage=name, status=status, seconds=round(time.time() - start, 1), **machine.describe(device)
    )
    (folder / f"{name}.stage.json").write_text(json.dumps(content, indent=1) + "\n")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", nargs="*", help=f"of {', '.join(STAGES)}; none: all that are left")
    parser.add_argument("--limit", type=float, help="seconds that a stage may take")
    parser.add_argument("--archive", type=Path, help="a .tar.gz of the results, after every stage")
    options = parser.parse_args()
    unknown = sorted(set(options.stage) - set(STAGES))
    if unknown:
        parser.error(f"stage={unknown} is not allowed: it must be of {list(STAGES)}")
    if not torch.cuda.is_available():
        print("gpu: no NVIDIA GPU is here", file=sys.stderr)
        return 1
    folder = ROOT / "benchmarks/results" / machine.chip(torch.device("cuda"))
    folder.mkdir(parents=True, exist_ok=True)
    statuses = {}
    for name in options.stage or STAGES:
        if not options.stage and name not in ALWAYS and passed(folder / f"{name}.stage.json"):
            print(f"== {name}: passed for this commit already")
            continue
        print(f"== {name}", flush=True)
        statuses[name] = run(name, folder, options.limit)
        if options.archive:
            archive(folder, options.archive)
    for name, status in statuses.items():
        print(f"== {name}: {'passed' if status == 0 else f'FAILED ({status})'}")
    return 1 if any(statuses.values()) else 0


def archive(folder: Path, file: Path) -> None:
    """Writes it whole or not at all."""
    part = file.with_name(file.name + ".part")
    with tarfile.open(part, "w:gz") as tar:
        tar.add(folder, folder.name)
    part.replace(file)


if __name__ == "__main__":
    sys.exit(main())
