"""The documents hold: their Python runs, their links lead to something, their messages are ours.

A block that cannot run here stands behind a comment, ``<!-- needs a GPU -->`` or ``<!-- not run:
why -->``; of such a one the imports are run.
"""

import ast
import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import secura_kernels

ROOT = Path(__file__).parents[1]
PACKAGE = Path(secura_kernels.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [
    *PAGES,
    *(
        ROOT / name
        for name in (
            "CHANGELOG.md",
            "CONTRIBUTING.md",
            "AGENTS.md",
            "SECURITY.md",
            "csrc/README.md",
            "hub/README.md",
        )
    ),
    *sorted(PACKAGE.rglob("README.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
BLOCK = re.compile(
    r"^(?:<!-- (needs a GPU|not run: [^>]+) -->\n)?```python\n(.*?)^```$", re.M | re.S
)
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)


def names(paths: list[Path]) -> list[str]:
    return [
        path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
        for path in paths
    ]


# Python


def blocks(page: Path) -> list[tuple[str, str]]:
    """(why it is not run, code) of each, in the code's own lines of the page."""
    text = page.read_text()
    return [(m[1], "\n" * text.count("\n", 0, m.start(2)) + m[2]) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_python_runs(page, tmp_path, monkeypatch):
    """Each page's blocks one after another. What a page takes from its reader is made here."""
    pytest.importorskip("peft", reason="the documents use PEFT")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        secura_kernels, "calibrate", partial(secura_kernels.calibrate, tokens=256)
    )  # for speed: 4096 is usual
    given = dict(model=lambda page: page["adapted"]) if page.stem == "troubleshooting" else {}
    variables = Variables(MAKERS | given)
    for skipped, code in blocks(page):
        program = compile(code, str(page), "exec")
        if skipped:  # what it imports exists
            tree = ast.parse(code)
            tree.body = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
            program = compile(tree, str(page), "exec")
        exec(program, variables)


def test_every_block_is_seen():
    for page in PAGES:
        assert len(blocks(page)) == len(re.findall(r"^```python", page.read_text(), re.M)), page
    assert sum(not skipped for page in PAGES for skipped, _ in blocks(page)) >= 12


class Variables(dict):
    """A page's: what it reads before it was set is made by ``makers``, from the others."""

    def __init__(self, makers: dict[str, Callable]) -> None:
        super().__init__()
        self.makers = makers

    def __missing__(self, name: str):
        self[name] = self.makers[name](self)  # a KeyError becomes the program's NameError
        return self[name]


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=80,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def batches(seed: int, count: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 96, (count, 4, 16), generator=generator)
    return [dict(input_ids=row, labels=row) for row in rows]


class Tokenizer:
    """As much of one as ``calibrate`` asks for."""

    chat_template = "a chat"

    def get_vocab(self) -> dict:
        return {"<|endoftext|>": 1}

    def apply_chat_template(self, messages: list[dict], *, tokenize: bool) -> str:
        return "user: " + messages[0]["content"] + "\n"

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict:
        return dict(input_ids=[3 + ord(letter) % 90 for letter in text])


def trainer(model):
    from transformers import Trainer, TrainingArguments

    rows = [dict(input_ids=row, labels=row) for batch in batches(1) for row in batch["input_ids"]]
    return Trainer(
        model,
        TrainingArguments(
            "trainer",
            use_cpu=True,
            max_steps=2,
            per_device_train_batch_size=4,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=rows,
    )


def adapted(model):
    """A PEFT model over ``model``'s weights, with an adapter of its own."""
    from peft import get_peft_model

    from secura_kernels.peft import SecuraConfig

    return get_peft_model(model, SecuraConfig(r=4))


def adapter_folder(model) -> str:
    adapted(copy.deepcopy(model)).save_pretrained("adapter")
    return "adapter"


def psoft_folder(model) -> str:
    from peft import PsoftConfig, get_peft_model

    get_peft_model(copy.deepcopy(model), PsoftConfig(r=4)).save_pretrained("psoft")
    return "psoft"


MAKERS: dict[str, Callable] = {
    "model": lambda page: llama(),
    "fresh_model": lambda page: llama(),
    "adapted": lambda page: adapted(llama()),
    "path": lambda page: adapter_folder(llama()),
    "psoft_path": lambda page: psoft_folder(page["fresh_model"]),
    "linear": lambda page: torch.nn.Linear(64, 80),
    "tokenizer": lambda page: Tokenizer(),
    "trainer": lambda page: trainer(page["model"]),
    "train_batches": lambda page: iter(batches(2)),
} | {
    name: lambda page, seed=seed: batches(seed)
    for seed, name in enumerate(
        ("general", "general_batches", "task_a", "batches_of_a", "task_b"), 3
    )
}


# Links


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=names(LINKED))
def test_links_lead_to_something(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_site_has_every_page():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"^ +- [^:]+: (\S+\.md)$", text, re.M)
    assert len(listed) >= 10
    assert all((ROOT / name).is_file() for name in listed)
    assert set(names(PAGES)) <= set(listed)


# Messages


# What an argument may be, by the function that says it.
ALLOWED = {
    "fail": lambda args: template(args[2]),
    "check_number": lambda args: template(args[2]),
    "check_choice": lambda args: "one of …",
    "check_int": lambda args: f"an integer from {ast.unparse(args[2])} to {ast.unparse(args[3])}",
}


def template(node: ast.AST) -> str:
    """The text of an expression, with … for what is known when it runs."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{[\w!]*\}", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "…"


def texts(node: ast.AST) -> Iterator[str]:
    """Every text in the package's source but its docstrings; of an argument error the message that
    ``checks`` makes of it."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
        yield template(node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ALLOWED:
        allowed = ALLOWED[node.func.id](node.args)
        yield f"{template(node.args[0])}=… is not allowed: it must be {allowed}"
    for child in ast.iter_child_nodes(node):
        yield from texts(child)


def messages() -> list[str]:
    """What troubleshooting.md has as a heading, and says of no other package."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    return re.findall(r"^### `(.*)`$", page, re.M)


@pytest.fixture(scope="module")
def source() -> list[str]:
    return [
        text
        for path in (*PACKAGE.rglob("*.py"), ROOT / "setup.py")
        for text in texts(ast.parse(path.read_text()))
    ]


def says(source: list[str], message: str) -> bool:
    pattern = re.compile(".*?".join(map(re.escape, message.split("…"))), re.S)
    return any(pattern.search(text) for text in source)


@pytest.mark.parametrize("message", messages())
def test_the_package_says(message, source):
    assert says(source, message)


def test_messages_are_looked_for(source):
    """Neither a docstring counts, nor an argument's name alone."""
    assert len(messages()) > 50
    for message in (
        "The one form of the package's argument errors",
        "nonsense=… is not allowed",
        "m=… is not allowed: it must be odd",
    ):
        assert not says(source, message)
