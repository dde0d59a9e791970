"""Silence for what libraries say while they are imported, which no user of the examples can act on.

Call it before transformers and peft are imported. What they say of the run itself is left alone.
"""

import logging
import warnings

# What both import where it is there. torchao: files of other systems, and PyTorch's own changes;
# bitsandbytes: a package of 4-bit kernels, on CPUs with bfloat16 instructions.
IMPORTING = ("torchao", "torch.utils._pytree", "bitsandbytes")


def hush() -> None:
    for name in IMPORTING:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries to one another
