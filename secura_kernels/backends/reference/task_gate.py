"""The gate that opens for tokens of the task: how far, and what it does to gradients.

Of t = R x (r,) it is s = sigmoid(w . t + c), and the change of a token alpha C core (s t). As a
tensor a gate is (r, 2): w, and of each row its share of c. Where w and c come from:
``nn/task_gate.py``.
"""

import torch
from torch import Tensor

from .blocks import wide_dtype


def openness(t: Tensor, gate: Tensor) -> Tensor:
    """s (..., 1) of t (..., r) with a gate (r, 2), or of each of several with as many gates; wide,
    differentiable."""
    wide = wide_dtype(t.dtype)
    w, c = gate.to(wide).unbind(-1)
    return torch.sigmoid((t.to(wide) * w).sum(-1, keepdim=True) + c.sum(-1, keepdim=True))


def gradient_of_t(ds_t: Tensor, t: Tensor, s: Tensor, gate: Tensor) -> Tensor:
    """The gradient of t (M, r) from s times that of s t: what comes through the gate is added."""
    w = gate[:, 0].to(ds_t.dtype)
    return ds_t + (1 - s) * (ds_t * t.to(ds_t.dtype)).sum(-1, keepdim=True) * w
