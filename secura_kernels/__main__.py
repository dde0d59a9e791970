"""``python -m secura_kernels``: ``info``, what runs here and a self-check of it; ``tune``, the
kernels' tiles measured on this machine's GPU; ``finetune``, a model fine-tuned by several methods,
compared."""

import argparse
import importlib.metadata
import platform
import sys

import torch

from . import __version__
from .ops import IMPLS, why_unavailable
from .tools.advice import advice
from .tools.selfcheck import FORMS, SHAPES, relative_errors

PACKAGES = ("torch", "triton", "safetensors", "transformers", "peft")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def info() -> int:
    """Prints versions, devices and backends, checks each backend, and ends with one line of advice;
    1 where a check fails."""
    print(
        f"secura_kernels {__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    for name in PACKAGES:
        try:
            print(f"  {name:13} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {name:13} not installed")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    print("\ndevices")
    for device in devices:
        name = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else (f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
        )
        print(f"  {device!s:9} {name}")
    print("\nbackends (impl)")
    available = []
    for impl in IMPLS[1:]:
        for device in devices:
            reason = why_unavailable(impl, device)
            print(
                f"  {impl:10} {device!s:9} "
                f"{'can run' if reason is None else 'cannot run: ' + reason}"
            )
            available += [(impl, device)] if reason is None else []
    failures = sum(check(impl, device) for impl, device in available)
    print(f"\n{failures} check(s) failed" if failures else "\nall checks passed")
    print(f"advice: {advice(available)}")
    return 1 if failures else 0


def check(impl: str, device: torch.device) -> int:
    """Prints one line a dtype and form; returns how many are off by more than twice eager PyTorch.

    On average ours is off by no more than eager PyTorch (the test suite asks for that), but a few
    small cases scatter, most where the full derivative divides by a base near 0.
    """
    M, N, K, r = SHAPES[device.type]
    print(
        f"\nself-check of {impl} on {device}: largest error of y and of the gradients against "
        f"float64,\nand eager PyTorch's (M, N, K, r = {M}, {N}, {K}, {r})"
    )
    failures = 0
    for dtype in DTYPES:
        for name, norm in FORMS.items():
            if why_unavailable(impl, device, dtype, r, norm):
                continue
            errors = relative_errors(impl, device, dtype, norm)
            good = all(ours <= 2 * eager + 1e-6 for ours, eager in errors)
            failures += not good
            ours, eager = (max(pair[i] for pair in errors) for i in (0, 1))
            print(
                f"  {'ok  ' if good else 'FAIL'} {str(dtype).removeprefix('torch.'):9} "
                f"{ours:.1e} {eager:.1e}  {name}"
            )
    return failures


def tune(options: argparse.Namespace) -> int:
    """Measures tile configurations on this machine's GPU and keeps the fastest of each shape."""
    if not torch.cuda.is_available():
        print("tune: no NVIDIA GPU is here to measure on", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    reason = why_unavailable("triton", device)
    if reason is not None:
        print(f"tune: {reason}", file=sys.stderr)
        return 1
    from .backends.triton import tune_cache
    from .tools import tune

    layers = options.layer or tune.LAYERS
    work = tune.jobs(layers, options.tokens, options.rank, getattr(torch, options.dtype))
    file = tune_cache.path(device)
    try:
        entries = tune.tune(work, device, file, again=options.again)
    except KeyboardInterrupt:
        print(f"\ntune: stopped; what was measured is in {file}, run it again to go on")
        return 130
    print(f"{len(entries)} choices in {file}")
    return 0


def layer(text: str) -> tuple[int, int]:
    """``NxK`` as two numbers."""
    N, _, K = text.partition("x")
    if not (N.isdecimal() and K.isdecimal() and int(N) and int(K)):
        raise argparse.ArgumentTypeError(f"{text!r} is not NxK, such as 4096x4096")
    return int(N), int(K)


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main() -> int:
    program = "python -m secura_kernels"
    if sys.argv[1:2] == ["finetune"]:  # which has a parser of its own
        from .finetune.command import main as finetune

        return finetune(sys.argv[2:], f"{program} finetune")
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what runs here, and a self-check of it")
    tuning = commands.add_parser(
        "tune", help="measure the kernels' tiles on this GPU", description=tune.__doc__
    )
    tuning.add_argument(
        "--layer",
        type=layer,
        nargs="+",
        metavar="NxK",
        help="out_features x in_features (default: common models' layers)",
    )
    tuning.add_argument("--tokens", type=positive, nargs="+", default=[512, 2048, 8192])
    tuning.add_argument(
        "--rank", type=int, choices=range(1, 257), metavar="1..256", nargs="+", default=[16, 64]
    )
    tuning.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    tuning.add_argument("--again", action="store_true", help="measure what is known as well")
    commands.add_parser("finetune", help="fine-tune a model by several methods, and compare them")
    options = parser.parse_args()
    return info() if options.command == "info" else tune(options)


if __name__ == "__main__":
    sys.exit(main())
