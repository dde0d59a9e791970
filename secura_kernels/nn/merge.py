"""Folding the change into the weight: merge and unmerge, plain copies, the stages M1 and M2."""

import torch
from torch import Tensor, nn

CANNOT_MERGE = (
    "this layer cannot be merged: its gate acts on outputs, which is not a linear map of x. Either "
    "merge delta_W alone (the published M1 step: stage_m1()), or train with the norm in the weight "
    "domain (SMagNorm.preset(..., domain='weight')), whose effective weight merges exactly")


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
            RuntimeError: a gate in the output domain; nothing is changed.
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
            RuntimeError: a gate in the output domain.
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
    def stage_m1(self) -> None:
        """M1 [SECURA]: W <- W + delta_W, then the core is zero, and training goes on.

        C and R stay those of the first W. Without a gate the output does not change. With a gate
        on the weight, W <- W_eff, which does not change it either; with one on outputs delta_W is
        folded without it, as published, and the output does change. The adapter bias stays.
        W is changed in place; an adapter file saved from here on carries it.

        Raises:
            RuntimeError: a merged layer, or one that has taken an M2 stage.
        """
        self._require_unmerged("stage_m1")
        if self.long_core() is not None:
            raise RuntimeError("stage_m1 after stage_m2: a layer takes one kind of stage")
        if self.norm is not None and self.norm.domain == "weight":
            matrix = self.effective(self.base_matrix())
        else:
            matrix = self._changed()
        self.untie(self.base_matrix())
        self.base_matrix().copy_(matrix)
        self.core_parameter().zero_()
        self.forget_past()
        self.base_changed = True
        self.refresh()

    @torch.no_grad()
    def stage_m2(self) -> None:
        """M2 [SECURA]: W stays; the core is added to a long-term one, then it is zero.

        The base of the next stage, W + alpha C core_long R, is formed once, here, beside W.

        Raises:
            RuntimeError: a merged layer, or one that has taken an M1 stage.
        """
        self._require_unmerged("stage_m2")
        if self.base_changed:
            raise RuntimeError("stage_m2 after stage_m1: a layer takes one kind of stage")
        self.untie(self.base_matrix())
        self.accumulate("m2")
        self.core_parameter().zero_()
        self.refresh()

    def _require_unmerged(self, what: str) -> None:
        if self.merged:
            raise RuntimeError(f"{what} needs an unmerged layer: call unmerge() first")

    @torch.no_grad()
    def _merged_tensors(self) -> tuple[Tensor, Tensor | None]:
        """New weight, in the base's layout, and bias of the linear map this layer is."""
        if self.norm is not None and self.norm.domain == "output":
            raise RuntimeError(CANNOT_MERGE)
        matrix = self._changed() if self.norm is None else self.effective(self.stage_matrix())
        bias, more = self.bias, self.adapter_bias
        if more is not None:
            bias = more if bias is None else bias.to(more.dtype) + more
        bias = None if bias is None else bias.to(self.weight.dtype, copy=True)
        return (matrix.T if self.transposed else matrix).contiguous(), bias

    def _changed(self) -> Tensor:
        """The stage's matrix + delta_W, rounded once; what was learned in earlier bases too."""
        weight = self.base_matrix()
        change = self.delta(weight, self.trained_core()) + self.past_delta()
        return change.add_(self.stage_matrix()).to(weight.dtype)
