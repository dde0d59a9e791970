"""Folding the change into the weight: merge and unmerge, plain copies."""

import torch
from torch import Tensor, nn

CANNOT_MERGE = (
    "cannot be merged: its gate acts on outputs, which is not a linear map of x. Either take the "
    "published M1 step, which keeps delta_W alone (stage_m1(), of an adapter without "
    "adapter_bias), and merge then, or train with the gate in the weight domain "
    "(SMagNorm(domain='weight'), in PEFT norm_domain='weight'), which merges exactly"
)
TASK_GATE = (
    "has a gate that opens for tokens of the task, which is not a linear map of x: calibrate "
    "without gated=True for one that can be merged, or saved as a LoRA"
)


def why_not(adapter: nn.Module) -> str:
    """What keeps an adapter that is not linear from being merged."""
    return TASK_GATE if adapter.has_gated() else CANNOT_MERGE


class Mergeable:
    """The part of ``CURLinear`` that changes weights. "Matrix" is a weight as (N, K), whatever
    the layout of the base."""

    _unmerged: tuple[nn.Parameter, nn.Parameter | None] | None = None

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def delta_weight(self) -> Tensor:
        """delta_W = alpha C core R (N, K), in float32 (float64 for a float64 weight); detached."""
        return self.delta(self.base_matrix()) + self.past_delta()

    def merge(self) -> None:
        """Folds the adapter into the weight and the bias, for inference; ``unmerge`` restores them
        bit for bit (they are kept aside). A merged layer saves its state unmerged.

        Raises:
            RuntimeError: a gate in the output domain, or for tokens of the task; nothing is
                changed.
        """
        if self.merged:
            return
        weight, bias = self._merged_tensors()
        kept = self.weight, self.bias
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._unmerged = kept

    def unmerge(self) -> None:
        """Restores the weight and the bias from before ``merge``."""
        if self.merged:
            self.weight, self.bias = self._unmerged
            self._unmerged = None

    def to_linear(self) -> nn.Module:
        """A plain layer (``nn.Linear``, or ``Conv1D``) equal to this one, with tensors of its own.

        Raises:
            RuntimeError: a gate in the output domain, or for tokens of the task.
        """
        weight, bias = (self.weight, self.bias) if self.merged else self._merged_tensors()
        where = dict(device=weight.device, dtype=weight.dtype)
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            linear = Conv1D(self.out_features, self.in_features).to(**where)
        else:
            linear = nn.Linear(self.in_features, self.out_features, bias is not None, **where)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        return linear.train(self.training)

    @torch.no_grad()
    def _merged_tensors(self) -> tuple[Tensor, Tensor | None]:
        """New weight, in the base's layout, and bias of the linear map this layer is."""
        if not self.is_linear():
            raise RuntimeError(f"this layer {why_not(self)}")
        matrix = self.merged_matrix(self.base_matrix()).to(self.weight.dtype)
        bias, more = self.bias, self.adapter_bias
        if more is not None:
            bias = more if bias is None else bias.to(more.dtype) + more
        bias = None if bias is None else bias.to(self.weight.dtype, copy=True)
        return self._as_matrix(matrix).contiguous(), bias
