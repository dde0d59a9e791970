"""benchmarks/forgetting/study: the three kinds of subjects, on small random models and made-up
tasks, through whole runs."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the models are transformers'")
pytest.importorskip("tokenizers", reason="texts need a tokenizer")
pytest.importorskip("peft", reason="the methods compared are PEFT's and this package's")
import thousand  # noqa: E402
from forgetting_models import (  # noqa: E402
    WORDS,
    letters_tokenizer,
    tiny_language_model,
    write_encoder,
)
from study import (  # noqa: E402
    causal_model,
    classifier_subjects,
    embedding_retention,
    language,
    language_retention,
    methods,
    protocol,
    subjects,
    unseen,
)
from study.classification import make_task  # noqa: E402
from study.setup import Setup  # noqa: E402

from secura_kernels import CURLoRALinear, calibrate  # noqa: E402

CALIBRATED = [
    name
    for name, method in methods.METHODS.items()
    if method.calibrated and method.metric in ({}, dict(gated=True))
]


def rows(kind: str, count: int = 120) -> list[tuple[str, str]]:
    """Different texts; the word that the label follows from stands in each."""
    marks = {"cats": ("cat", "dog"), "colours": ("red", "blue", "small")}[kind]
    generator = torch.Generator().manual_seed(len(kind))
    found = []
    for i in range(count):
        places = torch.randint(len(WORDS), (8,), generator=generator).tolist()
        words = [WORDS[place] for place in places if WORDS[place] not in marks]
        words.insert(i % 3, marks[i % len(marks)])
        found.append((" ".join(words), marks[i % len(marks)]))
    return found


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.setattr(
        classifier_subjects,
        "TASKS",
        {kind: lambda kind=kind: make_task(kind, rows(kind)) for kind in ("cats", "colours")},
    )
    return ("cats", "colours")


@pytest.fixture
def encoder_folder(tmp_path, monkeypatch):
    texts = embedding_retention.RetentionTexts(
        tuple(text for text, _ in rows("cats", 16)),
        tuple("ab" * 8),
        {"pairs": (("cat", "dog", 3.0), ("cat", "tree", 1.0), ("red", "blue", 2.0))},
    )
    monkeypatch.setattr(embedding_retention, "retention_texts", lambda: texts)
    monkeypatch.setattr(classifier_subjects.Encoder, "shown", ("retrieval", "drift", "pairs"))
    return write_encoder(tmp_path)


@pytest.fixture
def language_folder(tmp_path, monkeypatch):
    tiny_language_model(0, torch.float32).save_pretrained(tmp_path)
    letters_tokenizer().save_pretrained(tmp_path)
    articles = {"validation": "a b c. " * 90, "test": "the quick brown fox jumps. " * 30}
    for module in (language_retention, causal_model):
        monkeypatch.setattr(module, "wikipedia", lambda: articles)
    monkeypatch.setattr(language_retention, "CHAT", {"questions": ("who?", "what is it?")})
    monkeypatch.setattr(language_retention, "TOP", 5)
    monkeypatch.setattr(unseen, "TEXTS", dict.fromkeys(unseen.TEXTS, lambda: "so it goes. " * 90))
    monkeypatch.setenv("SECURA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path


@pytest.fixture(autouse=True)
def _small_ranks(monkeypatch):
    method = methods.METHODS["SECURA"]
    monkeypatch.setitem(
        methods.METHODS, "SECURA", replace(method, settings=method.settings | dict(r=4))
    )


def run_all(subject, rate: float) -> dict[str, dict]:
    return {
        method: protocol.perform(protocol.Run(method, "replay", rate, 0, 8), subject, lambda: None)
        for method in ("head only", "SECURA", "LoRA")
    }


def check_heads(subject, records: dict[str, dict]) -> None:
    """What all subjects with heads have in common."""
    assert subject.labels == 1
    body = subject.model(methods.METHODS["LoRA"], 0).body
    assert (
        records["LoRA"]["trained"]
        == sum(p.numel() for p in body.parameters() if p.requires_grad)
        > 0
    )
    assert records["head only"]["trained"] == 0
    kept = records["head only"]["retention"]
    assert {name: kept["end"][name] for name in subject.shown} == {
        name: kept["before"][name] for name in subject.shown
    }
    for record in records.values():
        assert record["diverged"] is None
        assert all(
            0 <= value <= 1 for values in record["learned"].values() for value in values.values()
        )
    learned = records["head only"]["learned"]["cats"]
    assert learned["cats"] == learned["colours"]  # nothing that it rests on has changed


def test_encoders(encoder_folder, tasks):
    subject = subjects.load("encoder", Setup(model=str(encoder_folder), tasks=tasks, length=12))
    assert subject.tasks == tasks and subject.before["retrieval"] <= 1
    assert abs(subject.before["drift"]) < 1e-4
    batches = subject.batches("cats", 40, 0)
    assert len(batches) == 40 and batches[0]["labels"].shape == (16,)
    assert max(batch["input_ids"].shape[1] for batch in batches) <= 12
    seen = [
        tuple(row) for batch in subject.batches("cats", 5, 0) for row in batch["input_ids"].tolist()
    ]
    assert len(seen) == 5 * 16
    records = run_all(subject, 1e-2)
    check_heads(subject, records)
    assert records["SECURA"]["retention"]["end"]["drift"] > 1e-4
    setup = Setup(model=str(encoder_folder), tasks=tasks, length=12)
    assert subjects.load("encoder", setup).identity == subject.identity
    for other in (replace(setup, length=11), replace(setup, targets=("query",))):
        assert subjects.load("encoder", other).identity != subject.identity


def test_targets_and_every_layer(encoder_folder, tasks, monkeypatch):
    monkeypatch.setitem(
        methods.METHODS,
        "LoRA, every layer",
        replace(methods.METHODS["LoRA, every layer"], settings=dict(r=2)),
    )
    setup = Setup(model=str(encoder_folder), tasks=tasks, targets=("query",))
    subject = subjects.load("encoder", setup)

    def adapted(method: str) -> set[str]:
        model = subject.model(methods.METHODS[method], 0)
        return {
            name.split(".lora_A")[0].split(".")[-1]
            for name, _ in model.named_parameters()
            if "lora_A" in name
        }

    assert adapted("LoRA") == {"query"}
    whole, layers = (
        subject.model(methods.METHODS[name], 0).body for name in ("full", "full, every layer")
    )
    assert all(p.requires_grad for p in whole.parameters())
    assert {name for name, p in layers.named_parameters() if p.requires_grad} == {
        f"{name}.{kind}"
        for name, module in layers.named_modules()
        if isinstance(module, torch.nn.Linear)
        for kind in ("weight", "bias")
    }
    assert adapted("LoRA, every layer") == {"query", "key", "value", "dense"}


def test_decoders_read_the_last_token(language_folder, tasks):
    subject = subjects.load("decoder", Setup(model=str(language_folder), tasks=tasks, length=16))
    assert subject.before["agreement"] == 1 and subject.before["wikipedia kl"] == 0
    model = subject.model(methods.METHODS["head only"], 0).eval()
    batch = subject.batches("cats", 1, 0)[0]
    both = model(**batch).logits
    for row in (0, 5):
        length = int(batch["attention_mask"][row].sum())
        states = model.body(
            input_ids=batch["input_ids"][row : row + 1, :length], output_hidden_states=True
        ).hidden_states
        torch.testing.assert_close(both[row, :2], model.heads["cats"](states[-1][0, -1]))
    records = run_all(subject, 1e-2)
    check_heads(subject, records)
    assert records["LoRA"]["retention"]["end"]["wikipedia kl"] > 1e-5


def test_base_weights_may_be_bfloat16(language_folder, tasks):
    subject = subjects.load(
        "decoder", Setup(model=str(language_folder), tasks=tasks, length=16, dtype="bfloat16")
    )
    record = protocol.perform(
        protocol.Run("SECURA", "sequential", 1e-2, 0, 4), subject, lambda: None
    )
    assert record["diverged"] is None and record["retention"]["end"]["wikipedia kl"] > 0
    model = subject.model(methods.METHODS["SECURA"], 0)
    assert {(p.dtype, p.requires_grad) for p in model.body.parameters()} == {
        (torch.bfloat16, False),
        (torch.float32, True),
    }
    assert {p.dtype for p in model.heads.parameters()} == {torch.float32}


def test_language_models_learn_domains(language_folder, monkeypatch):
    texts = {part: "abc abd " * 80 for part in language.PARTS}
    monkeypatch.setattr(
        language,
        "DOMAINS",
        {"one": lambda: texts, "two": lambda: {part: "xyz. xyy. " * 80 for part in language.PARTS}},
    )
    subject = subjects.load("language", Setup(model=str(language_folder), length=16))
    assert subject.tasks == ("one", "two") and subject.shown[1] == "wikipedia kl"
    assert subject.labels == 15  # of 16 tokens all but the first are predicted
    records = run_all(subject, 3e-2)
    untouched = records["head only"]
    assert untouched["trained"] == 0 and untouched["retention"]["end"]["agreement"] == 1
    assert untouched["learned"]["one"]["one"] == untouched["learned"]["one"]["two"]
    for name in ("SECURA", "LoRA"):
        assert records[name]["learned"]["one"]["one"] > untouched["learned"]["one"]["one"]
        assert records[name]["learned"]["two"]["two"] > untouched["learned"]["two"]["two"]
        assert records[name]["retention"]["end"]["wikipedia kl"] > 1e-3
    model = subject.model(methods.METHODS["head only"], 0)
    windows = subject.data["one"].held_out("test", 16, 2048)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=windows, labels=windows).loss
    assert math.isclose(subject.learned(model, "one", "test"), -float(loss), rel_tol=1e-2)


@pytest.fixture
def two_domains(language_folder, monkeypatch):
    monkeypatch.setattr(
        language,
        "DOMAINS",
        {
            "one": lambda: {part: "abc abd " * 80 for part in language.PARTS},
            "two": lambda: {part: "xyz. xyy. " * 80 for part in language.PARTS},
        },
    )
    for name in CALIBRATED:
        method = methods.METHODS[name]
        monkeypatch.setitem(
            methods.METHODS, name, replace(method, settings=method.settings | dict(r=4))
        )
    monkeypatch.setattr(causal_model, "TOKENS", 2000)
    return language_folder


def setup_of(folder, **settings) -> Setup:
    return Setup(model=str(folder), length=16, precision="float32", **settings)


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_methods_run_and_repeat(name, two_domains):
    """The text that the model writes is written once; a natural basis is one of each task's."""
    subject = subjects.load("language", setup_of(two_domains))
    bfloat16 = subjects.load("language", replace(setup_of(two_domains), precision="bfloat16"))
    assert subject.identity != bfloat16.identity  # beside which its figures do not belong
    subject = subjects.load("language", setup_of(two_domains))
    assert subject.before["agreement"] == 1
    record = protocol.perform(protocol.Run(name, "sequential", 3e-2, 0, 8), subject, lambda: None)
    assert record["diverged"] is None and 0 < record["retention"]["end"]["wikipedia kl"] < 1
    files = list((two_domains / "cache").glob("own-text-*"))
    assert len(files) == 1
    again = protocol.perform(protocol.Run(name, "sequential", 3e-2, 0, 8), subject, lambda: None)
    assert again == record  # from the statistics that the first run left


@pytest.mark.parametrize("kind", causal_model.PASSAGES)
def test_passages_join_what_is_to_be_kept(kind, two_domains, monkeypatch):
    """Text on which nothing is measured, for a basis and for a KL loss alike."""
    monkeypatch.setitem(causal_model.PASSAGES, "javascript", lambda: "x y z; " * 90)
    subject = subjects.load("language", setup_of(two_domains))
    own, both = (subject.general_text(added) for added in (None, kind))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(own, both, strict=False))
    ids = torch.cat([batch["input_ids"] for batch in both[len(own) :]])
    expected = dict(wikipedia="a b c. ", javascript="x y z; ")[kind]
    text = language.encode(subject.tokenizer, expected * 90)
    assert torch.equal(ids.flatten(), text[: ids.numel()]) and ids.shape[1] == causal_model.LENGTH
    fewer, more = (
        subject.general_rows(replace(methods.METHODS["LoRA"], passages=passages), predictions=True)
        for passages in (None, kind)
    )
    assert len(more["ids"]) - len(fewer["ids"]) == ids.numel() // 16
    for row in (fewer, more):
        assert row["logs"].shape[:2] == row["ids"].shape


@pytest.mark.parametrize("strategy", protocol.ON_GENERAL_TEXT)
def test_strategies_on_general_text(strategy, two_domains):
    subject = subjects.load("language", setup_of(two_domains))
    kept = {}
    for name in ("sequential", strategy):
        record = protocol.perform(protocol.Run("LoRA", name, 3e-2, 0, 8), subject, lambda: None)
        kept[name] = record["retention"]["end"]["wikipedia kl"]
    assert kept[strategy] != kept["sequential"]


def test_prediction_and_measurement_are_drawn(two_domains, monkeypatch, capsys):
    import prediction

    monkeypatch.setattr(
        prediction,
        "RUNS",
        {
            basis: methods.METHODS[f"CURLoRA, every layer, {basis}"]
            for basis in ("whitened", "natural")
        },
    )
    out = two_domains / "out"
    monkeypatch.setattr(
        sys,
        "argv",
        ["prediction.py", "--model", str(two_domains), "--steps", "6", "--out", str(out)],
    )
    prediction.main()
    printed = capsys.readouterr().out
    assert "| natural | 6 |" in printed and "layers' changes, each alone" in printed
    assert (out / "prediction.md").read_text().strip() == printed.strip()
    assert (out / "prediction.png").stat().st_size > 5000
    rows = json.loads((out / "prediction.json").read_text())["records"]["natural"]["rows"]
    assert [row["step"] for row in rows] == [3, 6] and rows[0]["size"] < rows[1]["size"]


def test_ways_of_measuring_are_compared_at_equal_learning(two_domains, monkeypatch, capsys):
    import metric

    monkeypatch.setattr(metric, "STEPS", 4)
    qkv, turned = "queries, keys and values alone", "C and R each turned at random"
    odds = "gated, log odds of -4 before a token is seen"
    last, other = "gradient of the last 8 batches", "gradient of 8 other batches"
    often = "8 batches three times over"
    monkeypatch.setitem(metric.WAYS, last, metric.WAYS[last] | dict(batches=2))
    ways = {"damping 1", "r = 16", "shrunk to 0.6", qkv, turned, "gated", odds, metric.DEFAULT}
    ways |= {last, other, often}
    out = two_domains / "metric"
    monkeypatch.setattr(
        sys, "argv", ["metric.py", "--model", str(two_domains), "--way", *ways, "--out", str(out)]
    )
    metric.main()
    assert (out / "metric.md").read_text().strip() == capsys.readouterr().out.strip()
    records = json.loads((out / "metric.json").read_text())["records"]
    assert [r["way"] for r in records.values()].count(metric.DEFAULT) == len(metric.RATES)
    assert {r["way"] for r in records.values()} == ways
    at_rate = {r["way"]: r["kl"] for r in records.values() if r["rate"] == metric.RATE}
    different = (turned, "gated", odds, last, other, often, metric.DEFAULT)
    assert len({at_rate[way] for way in different}) == len(different)
    monkeypatch.setattr(metric.Trials, "run", None)  # goes on where it stopped
    metric.main()


def test_turned_bases_span_the_same():
    import metric

    layer = CURLoRALinear.from_linear(torch.nn.Linear(12, 10), 4, basis="natural")
    model, data = torch.nn.Sequential(layer), torch.randn(6, 40, 12)

    def loss(model, batch):
        return model(batch).square().mean()

    calibrate(model, list(data), list(data), loss=loss, progress=False)
    C, R = layer.C.clone(), layer.R.clone()
    metric.turn(model)
    for before, after in ((C, layer.C), (R.T, layer.R.T)):
        Q = torch.linalg.lstsq(before, after).solution
        assert not torch.allclose(after, before, atol=1e-3)
        torch.testing.assert_close(before @ Q, after)
        torch.testing.assert_close(Q.T @ Q, torch.eye(4))


def test_a_place_on_a_curve():
    import metric

    curve = [(10.0, 0.8, 0.04), (20.0, 0.9, 0.01), (40.0, 1.0, 0.001)]
    agreement, kl = metric.on_curve(curve, 200**0.5)  # half way in nats
    assert (agreement, kl) == (pytest.approx(0.85), pytest.approx(0.02))
    assert metric.on_curve(curve, 41) is None


@pytest.mark.parametrize("way", thousand.WAYS)
def test_a_long_run_goes_on_where_it_stopped(way, two_domains, monkeypatch, tmp_path):
    """To the bit, and its checkpoint goes when it ends."""
    monkeypatch.setattr(thousand, "STEPS", 9)
    monkeypatch.setattr(thousand, "MEASURED", (2, 6, 9))
    monkeypatch.setattr(thousand, "CHECKPOINT", 4)
    step, steps = torch.optim.AdamW.step, []

    def stopped(optimizer, *arguments):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return step(optimizer, *arguments)

    def main(out):
        words = ["thousand.py", "--model", str(two_domains), "--way", way, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", words)
        thousand.main()
        assert {path.suffix for path in out.iterdir()} == {".json", ".md", ".png"}
        return json.loads((out / "thousand.json").read_text())["records"][way]["rows"]

    whole = main(tmp_path / "whole")
    monkeypatch.setattr(torch.optim.AdamW, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(tmp_path / "stopped")
    assert [row["step"] for row in whole] == [2, 6, 9]
    assert main(tmp_path / "stopped") == whole
    assert len(steps) == 6 + 5  # from the fourth step on


def test_unknown_names_are_named(language_folder, encoder_folder):
    with pytest.raises(ValueError, match="subject='other'"):
        subjects.load("other", Setup())
    with pytest.raises(ValueError, match="general='other'"):
        subjects.load("decoder", Setup(model=str(language_folder), tasks=(), general="other"))
    with pytest.raises(ValueError, match="task='other'"):
        subjects.load("encoder", Setup(model=str(encoder_folder), tasks=("other",)))
    with pytest.raises(ValueError, match="'other'"):
        subjects.load("language", Setup(model=str(language_folder), tasks=("other",)))
