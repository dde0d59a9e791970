"""What a study is of: by default what PyPI packages carry, else what its user names."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Setup:
    """Settings of a subject; None: the subject's own.

    Attributes:
        quick: fewer test examples.
        model: a name on the Hugging Face hub, or a folder. tasks: names. targets: the layers that
            adapters go to, by the ends of their names.
        batch_size: rows, or windows of text. length: tokens of one, at most.
        dtype: of the base model's weights, "float32" or "bfloat16"; full fine-tuning trains in it.
        general: the text of which a language model is not to lose its predictions.
        precision: of all products, "bfloat16" or "float32".
    """

    quick: bool = False
    model: str | None = None
    tasks: Sequence[str] | None = None
    targets: Sequence[str] | None = None
    batch_size: int | None = None
    length: int | None = None
    dtype: str = "float32"
    general: str = "wikipedia"
    precision: str = "bfloat16"

    def choices(self) -> list[tuple[str, object]]:
        """What was chosen that no value of a subject holds."""
        return [
            (name, value)
            for name, value, own in (
                ("targets", self.targets, None),
                ("general", self.general, "wikipedia"),
                ("precision", self.precision, "bfloat16"),
            )
            if value != own
        ]


def title(model: str, tasks: Sequence[str]) -> str:
    return f"{model}, {' → '.join(tasks)}"


def digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:20]
