"""What a layer is beside its input: one tuple in the place of a dozen arguments."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..settings import SMagNorm


class CurOperands(NamedTuple):
    """A frozen layer and its change, alpha C core R.

    The tensors come first, in the order in which the ops take them (``tensors``).

    Attributes:
        weight: W (N, K), frozen.
        bias: (N,), frozen. One floating dtype with W, C and R.
        core: (r, r), any floating dtype.
        cols, rows: (r,) int64, while C = W[:, cols] and R = W[rows, :]; otherwise
        C, R: (N, r) and (r, K), stored.
        adapter_bias: (N,), part of the change; any floating dtype. decay: (N,) importance-decay
            factors; any floating dtype.
        alpha: scale of the change. norm: the gate, or None.
        task_gate: (r, 2), see ``reference/task_gate.py``, or None; not beside a norm.
    """

    weight: Tensor
    bias: Tensor | None
    core: Tensor
    cols: Tensor | None
    rows: Tensor | None
    C: Tensor | None
    R: Tensor | None
    adapter_bias: Tensor | None
    decay: Tensor | None
    alpha: float
    norm: SMagNorm | None
    task_gate: Tensor | None = None

    @classmethod
    def of_epilogue(
        cls,
        core: Tensor,
        C: Tensor,
        adapter_bias: Tensor | None,
        decay: Tensor | None,
        alpha: float,
        norm: SMagNorm | None,
        task_gate: Tensor | None = None,
    ) -> "CurOperands":
        """Of a layer whose base output and x R^T somebody else computes: there is no W."""
        return cls(
            None,
            None,
            core,
            None,
            None,
            C,
            None,  # type: ignore[arg-type]
            adapter_bias,
            decay,
            alpha,
            norm,
            task_gate,
        )

    @property
    def r(self) -> int:
        return self.core.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return (self.C if self.weight is None else self.weight).dtype

    @property
    def tied_rows(self) -> Tensor | None:
        """(r,) where R is W[rows], so that dT goes into columns of G' (identity 3)."""
        return self.rows if self.R is None else None

    @property
    def t_is_of_base(self) -> bool:
        """Whether t is columns of the base output (identity 1)."""
        return self.R is None and self.bias is None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Without ``task_gate``, which a gate on the weight has no use for."""
        return self[:9]

    def whole_C(self) -> Tensor:
        """C (N, r): the stored one, or the columns of W."""
        return self.weight.index_select(1, self.cols) if self.C is None else self.C

    def whole_R(self) -> Tensor:
        """R (r, K): the stored one, or the rows of W."""
        return self.weight.index_select(0, self.rows) if self.R is None else self.R

    def with_contiguous_vectors(self) -> "CurOperands":
        """The kernels take the strides of vectors as given."""
        vectors = dict(
            bias=self.bias,
            cols=self.cols,
            rows=self.rows,
            adapter_bias=self.adapter_bias,
            decay=self.decay,
            task_gate=self.task_gate,
        )
        spread = {
            name: vector.contiguous()
            for name, vector in vectors.items()
            if vector is not None and not vector.is_contiguous()
        }
        return self._replace(**spread) if spread else self
