"""The package imports one way, and alone."""

import ast
import subprocess
import sys
from pathlib import Path

import secura_kernels

ROOT = Path(secura_kernels.__file__).parent
# Lower imports nothing above itself. A file of a package counts as the package.
LAYERS = [
    ["checks"], ["smagnorm", "selection", "bases"], ["gate_code"], ["kernel_host"],
    ["reference", "kernels", "cuda"], ["ops"],
    ["functional"], ["update"],
    ["importance", "late_tensors", "merging", "past", "state"], ["adapter"], ["variants"], ["base"],
    ["modules"], ["adapter_file"], ["peft"], ["retention", "own_text"], ["budget"],
    ["callbacks", "calibration"], ["__init__"],
    ["selfcheck"], ["__main__"],
]
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}


def imported(path: Path) -> set[str]:
    """Top-level parts of the package that a file imports when it is itself imported."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            inside = path.parent == ROOT
            if node.level == (1 if inside else 2):
                found |= {node.module.split(".")[0]} if node.module else {
                    a.name for a in node.names}
    return found


def test_imports_go_one_way():
    files = list(ROOT.rglob("*.py"))
    assert len(files) > 15
    for path in files:
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for other in imported(path):
            level = LEVEL.get(other, LEVEL["__init__"])  # a public name comes from __init__
            assert level < LEVEL[part], f"{path.relative_to(ROOT)} imports {other}"


def test_import_needs_no_optional_package():
    """Nor a GPU, nor a compiler."""
    program = ("import sys\nfor m in ('triton', 'peft', 'transformers', 'rich', 'matplotlib'):\n"
               "    sys.modules[m] = None\nimport secura_kernels")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
