"""Quantised layers that have no weight: GPTQ's and AWQ's of GPTQModel, and HQQ's.

They keep packed bits, from which W is dequantised where it is asked for, and run their own forward
pass. Which of them can be trained over is decided by class: those whose forward pass is PyTorch's
product with the dequantised W, so that autograd gives the input its gradient. Others run a kernel
of their own, many without a backward pass.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from peft.utils.quantization_utils import HqqBackend, QuantizationBackend
from torch import Tensor, nn


def _gptq_matrix(base: nn.Module) -> Tensor:
    # Not the instance's: GPTQModel puts a compiled one there, which in a deep copy of the layer
    # still dequantises the layer that was copied.
    return type(base).dequantize_weight(base).T


def _awq_matrix(base: nn.Module) -> Tensor:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    settings = dict(bits=base.bits, group_size=base.group_size)
    return dequantize_gemm(base.qweight, base.qzeros, base.scales, **settings).T


class GPTQModelBackend(QuantizationBackend):
    """What PEFT's own, which cannot dequantise, is to a layer of GPTQModel; nothing quantises a
    merged W as GPTQ and AWQ would, which need their calibration's inputs."""

    layer_type = "linear"

    def __init__(self, backend_name: str, matrix: Callable[[nn.Module], Tensor]) -> None:
        self.backend_name, self._matrix = backend_name, matrix

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """W (N, K), in the dtype of the layer's scales."""
        return self._matrix(base_layer)


# By class: the attribute that holds the bits.
BITS = {
    "gptqmodel.nn_modules.qlinear.torch.TorchLinear": "qweight",
    "gptqmodel.nn_modules.qlinear.torch_awq.AwqTorchLinear": "qweight",
    "hqq.core.quantize.HQQLinear": "W_q",
}
GPTQMODEL = {
    "gptqmodel.nn_modules.qlinear.torch.TorchLinear": GPTQModelBackend("gptq", _gptq_matrix),
    "gptqmodel.nn_modules.qlinear.torch_awq.AwqTorchLinear": GPTQModelBackend("awq", _awq_matrix),
}


def _class_of(base: nn.Module) -> str:
    return f"{type(base).__module__}.{type(base).__qualname__}"


def is_packed(base: nn.Module) -> bool:
    """Whether a layer is of a class that has no weight, and can be trained over."""
    return _class_of(base) in BITS


def bits(base: nn.Module) -> Tensor:
    """The tensor that holds a packed layer's bits."""
    return getattr(base, BITS[_class_of(base)])


def backend_of(base: nn.Module, backend: QuantizationBackend) -> QuantizationBackend | str:
    """The backend of a layer of GPTQModel or HQQ; or why it cannot be trained over.

    Args:
        backend: PEFT's.
    """
    if isinstance(backend, HqqBackend):
        return _why_not_hqq(base) or backend
    if _class_of(base) not in GPTQMODEL:
        return (
            "a layer of GPTQModel whose input gradient has not been checked, or that has none: "
            "load the model by GPTQConfig(..., backend='torch') or AwqConfig(..., "
            "backend='torch_awq')"
        )
    if getattr(base, "online_full_had", False) or getattr(base, "online_partial_had", False):
        return "one that rotates its input, of which C and R know nothing: quantise without"
    if getattr(base, "adapter", None) is not None:
        return "one with an adapter of GPTQModel's own (EoRA), of which C and R know nothing"
    return GPTQMODEL[_class_of(base)]


def _why_not_hqq(base: nn.Module) -> str | None:
    kind = type(base)
    if not is_packed(base):
        return "a subclass of HQQLinear whose input gradient has not been checked"
    if kind.forward not in (kind.forward_pytorch_backprop, kind.forward_pytorch):
        return (
            f"HQQ's with the forward pass {kind.forward.__name__}, whose input gradient has not "
            "been checked, or that has none: call HQQLinear.set_backend(HQQBackend.PYTORCH)"
        )
    if not base.is_initialized():
        return "not yet quantised"
    return None


def freeze_biases(model: nn.Module) -> None:
    """Freezes HQQ's biases, adapted layers' or not, as PEFT does with parameters: each is a tensor
    computed from the bias of the layer that was quantised, so where that required a gradient it is
    no leaf of the graph, and the layer cannot be copied."""
    for module in model.modules():
        if is_packed(module) and module.bias is not None and module.bias.requires_grad:
            module.bias = module.bias.detach()


def dequantised(weight: Tensor, meta: dict) -> Tensor:
    """W (N, K) of bits that an ``HQQLinear`` had, with its ``meta``."""
    from hqq.core.quantize import HQQLinear

    return HQQLinear.dequantize(SimpleNamespace(ready=True, W_q=weight, meta=dict(meta)))


@torch.no_grad()
def requantise(base: nn.Module, weight: Tensor, backend: HqqBackend) -> None:
    """Gives an ``HQQLinear`` a new W (N, K), quantised as its present one is. PEFT's backend makes
    a new layer, without the bias: that one's bits are taken, and the layer stays."""
    made = SimpleNamespace(get_base_layer=lambda: base)
    backend.set_base_weight(made, weight)
    base.W_q, base.meta = made.base_layer.W_q, made.base_layer.meta


def move(base: nn.Module, device: torch.device) -> None:
    """An ``HQQLinear``'s bits, statistics and bias; its ``to`` does nothing, and its ``cuda`` takes
    any device."""
    base.cuda(device)
