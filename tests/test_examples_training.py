"""examples/trainer.py and sft.py, as a user runs them: SmolLM2-135M for a few steps."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("transformers", "peft", "trl", "tensorboard", "gguf"):
    pytest.importorskip(package, reason=f"the examples need {package}")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A text to learn; the model is the real one."""
    rng = random.Random(0)
    words = ["the", "king", "a", "queen", "and", "sword", "of", "night", "to", "day", "is"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=9)) for _ in range(800)))
    return path


def run(script: str, *arguments: str | Path) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)],
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_trainer_learns_is_resumed_and_reloads(text, tmp_path):
    given = ("--text", text, "--general-text", text, "--out", tmp_path, "--cpu")
    run("trainer.py", *given, "--steps", "2", "--save-every", "1")
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").is_file()
    printed = run("trainer.py", *given, "--steps", "3", "--resume")
    assert "proved to reload" in printed
    assert "'retention/forgetting'" in printed
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_sft_trains_and_saves(text, tmp_path):
    run("sft.py", "--text", text, "--out", tmp_path, "--steps", "2", "--cpu")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
