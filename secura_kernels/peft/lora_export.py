"""A SECURA or CURLoRA adapter without a gate is a LoRA exactly: lora_A = R, lora_B = alpha C core.

So it can be served by whatever serves LoRA.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checks import fail
from ..nn.merge import TASK_GATE
from . import base_weight
from .experts import SecuraStack
from .file_format import PREFIX, adapters_of
from .layer import SecuraLinear


def save_as_lora(model: PeftModel, path: str | os.PathLike, adapter_name: str = "default") -> None:
    """Saves an adapter without a gate as a LoRA adapter of the same outputs, into a folder.

    The file is float32: lora_B = alpha C core is rounded once. An adapter bias becomes PEFT's
    ``lora_bias``, which PEFT loads and vLLM does not.

    Raises:
        ValueError: no such adapter, one with a gate, which no LoRA equals, or one of stacked
            experts; nothing is written.
    """
    if adapter_name not in model.peft_config:
        raise fail("adapter_name", adapter_name, f"one of {sorted(model.peft_config)}")
    layers = {
        name.removeprefix(PREFIX): layer for name, layer, _ in adapters_of(model, adapter_name)
    }
    config = model.peft_config[adapter_name]
    if not layers or config.norm is not None:
        what = "has a gate (norm), and what it does to outputs or to the weight is of no low rank"
        raise ValueError(
            f"adapter {adapter_name!r} cannot be saved as a LoRA: "
            + (what if layers else "it is not a SECURA adapter of this model")
        )
    stacked = [name for name, layer in layers.items() if isinstance(layer, SecuraStack)]
    if stacked:
        raise ValueError(
            f"adapter {adapter_name!r} cannot be saved as a LoRA: it has target_parameters "
            f"({stacked[0]}), whose LoRA files are of another form for each program"
        )
    adapters = {name: layer.secura_adapter[adapter_name] for name, layer in layers.items()}
    gated = [name for name, adapter in adapters.items() if adapter.has_gated()]
    if gated:
        raise ValueError(f"adapter {adapter_name!r} {TASK_GATE} (layer {gated[0]!r})")
    own = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {k: v.contiguous().cpu() for k, v in own.items() if ".secura_adapter." not in k}
    ranks, biased = {}, False
    for name, layer in layers.items():
        adapter = adapters[name]
        lora_A, lora_B = _factors(layer, adapter_name)
        start, ranks[name] = f"{PREFIX}{name}.", len(lora_A)
        tensors |= {f"{start}lora_A.weight": lora_A, f"{start}lora_B.weight": lora_B}
        if adapter.adapter_bias is not None:
            biased = True
            tensors[f"{start}lora_B.bias"] = adapter.adapter_bias.detach().float().cpu()
    first, others = rank_pattern(ranks)
    lora = LoraConfig(
        r=first,
        lora_alpha=first,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=target_modules(model, ranks),
        lora_bias=biased,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
        fan_in_fan_out=any(
            base_weight.is_transposed(layer.get_base_layer()) for layer in layers.values()
        ),
    )
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    lora.save_pretrained(str(path))


def rank_pattern(ranks: dict[str, int]) -> tuple[int, dict[str, int]]:
    """A configuration's r and ``rank_pattern``, of the layers' ranks by name."""
    first = next(iter(ranks.values()))
    # PEFT takes a key for the end of a name: "^" makes it the whole name.
    return first, {"^" + re.escape(name): r for name, r in ranks.items() if r != first}


def target_modules(model: nn.Module, names: Iterable[str]) -> list[str] | str:
    """A configuration's ``target_modules``: the layers by name; as a regular expression where PEFT
    would take a name for the end of another layer's."""
    ends = tuple("." + name for name in names)
    others = [n.removeprefix(PREFIX) for n, _ in model.named_modules()]
    if any(n.endswith(ends) and n not in names for n in others):
        return "|".join(map(re.escape, sorted(names)))
    return sorted(names)


@torch.no_grad()
def _factors(layer: SecuraLinear, adapter_name: str) -> tuple[Tensor, Tensor]:
    """lora_A (r, K) and lora_B (N, r), float32, formed in float64."""
    C, core, R = layer.change_factors(adapter_name)
    lora_B = (C.double() @ core.double()).float()
    return R.float().contiguous().cpu(), lora_B.contiguous().cpu()
