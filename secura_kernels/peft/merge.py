"""The merging of a PEFT layer: adapters folded into its base weight, and the weight restored."""

import warnings

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from ..nn.merge import why_not
from . import base_weight, sharding


class Mergeable:
    """The part of ``SecuraLinear`` that changes base weights."""

    @torch.no_grad()
    def check_merge(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Raises what ``merge`` would raise, before anything is changed.

        Raises:
            ValueError: a gate on outputs or for tokens of the task, several adapters of which one
                has a gate, a base that cannot be quantised again, or, with ``safe_merge``, a merged
                weight that is not finite.
            RuntimeError: a base that is sharded over ranks.
        """
        names = self._present(self.active_adapters if adapter_names is None else adapter_names)
        if names:
            base_weight.check_merge(self.get_base_layer(), self.quantization_backend)
        self._check_linear(names)
        if safe_merge and names:
            self._check_finite(names, *self._merged_tensors(names))

    def _check_linear(self, names: list[str]) -> None:
        """Raises ValueError unless a matrix describes what the adapters change together."""
        if len(names) > 1:
            self._check_several(names)
        for name in names:
            adapter = self.secura_adapter[name]
            if not adapter.is_linear():
                raise ValueError(f"adapter {name!r} {why_not(adapter)}")

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Folds adapters into the base weight and bias, which ``unmerge`` restores bit for bit:
        they are kept aside. A quantised weight is quantised again; ``requantisation_error``, and a
        warning, say what that cost: |what it holds now - what it should| / |the adapters' change|.

        Args:
            safe_merge: check that the merged weight is finite, before anything is changed.

        Raises:
            ValueError: adapters that cannot be merged, a weight that is not finite, or one that
                cannot be quantised again; nothing is changed then.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        self.check_merge([*self.merged_adapters, *names])
        base, backend = self.get_base_layer(), self.quantization_backend
        merged, bias = self._merged_tensors([*self.merged_adapters, *names])
        if safe_merge:
            self._check_finite(names, merged, bias)
        if bias is not None and base.bias is None:
            warnings.warn(
                f"merging {names} gives a layer without a bias one: a model class that builds this "
                "layer without a bias will not load it again",
                stacklevel=2,
            )
        weight = self.base_matrix()
        kept = self._unmerged or base_weight.keep(base, backend)
        base_weight.replace(self, merged.to(weight.dtype), bias, backend)
        self._unmerged = kept
        self.merged_adapters += names
        if backend is not None:
            self._measure(names, weight, merged)

    def _measure(self, names: list[str], weight: Tensor, merged: Tensor) -> None:
        again = base_weight.matrix(self.get_base_layer(), self.quantization_backend)
        lost = float(torch.linalg.vector_norm(again.to(merged.dtype) - merged))
        moved = float(torch.linalg.vector_norm(merged - weight))
        self.requantisation_error = lost / moved if moved else 0.0 if lost == 0 else float("inf")
        warnings.warn(
            f"merging {names} quantised the weight again, which is off by "
            f"{self.requantisation_error:.2g} of the adapters' own change: merge into the "
            "unquantised model where that matters",
            stacklevel=3,
        )

    def _merged_tensors(self, names: list[str]) -> tuple[Tensor, Tensor | None]:
        """W (N, K), float32 or wider, and the bias, those from before any merge, with adapters
        added."""
        weight = self.base_matrix()
        bias = (self._unmerged or self.get_base_layer()).bias
        merged = weight
        for name in names:
            adapter = self._ready(name)
            merged = adapter.merged_matrix(weight, merged)
            if adapter.adapter_bias is not None:
                more = adapter.adapter_bias.detach()
                bias = more.to(weight.dtype) if bias is None else (bias + more).to(bias.dtype)
        # The one from before is kept for ``unmerge``: the merged layer gets a bias of its own.
        return merged, None if bias is None else bias.detach().clone()

    def _check_finite(self, names: list[str], weight: Tensor, bias: Tensor | None) -> None:
        if not (torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())):
            raise ValueError(
                f"the merged weight is not finite: the adapters {names} seem to be "
                "broken; nothing was changed"
            )

    def unmerge(self) -> None:
        """Restores the base weight and bias from before ``merge``."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base, dtype = self.get_base_layer(), self._unmerged.weight.dtype
        base_weight.restore(base, self._unmerged, self.quantization_backend)
        self._unmerged, self.merged_adapters, self.requantisation_error = None, [], None
        if self.weight.dtype != dtype:  # what derives from W did so in the former one
            for adapter in self.secura_adapter.values():
                self._settle(adapter)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the base weight, (N, K) in the base's layout, float32 or wider.

        Raises:
            ValueError: a gate on outputs, which no matrix describes.
            RuntimeError: a base that is sharded over ranks.
        """
        sharding.check_merge(self.get_base_layer())
        self._check_linear([adapter])
        weight, ready = self.base_matrix(), self._ready(adapter)
        if ready.norm is not None and ready.norm.domain == "weight":
            change = ready.merged_matrix(weight).sub_(weight)
        else:
            change = ready.whole_delta(weight)
        return change.mT if base_weight.is_transposed(self.get_base_layer()) else change

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the change is a matrix: no gate on outputs or for the task, and no bias."""
        if adapter_name not in self.secura_adapter:
            return True
        adapter = self.secura_adapter[adapter_name]
        return (
            adapter.adapter_bias is None
            and adapter.gate is None
            and adapter.gate_past is None
            and (adapter.norm is None or adapter.norm.domain == "weight")
        )
