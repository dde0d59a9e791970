"""Another adapter's values in the place of a loaded one's: nothing is compiled again."""

import os

from peft import PeftConfig, PeftModel
from peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    load_peft_weights,
    set_peft_model_state_dict,
)

from ..checks import check_choice, fail
from .config import SecuraConfig, check_whole
from .file_format import adapters_of

# What a compiled model has built in, or what decides which tensors there are.
FIXED = (
    "variant",
    "r",
    "m",
    "alpha",
    "rank_pattern",
    "basis",
    "norm",
    "norm_domain",
    "adapter_bias",
    "importance_decay",
)


def hotswap_adapter(
    model: PeftModel, path: str | os.PathLike, adapter_name: str = "default", *, force: bool = False
) -> None:
    """Loads a saved adapter in the place of ``adapter_name``, into the same tensors, so that a
    model compiled by ``torch.compile`` runs it without compiling again.

    Args:
        force: also where the file was made for a base of other values.

    Raises:
        ValueError: no such adapter, one that is merged, a file that is not whole, or one whose
            settings or layers differ from it; the model is then unchanged.
    """
    if adapter_name not in model.peft_config:
        raise fail("adapter_name", adapter_name, f"one of {sorted(model.peft_config)}")
    if any(
        adapter_name in layer.merged_adapters for _, layer, _ in adapters_of(model, adapter_name)
    ):
        raise ValueError(f"adapter {adapter_name!r} is merged: call unmerge_adapter() first")
    here, there = model.peft_config[adapter_name], PeftConfig.from_pretrained(path)
    check_whole(os.path.join(path, SAFETENSORS_WEIGHTS_NAME))
    if not isinstance(there, SecuraConfig):
        raise fail("path", str(path), "a folder with a SECURA adapter")
    for name in FIXED:
        if getattr(here, name) != getattr(there, name):
            raise fail(
                name,
                getattr(there, name),
                f"{getattr(here, name)!r}, as the adapter {adapter_name!r} has it",
            )
    before, here.force = here.force, check_choice("force", force, (True, False))
    try:
        set_peft_model_state_dict(model, load_peft_weights(str(path), device="cpu"), adapter_name)
    finally:
        here.force = before
