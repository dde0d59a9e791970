"""The package imports one way, and alone."""

import ast
import subprocess
import sys
from pathlib import Path

import secura_kernels

ROOT = Path(secura_kernels.__file__).parent
# Lower imports nothing above itself. A name stands for a file, or for all files of a package that
# no longer name covers.
LAYERS = [
    ["checks"],
    ["settings", "selection", "bases"],
    ["backends.gate_code", "backends.operands", "backends.programs"],
    ["backends.host"],
    ["backends.passes"],
    ["backends.schedule"],
    ["backends.reference", "backends.triton", "backends.cuda"],
    ["ops"],
    ["functional"],
    [
        "nn.factors",
        "nn.importance",
        "nn.matrix",
        "nn.optional_tensors",
        "nn.merge",
        "nn.past",
        "nn.projections",
        "nn.stages",
        "nn.state",
        "nn.task_gate",
    ],
    ["nn.adapter"],
    ["nn.cores"],
    ["nn.experts"],
    ["nn.linear"],
    ["nn.checkpoint"],
    ["nn", "peft"],
    ["train.adapted"],
    ["train.drift", "train.retention", "train.own_text"],
    ["train.budget"],
    ["train.callbacks", "train.calibration", "train.kl_loss", "train.plot"],
    ["train"],
    [""],
    ["tools"],
    ["finetune"],
    ["__main__"],
]
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}


def covering(module: str) -> str:
    """The longest name in LAYERS that a module (its parts below the package) falls under."""
    while module and module not in LEVEL:
        module = module.rpartition(".")[0]
    return module


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports when it is itself imported."""
    found = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            where = [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
            found |= {".".join([*where, alias.name]) for alias in node.names}
    return found


def test_imports_go_one_way():
    files = list(ROOT.rglob("*.py"))
    assert len(files) > 15
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        part = covering(".".join(parts).removesuffix("__init__").removesuffix("."))
        for other in map(covering, imported(path)):
            assert other == part or LEVEL[other] < LEVEL[part], (
                f"{path.relative_to(ROOT)} imports {other or 'secura_kernels'}"
            )


def test_import_needs_no_optional_package():
    """Nor a GPU, nor a compiler."""
    program = (
        "import sys\nfor m in ('triton', 'peft', 'transformers', 'rich', 'matplotlib'):\n"
        "    sys.modules[m] = None\nimport secura_kernels"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
