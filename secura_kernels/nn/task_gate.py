"""A gate that opens for tokens of the task: each token's change times the probability that it is.

Of a token's t = R x (r,) the gate is s = sigmoid(w . t + c), and the layer's change
alpha C core (s t). w and c come from ``calibrate(..., gated=True)`` and do not train: s is the
posterior probability, by Fisher's linear discriminant, that the token is of the task rather than
of the text that is to be kept. So a layer changes by its task, and hardly elsewhere; but it is no
linear map of x.
"""

import torch
from torch import Tensor

from ..backends.reference.task_gate import openness

ALWAYS_OPEN = (0.0, 1e3)  # w and c of a row


class TaskGate:
    """The part of ``Adapter`` that has gates: ``gate`` (r, 2) of its task and ``gate_past``
    (q r, 2) of q tasks before; a row has its w, and its share of c. None: always open."""

    def gated_past(self, t: Tensor) -> Tensor:
        """t = x R_past^T (..., q r), each task's part times that task's gate."""
        if self.gate_past is None:
            return t
        parts, gates = (v.unflatten(d, (-1, self.r)) for v, d in ((t, -1), (self.gate_past, 0)))
        return (parts * openness(parts, gates).to(t.dtype)).flatten(-2)

    def all_gates(self) -> Tensor | None:
        """(q r + r, 2) of the rows of ``factors``; None where all are always open."""
        if self.gate is None and self.gate_past is None:
            return None
        past = 0 if self.R_past is None else len(self.R_past)
        found = [(self.gate_past, past), (self.gate, self.r)]
        open_row = torch.tensor(ALWAYS_OPEN, device=self.cols.device)
        return torch.cat(
            [open_row.expand(rows, 2) if gate is None else gate for gate, rows in found]
        )

    def has_gated(self) -> bool:
        """Whether something was learned behind a gate."""
        if self.gate_past is not None:
            return True
        learned = any(p.any() for p in self.learned_parameters()) or self.long_core() is not None
        return self.gate is not None and learned
