"""examples/finetune.ipynb: its cells run in order, on a tiny model and a text made here."""

import ast
import json
from pathlib import Path

import pytest

for package in ("transformers", "tokenizers", "peft", "matplotlib"):
    pytest.importorskip(package, reason=f"the notebook needs {package}")
from test_examples import tiny  # noqa: E402, F401  (a fixture)

NOTEBOOK = Path(__file__).parents[1] / "examples" / "finetune.ipynb"
# In the place of the notebook's own, for speed.
SIZES = dict(STEPS=6, BATCH_SIZE=2, SEQ_LEN=8, RANK=4, OWN_TOKENS=256, HELD_OUT_TOKENS=64)


def cells() -> list[str]:
    """The code of each, with SIZES in the place of its sizes."""
    content = json.loads(NOTEBOOK.read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)  # as committed
    return ["".join(cell["source"]) for cell in code]


class Smaller(ast.NodeTransformer):
    """Writes the sizes of SIZES over those of an assignment of several names."""

    def __init__(self) -> None:
        self.changed: set[str] = set()

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        target = node.targets[0]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            names = [name.id for name in target.elts if isinstance(name, ast.Name)]
            if set(names) <= set(SIZES):
                node.value.elts = [ast.Constant(SIZES[name]) for name in names]
                self.changed |= set(names)
        return ast.fix_missing_locations(node)


def test_every_cell_runs(tiny, tmp_path, monkeypatch, capsys):  # noqa: F811
    from secura_kernels.finetune import corpus, smollm2

    text = (tiny / "text.txt").read_text()
    third = len(text) // 3
    parts = dict(train=text[:third], validation=text[third : 2 * third], test=text[2 * third :])
    monkeypatch.setattr(smollm2, "smollm2_folder", lambda: tiny / "model")
    monkeypatch.setattr(corpus, "shakespeare", lambda: parts)
    monkeypatch.setattr(corpus, "wikipedia", lambda: parts)
    monkeypatch.chdir(tmp_path)
    smaller, variables = Smaller(), {"__name__": "__main__"}
    for number, source in enumerate(cells()):
        tree = smaller.visit(ast.parse(source))
        exec(compile(tree, f"cell {number}", "exec"), variables)
    assert smaller.changed == set(SIZES)
    assert len(variables["losses"]) == SIZES["STEPS"]
    assert variables["kl"] > 0 and 0 <= variables["agreement"] <= 1
    assert variables["same"] and (tmp_path / "runs/notebook/layers.png").is_file()
    printed = capsys.readouterr().out
    assert "trainable params" in printed and "the same to the bit" in printed
