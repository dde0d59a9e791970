"""What one run is: the methods and their defaults, and the job that one process carries out."""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BASE = "base"  # the job that only measures the model as it was before any training
LIKELIEST = "likeliest.safetensors"  # in the base job's folder: what that model said came next
HELD_OUT = ("test", "validation")  # validation is for choosing settings, test for reporting
EVALUATION = ("method", "identity", "device", "batch_size", "seq_len", "eval_tokens", "held_out")


class InputError(ValueError):
    """An argument cannot be used; the message names it, its value and what is allowed."""


@dataclass(frozen=True)
class Method:
    """A way to fine-tune: the package that does it, its learning rate, its own options."""

    label: str
    package: str
    learning_rate: float
    options: dict[str, Any]


METHODS = {
    # Before the natural one, which takes the bases of the same calibration.
    "gated": Method("CURLoRA, gated", "secura_kernels", 2e-3, {"r": 64, "basis": "natural"}),
    "natural": Method("CURLoRA, natural", "secura_kernels", 2e-3, {"r": 64, "basis": "natural"}),
    "curlora": Method(
        "CURLoRA published",
        "secura_kernels",
        2e-3,
        {"r": 16, "selection": "inverted", "basis": "raw"},
    ),
    "secura": Method(
        "SECURA published",
        "secura_kernels",
        1e-4,
        {"r": 150, "m": 200, "selection": "lowest", "basis": "raw", "norm": "published"},
    ),
    "lora": Method("LoRA", "peft", 5e-4, {"r": 16, "lora_alpha": 16}),
    "dora": Method("DoRA", "peft", 5e-4, {"r": 16, "lora_alpha": 16, "use_dora": True}),
    "full": Method("full fine-tuning", "torch", 3.5e-5, {}),
}
SIZES = {
    "quick": {"steps": 18, "batch_size": 4, "seq_len": 64, "eval_tokens": 2048},
    "full": {"steps": 100, "batch_size": 4, "seq_len": 256, "eval_tokens": 8192},
}


@dataclass(frozen=True)
class Job:
    """One method on one model and one text: all that its process needs to know.

    `tokens` is the file of token streams that `Corpus.save` writes. `identity` speaks for
    the content of that file and of the model, so that equal hashes mean equal runs.
    """

    method: str
    options: dict[str, Any]
    learning_rate: float
    model: str
    tokens: str
    identity: str
    out: str
    device: str
    targets: tuple[str, ...]
    steps: int
    batch_size: int
    seq_len: int
    eval_tokens: int
    held_out: str
    schedule: str
    warmup: float
    clip: float
    seed: int

    @property
    def folder(self) -> Path:
        """Where this job's result.json and adapter go."""
        return Path(self.out) / self.method

    def settings(self) -> dict[str, Any]:
        """What decides the result: not where files lie; for the base job, nothing of training."""
        values = asdict(self)
        if self.method == BASE:
            return {name: values[name] for name in EVALUATION}
        return {name: value for name, value in values.items() if name not in ("tokens", "out")}

    def hash(self) -> str:
        """Equal for two runs exactly if their settings and package versions are."""
        text = json.dumps([self.settings(), versions()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def finished(self) -> dict[str, Any] | None:
        """The result of this very job if it lies in its folder already, with what belongs to it."""
        try:
            result = json.loads((self.folder / "result.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        whole = (self.folder / (LIKELIEST if self.method == BASE else "adapter")).exists()
        return result if whole and result.get("hash") == self.hash() else None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        values = json.loads(text)
        return cls(**values | {"targets": tuple(values["targets"])})


def versions() -> dict[str, str]:
    """Versions of the packages that compute."""
    found = {}
    for package in ("torch", "transformers", "peft", "secura_kernels"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "from source" if find_spec(package) else "not installed"
    return found


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that `path` is always a whole JSON file, old or new."""
    half = path.with_name(path.name + ".tmp")
    half.write_text(json.dumps(value, indent=2) + "\n")
    half.replace(path)
