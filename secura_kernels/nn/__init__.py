"""The layers: a frozen linear layer beside its adapter, and what is saved of them."""

from .checkpoint import load_adapter, save_adapter
from .linear import CURLoRALinear, SECURALinear

__all__ = ["CURLoRALinear", "SECURALinear", "load_adapter", "save_adapter"]
