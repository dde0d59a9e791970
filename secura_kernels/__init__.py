"""SECURA and CURLoRA: fast, exact replacements of ``nn.Linear`` for fine-tuning."""

from .adapter_file import load_adapter, save_adapter
from .calibration import calibrate
from .functional import cur_linear
from .modules import CURLoRALinear, SECURALinear
from .selection import select
from .smagnorm import ImportanceDecay, SMagNorm

__version__ = "0.1.0"

__all__ = [
    "CURLoRALinear",
    "ImportanceDecay",
    "SECURALinear",
    "SMagNorm",
    "calibrate",
    "cur_linear",
    "load_adapter",
    "save_adapter",
    "select",
]
