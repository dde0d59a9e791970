"""The CUDA kernels under NVIDIA's compute-sanitizer: every form of the layer, on small shapes.

    python benchmarks/sanitize.py                             # all three tools in turn
    python benchmarks/sanitize.py --tool racecheck --case "weight, max"
    python benchmarks/sanitize.py --run                       # what the tools watch, by itself

Exits with 1 where a tool reports anything. Needs an NVIDIA GPU and the CUDA toolkit.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from secura_kernels import SMagNorm
from secura_kernels.backends import cuda
from secura_kernels.backends.cuda import passes
from secura_kernels.backends.operands import CurOperands
from secura_kernels.functional.linear import cur_linear_and_moved

TOOLS = ("memcheck", "racecheck", "initcheck")
SECONDS = 190  # a tool: the three end within ten minutes
ENVIRONMENT = {
    # A tensor is an allocation of its own, so that memory which was never written, or lies past
    # its end, is not that of a tensor before it.
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    "CUDA_MODULE_LOADING": "LAZY",  # a tool patches every kernel that is loaded
    "PYTHONUNBUFFERED": "1",  # reports come after the name of their case
}

NORMS = {"no gate": None, "task gate": None} | {
    ", ".join([domain, *["max"] * (ref == "max")]): SMagNorm(domain=domain, ref=ref)
    for domain, ref in product(("output", "weight"), (1.0, "max"))
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# M, N, K, r: one token, sizes that no block divides, rows off 16 bytes, several tiles both ways,
# several parts of d_core's sum, the largest rank.
SHAPES = (
    (1, 96, 64, 5),
    (67, 131, 97, 12),
    (130, 264, 200, 150),
    (300, 144, 272, 64),
    (65, 280, 264, 256),
)
LAYOUTS = ("contiguous", "padded rows", "transposed")  # of x and dy


@dataclass(frozen=True)
class Case:
    """``biases``: a bias, an adapter bias, decay and the count of gates under the edge, too.
    ``one_pass``: the form without the library's product."""

    form: str
    tied: bool
    biases: bool
    one_pass: bool
    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    layout: str

    def __str__(self) -> str:
        words = (
            self.form,
            "tied" if self.tied else "stored",
            *["biases"] * self.biases,
            *["one pass"] * self.one_pass,
            str(self.dtype).removeprefix("torch."),
            "M {} N {} K {} r {}".format(*self.shape),
            self.layout,
        )
        return "; ".join(words)


def cases() -> list[Case]:
    """Every combination of form, tied or stored, biases and dtype; shapes and layouts in turn."""
    found = []
    for form, tied, biases, dtype in product(NORMS, (True, False), (False, True), DTYPES):
        # As in plan.one_pass: with max(rho), and on the weight, there is one form only.
        both = form in ("no gate", "task gate", "output")
        for one_pass in (False, True) if both else (False,):
            i = len(found)
            found.append(
                Case(
                    form,
                    tied,
                    biases,
                    one_pass,
                    dtype,
                    SHAPES[i % len(SHAPES)],
                    LAYOUTS[i // len(SHAPES) % len(LAYOUTS)],
                )
            )
    return found


def run_case(case: Case, impl: str, device: str) -> None:
    """Forward and backward; every output is read, so that what was not written is noticed.

    Raises:
        AssertionError: an output is not finite.
    """
    M, N, K, r = case.shape
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        """Made on the CPU: fewer kernels for a tool to patch, and no doubt that it is written."""
        return torch.randn(*shape, generator=generator).to(dtype)

    def laid_out(matrix: Tensor) -> Tensor:
        if case.layout == "transposed":
            return matrix.T.contiguous().to(device).T
        if case.layout == "padded rows":
            return torch.nn.functional.pad(matrix, (0, 3)).to(device)[:, : matrix.shape[1]]
        return matrix.to(device)

    W = (random(N, K) / K**0.5).to(device)
    cols, rows = (torch.randint(n, (r,), generator=generator).to(device) for n in (K, N))
    if case.tied:
        C = R = None
    else:
        C, R, cols, rows = W[:, cols], W[rows], None, None
    wide = dict(dtype=torch.float32)
    x, core = laid_out(random(M, K)), (random(r, r, **wide) / r).to(device)
    bias = adapter_bias = decay = task_gate = None
    if case.form == "task gate":
        task_gate = random(r, 2, **wide).to(device)
    trained = [x.requires_grad_(), core.requires_grad_()]
    if case.biases:
        bias, adapter_bias = random(N).to(device), random(N, **wide).to(device)
        decay = torch.where(torch.rand(N, generator=generator) > 0.5, 0.9, 1.0).to(device)
        trained.append(adapter_bias.requires_grad_())
    with mock.patch.object(passes, "one_pass", lambda *_: case.one_pass):
        layer = CurOperands(
            W, bias, core, cols, rows, C, R, adapter_bias, decay, 0.7, NORMS[case.form], task_gate
        )
        y, moved = cur_linear_and_moved(x, layer, impl, 1.2 if case.biases else 0.0)
        gradients = torch.autograd.grad(y, trained, laid_out(random(M, N)))
    names = ("y", "moved", "dx", "dcore", "dadapter_bias")
    for name, value in zip(names, (y.detach(), moved, *gradients), strict=False):
        if not value.isfinite().all():
            raise AssertionError(f"{name} is not finite")
    if device == "cuda":
        torch.cuda.synchronize()  # a fault is reported with its case


def plain_products(key: str) -> torch.library.Library:
    """Replaces the library's products by multiplying and adding, as long as the result lives: they
    are NVIDIA's to check, and a tool may not see what they write by bulk copies."""

    def mm(a: Tensor, b: Tensor) -> Tensor:
        return (a.float()[:, :, None] * b.float()).sum(1).to(a.dtype)

    def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta=1, alpha=1) -> Tensor:
        return c * beta + mm(a, b) * alpha

    def addmm_(c: Tensor, a: Tensor, b: Tensor, *, beta=1, alpha=1) -> Tensor:
        return c.copy_(addmm(c, a, b, beta=beta, alpha=alpha))

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Overriding a previously registered kernel"
        for function in (mm, addmm, addmm_):
            library.impl(function.__name__, function, key, allow_override=True)
    return library


def run(chosen: list[Case], impl: str, device: str) -> None:
    products = plain_products(device.upper())
    for i, case in enumerate(chosen, 1):
        print(f"{i}/{len(chosen)} {case}", flush=True)
        run_case(case, impl, device)
    del products
    print(f"{len(chosen)} cases have run")


def find_sanitizer() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [
        os.environ.get("PATH", ""),
        *(f"{home}/bin" for home in homes),
        "/usr/local/cuda/bin",
    ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def watch(sanitizer: str, tool: str, part: str, seconds: float) -> str:
    """Runs the cases under a tool; returns what is wrong, "" where nothing is."""
    # Errors that CUDA calls return are PyTorch's own probing; those of our launches raise.
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "1",
        "--print-limit",
        "20",
        *(["--report-api-errors", "no"] if tool == "memcheck" else []),
        sys.executable,
        str(Path(__file__).resolve()),
        "--run",
        "--case",
        part,
    ]
    # A session of its own: stopped, the tool leaves nobody behind on the GPU.
    process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:g} s (--limit)"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"exit status {status}: see its report above" if status else ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--case", default="", help="only the cases whose name has this in it")
    parser.add_argument("--limit", type=float, default=SECONDS, help="seconds a tool may take")
    parser.add_argument("--run", action="store_true", help="runs the cases, without a tool")
    parser.add_argument("--impl", default="cuda", help="of --run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="of --run")
    options = parser.parse_args()
    chosen = [case for case in cases() if options.case in str(case)]
    if not chosen:
        parser.error(
            f"case={options.case!r} is not allowed: it must be a part of a case's name, "
            f"such as {str(cases()[0])!r}"
        )
    if options.run:
        run(chosen, options.impl, options.device)
        return 0
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(
            "sanitize: compute-sanitizer is missing: it comes with the CUDA toolkit; looked in "
            "$PATH, $CUDA_HOME/bin, $CUDA_PATH/bin and /usr/local/cuda/bin",
            file=sys.stderr,
        )
        return 1
    if not torch.cuda.is_available():
        print("sanitize: no NVIDIA GPU is here", file=sys.stderr)
        return 1
    if cuda.why_unavailable(torch.device("cuda"), torch.float32, 1):
        cuda.build()  # before the tools: a compiler must not be watched
    lines = []
    for tool in options.tool:
        print(f"== {tool}, {len(chosen)} cases", flush=True)
        start = time.monotonic()
        wrong = watch(sanitizer, tool, options.case, options.limit)
        seconds = time.monotonic() - start
        lines.append(f"{tool}: {f'FAILED, {wrong}' if wrong else 'clean'} ({seconds:.0f} s)")
    print("", *lines, sep="\n")
    return 1 if any("FAILED" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
