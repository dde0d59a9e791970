"""The PEFT tuner: which layers are replaced, mixed batches, merging, and what a file holds."""

import warnings
from contextlib import contextmanager, nullcontext

from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn

from ..checks import fail
from . import base_weight, experts, file_format, handed, packed, quantised, sharding
from .by_token import AdaptersByToken
from .config import SecuraConfig
from .layer import SecuraLinear
from .undo import await_file, undone_on_error, undone_on_refusal


class SecuraModel(BaseTuner):
    """Injects ``SecuraLinear`` layers; made by ``get_peft_model(model, SecuraConfig(...))``."""

    prefix = "secura_"
    tuner_layer_cls = SecuraLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        sharding.check_injection(model)
        config = self.peft_config[adapter_name]
        with undone_on_error(self, model, adapter_name) as before:
            quantised.keep_unpacked(model)
            packed.freeze_biases(model)
            with warnings.catch_warnings():  # PEFT looks among modules alone; an error follows
                warnings.filterwarnings("ignore", "The following rank_pattern keys")
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            _check_rank_pattern(config, model, adapter_name)
        if config.from_file:
            await_file(self, adapter_name, before)

    def _create_and_replace(
        self,
        config: SecuraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_,
    ) -> None:
        # With low_cpu_mem_usage PEFT puts new parameters on the meta device and loads a state into
        # them: choosing columns and rows would be for nothing.
        empty = nn.Linear(1, 1).weight.is_meta
        if isinstance(target, experts.SecuraStack):
            return  # a parameter, of which target_modules says nothing
        base_weight.check_parent(parent, target_name)
        if isinstance(target, SecuraLinear):
            target.update_layer(adapter_name, config, current_key, empty)
            return
        layer = SecuraLinear(
            target, adapter_name, config, current_key, empty, **get_quantization_kwargs(self)
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trainable by itself
        if any(p.is_meta for p in layer.secura_adapter.parameters()):  # which PEFT cannot move
            setattr(parent, target_name, layer)
        else:
            self._replace_module(parent, target_name, layer, target)

    def _inject_parameters(self, peft_config, model, adapter_name, low_cpu_mem_usage) -> list[str]:
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            return experts.inject(
                model,
                peft_config,
                adapter_name,
                active=adapter_name in self.active_adapters,
                empty=low_cpu_mem_usage,
            )

    def _replace_module(self, parent: nn.Module, name: str, new: nn.Module, old: nn.Module) -> None:
        if isinstance(old, experts.SecuraExperts) or packed.is_packed(new):
            setattr(parent, name, new)  # PEFT would look for a weight
        else:
            super()._replace_module(parent, name, new, old)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's ``autocast_adapter_dtype``: trained tensors are float32, or wider; with False they
        are in the dtype of the base's weight, where that is floating point."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for _, layer, adapter in file_format.adapters_of(self.model, adapter_name):
            dtype = layer.weight.dtype
            for parameter in adapter.parameters():
                if dtype.is_floating_point:
                    parameter.data = parameter.data.to(dtype)

    # Mixed batches.

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """Hands ``adapter_names``, the adapter of each sample or an ``AdaptersByToken``, to every
        layer; in training too, which PEFT's own methods refuse."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        with handed.adapter_names(self, adapter_names, handed.copies(**kwargs)):
            yield

    def _check_adapter_names(self, adapter_names: list[str] | AdaptersByToken) -> None:
        by_token = isinstance(adapter_names, AdaptersByToken)
        if not by_token and not isinstance(adapter_names, list | tuple):
            raise TypeError(
                f"adapter_names is a {type(adapter_names).__name__}: it must be a list "
                "with the name of each sample's adapter, or an AdaptersByToken"
            )
        known, copies = {"__base__"}, []
        for name, module in self.model.named_modules():
            if isinstance(module, SecuraLinear):
                known |= set(module.secura_adapter)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                copies.append(name)
        unknown = sorted(set(adapter_names.names if by_token else adapter_names) - known)
        if unknown:
            raise ValueError(f"adapter_names has {unknown}: the model has {sorted(known)}")
        if by_token and copies:
            raise ValueError(
                f"adapter_names by token: {copies} are whole modules of an adapter's own "
                "(modules_to_save), which take samples; name an adapter for each sample"
            )

    # Merging: every layer is asked before the first is changed.

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, SecuraLinear):
                module.check_merge(adapter_names, safe_merge)

    # Files.

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        container = f".secura_adapter.{adapter_name}."
        if container in key:
            return key.replace(container, ".secura_adapter.", 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SecuraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return file_format.completed(found, model, config, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: SecuraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        with undone_on_refusal(model, adapter_name):
            return file_format.fitted(state_dict, model, config, adapter_name)


def _check_rank_pattern(config: SecuraConfig, model: nn.Module, adapter_name: str) -> None:
    """Raises ValueError for a key of ``rank_pattern`` that is no adapted layer's."""
    names = [name for name, _, _ in file_format.adapters_of(model, adapter_name)]
    unused = [
        key
        for key in config.rank_pattern
        if not any(get_pattern_key([key], name) == key for name in names)
    ]
    if unused:
        raise fail(
            "rank_pattern",
            unused,
            f"names of adapted layers, or regular expressions that match one: {names[:3]} "
            f"and {max(0, len(names) - 3)} more are adapted",
        )
