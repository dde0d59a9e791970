"""The functions of secura_kernels as a kernel of the Hugging Face hub: a frozen linear layer with a
CUR update (CURLoRA, arXiv 2408.14572; SECURA, arXiv 2502.18168), by Triton on NVIDIA GPUs and by
PyTorch elsewhere. The layers, calibration and the PEFT method are in the package itself.

``assemble.py`` puts the modules that these names come from beside this file.
"""

from .functional import cur_batched, cur_epilogue, cur_linear
from .selection import select
from .settings import SMagNorm

__all__ = ["SMagNorm", "cur_batched", "cur_epilogue", "cur_linear", "select"]
