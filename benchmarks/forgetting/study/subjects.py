"""The kinds of models that are studied, by name."""

from secura_kernels.checks import check_choice

from .classifier_subjects import Decoder, Encoder
from .device import set_precision
from .language_subject import Language
from .protocol import Subject
from .setup import Setup

KINDS = {kind.name: kind for kind in (Encoder, Language, Decoder)}
NAMES = tuple(KINDS)
STEPS = {"encoder": 120, "language": 24, "decoder": 24}  # of each task; hours on a CPU


def load(name: str, setup: Setup) -> Subject:
    """The subject of this name, with everything it needs fetched and read."""
    check_choice("subject", name, NAMES)
    set_precision(setup.precision)
    return KINDS[name](setup)
