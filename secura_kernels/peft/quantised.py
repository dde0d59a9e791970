"""Quantised base layers: which can be trained over, and one quantised again with another weight.

What PEFT's backends leave to their caller is done here: the quantised weight is kept whole, so that
it can be put back bit for bit, and layers are refused whose dequantised weight or whose input
gradient would be wrong. Those of bitsandbytes and torchao have a weight; for those that have none
see ``packed.py``.
"""

from types import SimpleNamespace

import torch
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import (
    Bnb4bitBackend,
    Bnb8bitBackend,
    HqqBackend,
    QuantizationBackend,
    TorchaoBackend,
)
from torch import Tensor, nn

from . import packed

# torchao's weights with an exact input gradient, and where each says that inputs are quantised too:
# those give outputs that do not depend on x as far as autograd can see.
TORCHAO_WEIGHTS = {
    "Int8Tensor": "act_quant_kwargs",
    "Float8Tensor": "act_quant_kwargs",
    "IntxUnpackedToInt8Tensor": "activation_quantization",
    "NVFP4Tensor": "act_quant_kwargs",
}
WEIGHT_ONLY = (
    "Int8WeightOnlyConfig, Float8WeightOnlyConfig, IntxWeightOnlyConfig or NVFP4WeightOnlyConfig"
)
# How a model is loaded without its packed weights, where its form cannot be adapted.
DEQUANTISE = (
    "load the model dequantised: CompressedTensorsConfig(run_compressed=False), "
    "FineGrainedFP8Config(dequantize=True), Mxfp4Config(dequantize=True)"
)


def backend_of(base: nn.Module, **kwargs):
    """PEFT's backend for a quantised layer that can be trained over; None for one that is not
    quantised.

    Raises:
        TypeError: a quantised layer that cannot be, with the reason.
    """
    backend = resolve_quantization_backend(
        base, **(dict(get_apply_tensor_subclass=_no_config) | kwargs)
    )
    if backend is None:
        return None
    if isinstance(backend, HqqBackend) or backend.backend_name in ("gptq", "awq"):
        backend = packed.backend_of(base, backend)
        if isinstance(backend, str):
            raise _refused(base, backend)
        return backend
    if not isinstance(backend, Bnb4bitBackend | Bnb8bitBackend | TorchaoBackend):
        raise _refused(
            base,
            f"{backend.backend_name}, which cannot be dequantised, and C and R are columns and "
            "rows of the weight: quantise the model by bitsandbytes (4 or 8 bits) or torchao "
            "(weight only)",
        )
    if isinstance(backend, TorchaoBackend):
        _check_torchao(base)
    check_state(base, backend)
    return backend


def keep_unpacked(model: nn.Module) -> None:
    """Has bitsandbytes' 4-bit layers keep their weight as it is, adapted or not: the first forward
    pass in eval mode on a CPU would repack it for good, to a form that dequantises to other values
    and loses the input gradient (bitsandbytes 0.50).

    Raises:
        TypeError: one that has been repacked already.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            _check_unpacked(module)
            module.support_avx512bf16_for_cpu = False


def check_state(base: nn.Module, backend) -> None:
    """Whether a bitsandbytes layer holds a weight that can be dequantised.

    Raises:
        TypeError: it does not, with the reason.
    """
    if isinstance(backend, Bnb8bitBackend):
        if base.state.has_fp16_weights:
            raise _refused(
                base,
                "has_fp16_weights=True, whose weight is quantised anew at every "
                "step: build it with has_fp16_weights=False",
            )
        if base.weight.dtype != torch.int8:
            raise _refused(base, "not yet quantised: move the model to its device first")
    elif isinstance(backend, Bnb4bitBackend):
        if lost_quant_state(base):
            raise _refused(
                base,
                "without its quantisation state: it has not been quantised yet "
                "(move the model to its device first), or FSDP2 has sharded it, "
                "which drops the state",
            )
        _check_unpacked(base)


def _check_unpacked(base: nn.Module) -> None:
    if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise TypeError(
            f"the model has a {type(base).__name__} that bitsandbytes has repacked for inference "
            "on a CPU, as its first forward pass in eval mode does: it can no longer be "
            "dequantised, and gives its input no gradient. Adapt a freshly loaded model"
        )


def lost_quant_state(base: nn.Module) -> bool:
    """Whether a bitsandbytes 4-bit layer's weight is bytes only: not yet quantised, or sharded by
    FSDP2, which keeps no attributes of a parameter."""
    return getattr(base.weight, "quant_state", None) is None


def dequantised(weight: Tensor, attributes: dict, backend: QuantizationBackend) -> Tensor:
    """W (N, K) of what a layer that can be merged into held, in the dtype it dequantises to
    (float32 for bitsandbytes' 8 bits).

    Args:
        weight, attributes: see ``keep``.
    """
    if isinstance(backend, HqqBackend):
        return packed.dequantised(weight, attributes).detach()
    return backend.get_base_weight(
        SimpleNamespace(weight=weight, state=SimpleNamespace(SCB=None))
    ).detach()


def gather_statistics(base: nn.Module, backend) -> None:
    """Puts what a forward pass of bitsandbytes' ``Linear8bitLt`` has moved to the layer back on its
    weight, from where the next one moves it again."""
    if isinstance(backend, Bnb8bitBackend):
        if base.weight.SCB is None:
            base.weight.CB, base.weight.SCB = base.weight.data, base.state.SCB
        base.state.reset_grads()


def keep(base: nn.Module, backend: QuantizationBackend) -> tuple[nn.Parameter, dict]:
    """What holds a layer's W, for ``restore``: the weight and its attributes, in which bitsandbytes
    and torchao keep its statistics; HQQ's bits and ``meta``."""
    if isinstance(backend, HqqBackend):
        return packed.bits(base), dict(base.meta)
    gather_statistics(base, backend)
    return base.weight, dict(vars(base.weight))


@torch.no_grad()
def requantise(layer: nn.Module, weight: Tensor, backend: QuantizationBackend) -> None:
    """Gives the base of a PEFT layer a new W (N, K), quantised as its present one is.

    Raises:
        ValueError: it cannot be, with the reason; nothing is changed then.
    """
    base = layer.get_base_layer()
    before, attributes = keep(base, backend)
    try:
        if isinstance(backend, HqqBackend):
            packed.requantise(base, weight, backend)
            return
        backend.set_base_weight(layer, weight)
        if type(base.weight) is not type(before):
            raise TypeError(
                f"its quantisation config gives a {type(base.weight).__name__}, not "
                f"the {type(before).__name__} it has"
            )
    except Exception as error:
        restore(base, before, attributes, backend)
        raise ValueError(f"a merged weight cannot be quantised again: {error}") from error
    # PEFT marks the former 4-bit weight as unquantised: moving it would quantise it twice.
    _set_attributes(before, attributes)


def check_merge(base: nn.Module, backend: QuantizationBackend) -> None:
    """Raises ValueError for a layer whose W nothing could quantise again."""
    if isinstance(backend, packed.GPTQModelBackend):
        raise ValueError(
            f"adapters cannot be merged into a {type(base).__name__}: {backend.backend_name} "
            "quantises by its calibration's inputs, and a merged weight cannot be quantised again "
            "here; save_as_lora() serves the adapter beside it, and the adapter's own file can be "
            "loaded and merged into the unquantised model"
        )


def restore(
    base: nn.Module, weight: nn.Parameter, attributes: dict, backend: QuantizationBackend
) -> None:
    """Puts what ``keep`` gave back, to the bit."""
    if isinstance(backend, HqqBackend):
        base.W_q, base.meta = weight, dict(attributes)
        return
    _set_attributes(weight, attributes)
    base.weight = weight
    if isinstance(backend, Bnb8bitBackend):
        base.state.reset_grads()
    elif isinstance(backend, Bnb4bitBackend):
        base.quant_state = weight.quant_state


def _set_attributes(weight: nn.Parameter, attributes: dict) -> None:
    vars(weight).clear()
    vars(weight).update(attributes)


def _check_torchao(base: nn.Module) -> None:
    weight = base.weight
    name = type(weight).__name__
    if name not in TORCHAO_WEIGHTS:
        raise _refused(
            base,
            f"torchao's {name}, whose input gradient has not been checked: "
            f"quantise by {WEIGHT_ONLY}",
        )
    if getattr(weight, TORCHAO_WEIGHTS[name], None) is not None:
        raise _refused(
            base,
            f"torchao's {name} with quantised activations, which gives its input "
            f"no gradient, so nothing before it would train: quantise by "
            f"{WEIGHT_ONLY}",
        )
    if getattr(weight, "act_pre_scale", None) is not None:
        raise _refused(
            base,
            f"torchao's {name} with scaled activations (AWQ, SmoothQuant), of "
            "which C and R know nothing: quantise by " + WEIGHT_ONLY,
        )


def _no_config():
    raise ValueError(
        "torchao's quantize_ was called by hand, and how is not known here: load the model by "
        "from_pretrained(..., quantization_config=TorchAoConfig(...)), or save the adapter and "
        "merge it into the unquantised model"
    )


def _refused(base: nn.Module, reason: str) -> TypeError:
    return TypeError(
        f"target_modules matches a {type(base).__name__} that cannot be adapted: it is {reason}"
    )
