"""Adapters of PEFT's own that train an r x r core between two fixed matrices, as SECURA adapters.

- PSOFT (arXiv 2505.11235): delta_W = s B (R - I) A with R orthogonal, scaled by two vectors.
- TinyLoRA (arXiv 2602.04118): delta_W = B (sum_i v_i P_i) A, with trained v.

A and B are of the singular directions of W, so that the svd basis takes them, each multiplied by a
number. PEFT's file of PSOFT has neither: PEFT computes them when it loads the file, and here they
are taken as it has them.
"""

from collections.abc import Callable

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..checks import fail
from .config import SecuraConfig
from .file_format import PREFIX, adapters_of
from .lora_export import rank_pattern, target_modules
from .undo import Snapshot

Sides = tuple[Tensor, Tensor, Tensor]


def _psoft(layer: nn.Module, name: str) -> Sides:
    rotation = layer.psoft_R[name].get_matrix().double()
    core = layer.scaling[name] * (rotation - torch.eye(len(rotation)).to(rotation))
    return layer._psoft_B_cache[name], core, layer._psoft_A_cache[name]


def _tinylora(layer: nn.Module, name: str) -> Sides:
    if name not in layer.tinylora_B or not hasattr(layer, "is_target_conv_1d_layer"):
        raise TypeError("it is an embedding: only linear layers can be converted")
    return layer.tinylora_B[name], layer._compute_R(name).double(), layer.tinylora_A[name]


# By PEFT's name of the method: B (N, r), core (r, r), A (r, K) of a layer, delta_W = B core A.
METHODS: dict[str, Callable[[nn.Module, str], Sides]] = {"PSOFT": _psoft, "TINYLORA": _tinylora}


def from_peft(model: PeftModel, adapter_name: str = "default") -> PeftModel:
    """A PSOFT or TinyLoRA adapter, loaded by PEFT, as a CURLoRA adapter in the svd basis that
    changes every weight by as much. Training goes on with the r x r core, free of the form that
    PSOFT's rotation or TinyLoRA's vector had.

    Args:
        model: what ``PeftModel.from_pretrained(base, path)`` gives; it is used up.

    Returns:
        A ``PeftModel`` over the same base with the adapter of that name, trainable if the other
        was. C and R are rounded to the base weight's dtype, the core to float32 (float64 of a
        float64 weight). Dropout is left out.

    Raises:
        TypeError: no ``PeftModel``. ValueError: no such adapter, one of another method, merged, one
            of several, with biases or tokens of its own, or of layers that cannot be adapted; the
            model is then unchanged.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model is a {type(model).__name__}: it must be a PeftModel")
    found = _factors(model, adapter_name)
    config, training = model.peft_config[adapter_name], model.training
    before = Snapshot(model)
    try:
        wrappers = {
            name: (module.original_module, module.modules_to_save[adapter_name])
            for name, module in model.base_model.model.named_modules()
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        }
        base = model.base_model.unload()
        for name, (original, _) in wrappers.items():
            base.set_submodule(name, original)
        r, others = rank_pattern({name: len(core) for name, (_, core, _) in found.items()})
        settings = SecuraConfig(
            r=r,
            rank_pattern=others,
            basis="svd",
            target_modules=target_modules(base, found),
            modules_to_save=config.modules_to_save,
            task_type=config.task_type,
            base_model_name_or_path=config.base_model_name_or_path,
            inference_mode=config.inference_mode,
            optional_tensors=["C", "R"],  # no SVD: they come from the other adapter
        )
        converted = get_peft_model(base, settings, adapter_name=adapter_name)
        for name, layer, adapter in adapters_of(converted, adapter_name):
            _fill(adapter, *found[name.removeprefix(PREFIX)], layer.base_matrix().dtype)
        for name, (_, trained) in wrappers.items():
            wrapper = converted.get_submodule(PREFIX + name)
            wrapper.modules_to_save[adapter_name].load_state_dict(trained.state_dict())
    except BaseException:
        before.restore()
        raise
    return converted.train(training)


def _factors(model: PeftModel, adapter_name: str) -> dict[str, Sides]:
    """By a layer's name in the base model; every check is here."""
    configs = model.peft_config
    if adapter_name not in configs:
        raise fail("adapter_name", adapter_name, f"one of {sorted(configs)}")
    config, about = configs[adapter_name], f"adapter {adapter_name!r} cannot be converted: "
    kind = config.peft_type.value
    if kind not in METHODS:
        raise ValueError(
            f"{about}it is of PEFT's method {kind}, and only those of {sorted(METHODS)} train an "
            "r x r core between two fixed matrices"
        )
    if len(configs) > 1:
        others = sorted(set(configs) - {adapter_name})
        raise ValueError(f"{about}the model has {others} beside it: delete_adapter() them first")
    modules = dict(model.base_model.model.named_modules())
    tokens = any(
        isinstance(m, AuxiliaryTrainingWrapper) and not isinstance(m, ModulesToSaveWrapper)
        for m in modules.values()
    )
    if tokens or getattr(config, "bias", "none") != "none":
        raise ValueError(f"{about}it trains {'tokens' if tokens else 'biases'} beside its layers")
    layers = {name: m for name, m in modules.items() if isinstance(m, BaseTunerLayer)}
    if any(layer.merged for layer in layers.values()):
        raise ValueError(f"{about}it is merged: call unmerge_adapter() first")
    with torch.no_grad():
        try:
            return {name: METHODS[kind](layer, adapter_name) for name, layer in layers.items()}
        except TypeError as error:
            raise ValueError(f"{about}{error}") from error


@torch.no_grad()
def _fill(adapter: nn.Module, B: Tensor, core: Tensor, A: Tensor, dtype: torch.dtype) -> None:
    """C and R are B and A, scaled as those of the svd basis: ||C||_F = ||R||_F = sqrt(r)."""
    B, A, root = B.double(), A.double(), adapter.r**0.5
    size_B, size_A = B.norm(), A.norm()
    adapter._store(B * (root / size_B), A * (root / size_A), dtype)
    adapter.U.copy_(core.to(B.device) * (size_B * size_A / adapter.r))
