"""SECURA and CURLoRA: fast, exact replacements of ``nn.Linear`` for fine-tuning."""

from .functional.linear import cur_linear
from .nn.checkpoint import load_adapter, save_adapter
from .nn.linear import CURLoRALinear, SECURALinear
from .nn.projections import fuse_projections
from .selection import select
from .settings import ImportanceDecay, SMagNorm
from .train.calibration import calibrate

__version__ = "0.1.0"

__all__ = [
    "CURLoRALinear",
    "ImportanceDecay",
    "SECURALinear",
    "SMagNorm",
    "calibrate",
    "cur_linear",
    "fuse_projections",
    "load_adapter",
    "save_adapter",
    "select",
]
