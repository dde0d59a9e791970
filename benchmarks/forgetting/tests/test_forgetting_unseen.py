"""benchmarks/forgetting/study/unseen.py: texts of kinds that no task is of."""

import json
import zipfile

import pytest
import torch

pytest.importorskip("transformers", reason="the models are transformers'")
from forgetting_models import letters_tokenizer, tiny_language_model
from study import language, unseen

SPACY_FILE = '"""Sentences."""\n\nsentences = [\n    "{0} one.",\n    "{0}"\n    " two.",\n]\n'


@pytest.fixture
def carried(monkeypatch, tmp_path):
    """Packages with a few lines in the places where the real ones have theirs."""

    def package_files(requirement, sha256, wanted, *options):
        folder = tmp_path / requirement
        for name in [wanted] if isinstance(wanted, str) else wanted:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"b": " second \n", "a": "first"})
            if name.endswith(".py"):
                text = SPACY_FILE.format(name.split("/")[2])
            (folder / name).write_text(text)
        return folder

    monkeypatch.setattr(unseen, "package_files", package_files)


def test_questions_come_in_the_order_of_their_subjects(carried):
    assert unseen.mmlu() == "first\n\nsecond"


def test_no_script_that_is_measured_is_given_to_be_kept(monkeypatch, tmp_path):
    names = [f"{unseen.SCRIPTS}a.js", unseen.JQUERY, f"{unseen.SCRIPTS}admin/b.js"]
    with zipfile.ZipFile(tmp_path / "django.whl", "w") as archive:
        for name in [*names, "django/other.js"]:
            archive.writestr(name, f"// {name}")
    monkeypatch.setattr(language.Wheel, "path", lambda _: tmp_path / "django.whl")
    assert unseen.javascript() == f"// {names[0]}\n// {names[2]}"
    assert unseen.jquery() == f"// {names[1]}"


def test_sentences_are_read_as_text(carried):
    lines = unseen.languages().splitlines()
    assert lines[:2] == ["de one.", "de two."]
    assert len(lines) == 2 * len(unseen.LANGUAGES)


def test_answers_alone_are_scored():
    tokenizer = letters_tokenizer()
    tokenizer.add_tokens([*"0123456789+="])
    passages = unseen.sums(tokenizer)
    assert len(passages.ids) == unseen.ROWS
    for ids, scored in zip(passages.ids, passages.scored, strict=True):
        sums = tokenizer.decode(ids).replace(" ", "").split("\n")[: unseen.SUMS]
        answers = "".join(line.split("=")[1] for line in sums)
        assert tokenizer.decode(ids[1:][scored]).replace(" ", "") == answers
        assert all(eval(line.replace("=", "==")) for line in sums)


def test_the_base_keeps_all_of_every_kind(monkeypatch):
    monkeypatch.setattr(unseen, "LENGTH", 8)
    monkeypatch.setattr(
        unseen, "TEXTS", {name: lambda: "the cat sat on a mat. " * 9 for name in unseen.TEXTS}
    )
    base = tiny_language_model(dtype=torch.float32)
    base.resize_token_embeddings(80)
    reference = unseen.unseen_reference(base, letters_tokenizer())
    found = reference.measure(base)
    assert {name.split()[0] for name in found} == set(unseen.KINDS)
    for kind in unseen.KINDS:
        assert found[f"{kind} kl"] == 0 and found[f"{kind} agreement"] == 1
    with torch.no_grad():
        base.lm_head.weight.mul_(3)
    assert all(reference.measure(base)[f"{kind} kl"] > 0 for kind in unseen.KINDS)
