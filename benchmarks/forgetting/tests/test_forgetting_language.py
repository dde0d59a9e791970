"""benchmarks/forgetting/study, the language model's side: text domains and their parts, and how far
a tuned model is from its base."""

import hashlib
import math
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the language models are transformers'")
tokenizers = pytest.importorskip("tokenizers", reason="texts need a tokenizer")
pytest.importorskip("peft", reason="the benchmark's package needs peft")
from forgetting_models import (  # noqa: E402
    END,
    VOCABULARY,
    letters_tokenizer,
    tiny_language_model,
)
from study import hub_texts, language, language_retention  # noqa: E402
from study.language import PARTS, TextTask, domain, text_task  # noqa: E402
from study.language_retention import (  # noqa: E402
    CHAT,
    Passages,
    Reference,
    answered,
    base_reference,
    chat_ids,
    weights_sha256,
)


@pytest.fixture(scope="module")
def tokenizer():
    return letters_tokenizer()


@pytest.fixture
def passages() -> Passages:
    """Five rows, the last with four scored tokens in its middle alone."""
    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY, (5, 12))
    scored = torch.ones(5, 11, dtype=torch.bool)
    scored[4] = False
    scored[4, 3:7] = True
    return Passages(ids, scored)


def log_probabilities(model, passages) -> torch.Tensor:
    """(tokens, vocabulary) at the scored positions, row after row."""
    with torch.no_grad():
        logits = torch.stack([model(input_ids=row[None]).logits[0, :-1] for row in passages.ids])
    return logits[passages.scored].log_softmax(-1)


def test_measures_by_hand(passages):
    base, tuned = tiny_language_model(0), tiny_language_model(1)
    found = Reference.of(base, {"x": passages}, k=3, batch_size=2).measure(tuned, batch_size=2)
    p, q = log_probabilities(base, passages), log_probabilities(tuned, passages)
    terms, same, losses = [], [], []
    for of_base, of_tuned, token in zip(p, q, passages.ids[:, 1:][passages.scored], strict=True):
        best = of_base.argsort(descending=True)[:3].tolist()
        others = [i for i in range(VOCABULARY) if i not in best]
        rest_p, rest_q = (float(x[others].exp().sum()) for x in (of_base, of_tuned))
        terms.append(
            sum(math.exp(of_base[i]) * float(of_base[i] - of_tuned[i]) for i in best)
            + rest_p * math.log(rest_p / rest_q)
        )
        same.append(int(of_tuned.argmax()) == best[0])
        losses.append(-float(of_tuned[token]))
    assert len(terms) == 4 * 11 + 4
    assert found == pytest.approx(
        {
            "x kl": sum(terms) / 48,
            "x agreement": sum(same) / 48,
            "x perplexity": math.exp(sum(losses) / 48),
        },
        rel=1e-10,
    )


def test_the_base_itself_is_at_distance_zero(passages):
    base = tiny_language_model(0, torch.float32)
    found = Reference.of(base, {"x": passages}, k=3).measure(base)
    assert (found["x kl"], found["x agreement"]) == (0, 1)


def test_kl_is_a_lower_bound_that_rises_with_k_to_the_whole(passages):
    base, tuned = tiny_language_model(0), tiny_language_model(1)
    p, q = log_probabilities(base, passages), log_probabilities(tuned, passages)
    whole = (p.exp() * (p - q)).sum(-1).mean().item()
    found = [
        Reference.of(base, {"x": passages}, k=k).measure(tuned)["x kl"]
        for k in (1, 2, 8, 30, VOCABULARY - 1)
    ]
    assert 0 < found[0] < found[1] < found[2] < found[3] < found[4]
    assert found[4] == pytest.approx(whole, rel=1e-10)  # the rest is one token then


def test_perplexity_is_that_of_the_examples():
    from secura_kernels.finetune.measure import evaluate

    windows = torch.randint(VOCABULARY, (6, 10), generator=torch.Generator().manual_seed(0))
    base, tuned = tiny_language_model(0), tiny_language_model(1)
    every = Passages(windows, torch.ones(6, 9, dtype=torch.bool))
    found = Reference.of(base, {"x": every}, k=3).measure(tuned)
    # The loss of transformers is a float32: a mean of about 4.6, off by 2e-7, is an exponent here.
    expected, _ = evaluate(tuned, windows, 6)
    assert found["x perplexity"] == pytest.approx(expected, rel=1e-6)


def test_a_base_with_ties_agrees_with_itself(passages):
    base = tiny_language_model(0, torch.float32)
    with torch.no_grad():
        base.lm_head.weight[1::2] = base.lm_head.weight[::2]
    reference = Reference.of(base, {"kind": passages}, 5)
    found = reference.measure(base)
    assert found["kind agreement"] == 1 and found["kind kl"] == 0
    assert reference.measure(tiny_language_model(1, torch.float32))["kind agreement"] < 0.9


def test_a_model_that_diverged_is_measured(passages):
    base, tuned = tiny_language_model(0), tiny_language_model(1)
    with torch.no_grad():
        tuned.lm_head.weight.mul_(1e6)
    found = Reference.of(base, {"x": passages}, k=3).measure(tuned)
    assert found["x perplexity"] == math.inf and found["x kl"] > 1e3


def test_modes_stay_and_every_batch_ticks(passages):
    base, ticks = tiny_language_model(), []
    base.train()
    reference = Reference.of(base, {"x": passages}, 3, 2, lambda: ticks.append(1))
    reference.measure(base, 2, lambda: ticks.append(2))
    assert base.training and ticks == [1, 1, 1, 2, 2, 2]


def test_padding_after_a_row_changes_nothing(passages):
    base, tuned = tiny_language_model(0), tiny_language_model(1)
    short = Passages(passages.ids[4:, :8], passages.scored[4:, :7])
    padded = Passages(passages.ids[4:], passages.scored[4:])
    first, second = (Reference.of(base, {"x": p}, 3).measure(tuned) for p in (short, padded))
    assert first == pytest.approx(second, rel=1e-12)


@pytest.mark.parametrize("k", [0, VOCABULARY])
def test_k_leaves_a_rest(passages, k):
    with pytest.raises(ValueError, match=f"k={k} .*from 1 to {VOCABULARY - 1}"):
        Reference.of(tiny_language_model(), {"x": passages}, k=k)


def test_scored_is_one_shorter_than_the_rows():
    with pytest.raises(ValueError, match=r"\(2, 4\) with one True"):
        Passages(torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool))


def test_answers_are_greedy_and_alone_are_scored():
    base = tiny_language_model()
    with torch.no_grad():  # a model that ends some answers
        base.lm_head.weight[END] += 0.1 * base.lm_head.weight[5]
    prompts = [[4, 5, 6], [7], [8, 9, 10, 11, 12], [13, 14]]
    found = answered(base, prompts, length=9, end=END, batch_size=3)
    for prompt, ids, scored in zip(prompts, found.ids, found.scored, strict=True):
        row = list(prompt)
        while len(row) < len(prompt) + 9 and row[len(prompt) :][-1:] != [END]:
            with torch.no_grad():
                row.append(int(base(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
        assert ids[: len(row)].tolist() == row
        assert scored.nonzero()[:, 0].tolist() == list(range(len(prompt) - 1, len(row) - 1))


def test_an_answer_ends_with_its_end_token(monkeypatch):
    base = tiny_language_model()
    monkeypatch.setattr(
        base,
        "generate",
        lambda input_ids, **_: torch.cat(
            [input_ids, torch.tensor([[7, END, END], [END, END, END]])], dim=1
        ),
    )
    found = answered(base, [[4, 5], [6]], length=3, end=END, batch_size=2)
    assert found.ids.tolist() == [[4, 5, 7, END], [6, END, END, END]]
    assert found.scored.tolist() == [[False, True, True], [True, False, False]]


@pytest.fixture
def general(monkeypatch):
    """Two prompts a kind and a short Wikipedia, so that a reference is made at once."""
    monkeypatch.setattr(
        language_retention,
        "wikipedia",
        lambda: {"validation": "a b c. " * 20, "test": "the quick brown fox jumps. " * 20},
    )
    monkeypatch.setattr(language_retention, "CHAT", {"questions": ("who?", "what is it?")})
    monkeypatch.setattr(language_retention, "TOP", 5)
    return dict(seq_len=16, tokens=64, answer=4)


def test_a_reference_is_made_once_for_the_same_base_and_prompts(
    general, tokenizer, tmp_path, monkeypatch
):
    base, tuned = tiny_language_model(0, torch.float32), tiny_language_model(1, torch.float32)
    first = base_reference(base, tokenizer, folder=tmp_path, **general)
    assert set(first.kinds) == {"wikipedia", "questions"}
    assert first.kinds["wikipedia"].ids.shape == (4, 16)
    monkeypatch.setattr(Reference, "of", None)  # it would now have to be made
    again = base_reference(base, tokenizer, folder=tmp_path, **general)
    assert again.measure(tuned) == first.measure(tuned)
    assert again.measure(base)["questions kl"] == 0
    with pytest.raises(TypeError):
        base_reference(tuned, tokenizer, folder=tmp_path, **general)
    with pytest.raises(TypeError):
        base_reference(base, tokenizer, folder=tmp_path, **general | {"answer": 3})
    with pytest.raises(TypeError):
        base_reference(base, tokenizer, "validation", folder=tmp_path, **general)
    with pytest.raises(TypeError), torch.autocast("cpu", torch.bfloat16):
        base_reference(base, tokenizer, folder=tmp_path, **general)
    with pytest.raises(ValueError, match=r"seq_len=9999 .*the tokens in the test part"):
        base_reference(base, tokenizer, folder=tmp_path, **general | {"seq_len": 9999})
    assert len(list(tmp_path.iterdir())) == 1


def test_a_reference_of_something_else_is_refused(passages, tmp_path):
    Reference.of(tiny_language_model(), {"x": passages}, 3).save(tmp_path / "file", "one")
    with pytest.raises(ValueError, match="a reference made from another"):
        Reference.load(tmp_path / "file", "another")


def test_weights_hash_sees_one_changed_weight():
    base, other = tiny_language_model(), tiny_language_model()
    assert weights_sha256(base) == weights_sha256(other)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    assert weights_sha256(base) != weights_sha256(other)
    assert weights_sha256(base) != weights_sha256(tiny_language_model(dtype=torch.float32))


def test_chat_prompts_need_a_template(tokenizer):
    assert tokenizer.decode(chat_ids(tokenizer, "hi")).replace(" ", "") == "<s>hi<e>"
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="one with a chat template"):
        chat_ids(bare, "hi")


def test_no_chat_prompt_stands_twice():
    prompts = [prompt for kind in CHAT.values() for prompt in kind]
    assert len(set(prompts)) == len(prompts) and len(CHAT) == 3


def made_up_task() -> TextTask:
    """Streams that tell where a token comes from: train 0.., validation 1000.., test 2000.."""
    return TextTask(
        "made up",
        *(
            torch.arange(start, start + length, dtype=torch.int32)
            for start, length in ((0, 300), (1000, 45), (2000, 60))
        ),
    )


def test_windows_do_not_overlap_and_stay_in_their_part():
    task = made_up_task()
    windows = task.held_out("validation", 10, 1000)
    assert windows.shape == (4, 10) and windows.dtype == torch.int64
    assert windows.flatten().tolist() == list(range(1000, 1040))
    assert task.held_out("test", 10, 30)[:, 0].tolist() == [2000, 2020, 2040]
    batches = task.batches(steps=5, batch_size=2, seq_len=20, seed=3)
    assert len(batches) == 5
    assert all(batch.shape == (2, 20) and batch.max() < 300 for batch in batches)
    assert torch.equal(batches[4], task.batches(5, 2, 20, 3)[4])
    assert not torch.equal(batches[0], task.batches(5, 2, 20, 4)[0])


def test_a_task_says_what_is_too_short_or_of_another_dtype():
    task = made_up_task()
    with pytest.raises(ValueError, match=r"seq_len=46 .*45, the tokens in the validation part"):
        task.held_out("validation", 46, 100)
    with pytest.raises(ValueError, match=r"seq_len=301 .*300, the tokens in the train part"):
        task.batches(1, 1, 301, 0)
    with pytest.raises(ValueError, match="part='all'"):
        task.held_out("all", 10, 10)
    with pytest.raises(ValueError, match=r"validation=.*int32"):
        TextTask("x", task.train, task.validation.long(), task.test)


def test_a_task_is_made_of_three_texts(tokenizer):
    ticks = []
    task = text_task(
        "x", tokenizer, dict(train="abc abc", validation="c.", test="a"), lambda: ticks.append(1)
    )
    assert [len(getattr(task, part)) for part in PARTS] == [7, 2, 1] and len(ticks) == 3
    assert tokenizer.decode(task.validation.tolist()).replace(" ", "") == "c."
    other = text_task("x", tokenizer, dict(train="abc abc", validation="c.", test="b"))
    assert task.sha256 != other.sha256
    with pytest.raises(ValueError, match=r"texts=.*train, validation, test"):
        text_task("x", tokenizer, dict(train="a", test="b"))
    with pytest.raises(ValueError, match="name='latin'"):
        domain("latin", tokenizer)


def made_up_wheel(monkeypatch, folder: Path, name: str, files: dict[str, str]) -> None:
    """Puts a wheel of these files in the cache in place of the real one."""
    monkeypatch.setenv("SECURA_CACHE", str(folder))
    path = folder / "made_up.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(language, name, language.Wheel("made-up==1", path.name, sha256))


def test_python_source_is_split_by_packages(monkeypatch, tmp_path):
    made_up_wheel(
        monkeypatch,
        tmp_path,
        "DJANGO",
        {
            "django/db/b.py": "b = 1\n",
            "django/db/a.py": "a = 1\n",
            "django/db/__init__.py": "",
            "django/forms/f.py": "f = 1\n",
            "django/formsets.py": "g = 1\n",
            "django/template/t.py": "t = 1\n",
            "django/conf/locale/de/formats.py": "x = 1\n",
            "django/db/data.json": "{}",
        },
    )
    assert language.python_source() == {
        "train": "a = 1\n\n\nb = 1\n\n\ng = 1\n",
        "validation": "f = 1\n",
        "test": "t = 1\n",
    }


def test_the_bible_is_split_by_books(monkeypatch, tmp_path):
    text = "Gen one. Gen two. Gen three. Job one. Prov one. Jude one. Rev one."
    starts = {
        1001001: 0,
        1001002: 9,
        1002001: 18,
        18001001: 29,
        20001001: 38,
        65001001: 48,
        66001001: 58,
    }
    verses = ",\n".join(f"        {verse}: {start}" for verse, start in starts.items())
    made_up_wheel(
        monkeypatch,
        tmp_path,
        "WYCLIFFE",
        {
            "pythonbible_wyc/plain_text_readers_bible.py": f'bible = Bible(\n    X,\n    """{text}""",\n    {{\n{verses},\n    }},\n'
            "    {Book.GENESIS: {1: 31}},\n)\n"
        },
    )
    assert language.wycliffe() == {
        "train": "Gen one.\nGen two.\n\nGen three.\n\nJude one.\n",
        "validation": "Prov one.\n\nRev one.\n",
        "test": "Job one.\n",
    }


def test_another_archive_in_the_cache_is_refused(monkeypatch, tmp_path):
    from secura_kernels.finetune.downloads import DownloadError

    made_up_wheel(monkeypatch, tmp_path, "DJANGO", {"django/a.py": "a\n"})
    (tmp_path / "made_up.whl").write_bytes(b"other")
    with pytest.raises(DownloadError, match=r"made_up\.whl is not the file"):
        language.python_source()


@pytest.mark.parametrize(
    ("name", "of_train", "of_validation", "of_test"),
    [
        (
            "python",
            "class Model(AltersData, metaclass=ModelBase):",
            "class Form(BaseForm, metaclass=DeclarativeFieldsMetaclass):",
            "class Template:",
        ),
        (
            "wycliffe",
            "In the bigynnyng God made of nouyt heuene and erthe.",
            "to kunne wisdom and kunnyng;",
            "`A man, Joob bi name, was in the lond of Hus; and thilke man was symple, and riytful, and "
            "dredynge God, and goynge awey fro yuel.",
        ),
    ],
    ids=["python", "wycliffe"],
)
def test_real_domains(name, of_train, of_validation, of_test):
    from secura_kernels.finetune.downloads import DownloadError

    try:
        texts = language.DOMAINS[name]()
    except DownloadError as error:
        pytest.skip(f"its archive is not to be had: {error}")
    lines = {part: text.split("\n") for part, text in texts.items()}
    for part, line in zip(PARTS, (of_train, of_validation, of_test), strict=True):
        assert [other for other in PARTS if line in lines[other]] == [part]
    assert len(texts["train"]) > 4_000_000
    assert min(len(texts["validation"]), len(texts["test"])) > 140_000


def test_hub_texts_are_loaded_by_datasets(monkeypatch, tokenizer):
    rows = {
        "Salesforce/wikitext": {"text": "a line\n"},
        "openai/gsm8k": {"question": "how many?", "answer": "two"},
        "abisee/cnn_dailymail": {"article": "long", "highlights": "short"},
        "lucasmccabe/logiqa": {
            "context": "c",
            "query": "q",
            "options": ["x", "y", "z", "w"],
            "correct_option": 2,
        },
    }
    calls = []

    def load_dataset(path, name=None, *, split, revision=None):
        calls.append((path, name, split, revision))
        return [rows[path]] * 2

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(hub_texts, "text_task", lambda name, tokenizer, texts, tick: texts)
    texts = {name: hub_texts.hub_text_task(name, tokenizer) for name in hub_texts.HUB_TEXTS}
    assert all(set(parts) == set(PARTS) for parts in texts.values())
    assert {name: parts["test"] for name, parts in texts.items()} == {
        "wikitext-2": "a line\n" * 2,
        "gsm8k": "Question: how many?\nAnswer: two\n\n" * 2,
        "cnn-dailymail": "Article: long\nSummary: short\n\n" * 2,
        "logiqa": "c\nQuestion: q\nA. x\nB. y\nC. z\nD. w\nAnswer: C\n\n" * 2,
    }
    assert ("Salesforce/wikitext", "wikitext-2-raw-v1", "validation", None) in calls
    assert ("openai/gsm8k", "main", "train[90%:]", None) in calls
    assert ("lucasmccabe/logiqa", None, "train", "refs/convert/parquet") in calls
    assert len(calls) == len(set(calls)) == 12


def test_hub_texts_say_what_to_install(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="'gsm8k' needs datasets: pip install datasets"):
        hub_texts.hub_text_task("gsm8k", tokenizer)
    with pytest.raises(ValueError, match="name='mnist'"):
        hub_texts.hub_text_task("mnist", tokenizer)
