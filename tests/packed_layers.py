"""Linear layers of packed bits: those of GPTQModel and HQQ where they are installed, and minimal
ones that have of GPTQModel's layers what the package asks for, under the same names, so that the
tests run without it. All of them in 4 bits, in groups of 32 inputs.
"""

import importlib.util
import sys

import pytest
import torch
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn

from secura_kernels.peft import quantised

GROUP, BITS, PER_WORD = 32, 4, 8
REAL = ("hqq", "gptq", "awq")
MINIMAL = ("minimal gptq", "minimal awq")
PACKED = REAL + MINIMAL
PACKING = "gptqmodel.quantization.awq.utils.packing_utils"  # where AWQ's is dequantised
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # of a word's eight codes


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W (N, K) rounded to nearest: codes (K, N), zeros and scales (K / 32, N), as both keep them:
    W^T = scale (code - zero)."""
    groups = weight.T.unflatten(0, (-1, GROUP)).float()  # [G, 32, N]
    low, high = groups.amin(1), groups.amax(1)
    scales = ((high - low) / (2**BITS - 1)).half()
    zeros = (-low / scales).round().clamp(0, 2**BITS - 1)
    codes = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 2**BITS - 1)
    return codes.flatten(0, 1).int(), zeros.int(), scales


def matrix_of(weight: Tensor) -> Tensor:
    """What W (N, K) dequantises to, float16."""
    codes, zeros, scales = codes_of(weight)
    zeros, scales = (v.repeat_interleave(GROUP, 0) for v in (zeros, scales))
    return (scales * (codes - zeros)).T


def words(codes: Tensor, order: list[int]) -> Tensor:
    """Eight codes of the last dimension in an int32."""
    codes = codes.unflatten(-1, (-1, PER_WORD))[..., order].long()
    packed = (codes << (BITS * torch.arange(PER_WORD))).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def unpacked(packed: Tensor, order: list[int]) -> Tensor:
    """Inverse of ``words``."""
    codes = (packed[..., None].long() >> (BITS * torch.arange(PER_WORD))) & (2**BITS - 1)
    return codes[..., torch.tensor(order).argsort()].flatten(-2)


class TorchLinear(nn.Module):
    """GPTQ: qweight (K / 8, N), its ``weight`` an object that is no tensor."""

    online_full_had = online_partial_had = False
    adapter = None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.zeros(in_features // 8, out_features).int())
        self._register_statistics(bias)
        self.register_buffer("g_idx", torch.arange(in_features).int() // GROUP)

    def _register_statistics(self, bias: bool) -> None:
        groups = self.in_features // GROUP
        self.register_buffer("qzeros", torch.zeros(groups, self.out_features // 8).int())
        self.register_buffer("scales", torch.zeros(groups, self.out_features).half())
        if bias:
            self.register_buffer("bias", torch.zeros(self.out_features).half())
        else:
            self.bias = None

    @property
    def weight(self) -> object:
        return object()

    def dequantize_weight(self) -> Tensor:
        order = list(range(PER_WORD))
        codes, zeros = unpacked(self.qweight.T, order).T, unpacked(self.qzeros, order)
        return self.scales[self.g_idx] * (codes - zeros[self.g_idx])

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.dequantize_weight().to(x.dtype))
        return y if self.bias is None else y.add_(self.bias.to(y.dtype))


class AwqTorchLinear(TorchLinear):
    """AWQ: qweight (K, N / 8), and no ``weight``. Scales and bias take the dtype of x for good."""

    bits, group_size = BITS, GROUP

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.zeros(in_features, out_features // 8).int())
        self._register_statistics(bias)

    def __getattribute__(self, name: str):
        if name in ("weight", "dequantize_weight"):
            raise AttributeError(name)
        return super().__getattribute__(name)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.float16
        self.scales = self.scales.to(dtype)
        W = dequantize_gemm(self.qweight, self.qzeros, self.scales, BITS, GROUP)
        y = torch.matmul(x.to(dtype), W)
        if self.bias is not None:
            self.bias = self.bias.to(dtype)
            y = y + self.bias
        return y.to(x.dtype)


def dequantize_gemm(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int
) -> Tensor:
    """W^T (K, N) of an AWQ layer."""
    assert (bits, group_size) == (BITS, GROUP)
    codes, zeros = unpacked(qweight, AWQ_ORDER), unpacked(qzeros, AWQ_ORDER)
    zeros, scales = (v.repeat_interleave(GROUP, 0) for v in (zeros, scales))
    return scales * (codes - zeros)


class MarlinLinear(TorchLinear):
    """Of a kernel of its own."""


MODULES = {TorchLinear: "torch", AwqTorchLinear: "torch_awq", MarlinLinear: "marlin"}
for kind, name in MODULES.items():
    kind.__module__ = f"gptqmodel.nn_modules.qlinear.{name}"


def as_if_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the package take the minimal layers for those of an installed GPTQModel."""
    own = quantised.resolve_quantization_backend

    def resolve(base: nn.Module, **kwargs):
        if isinstance(base, TorchLinear):
            return ForwardOnlyQuantizationBackend("gptq")
        return own(base, **kwargs)

    monkeypatch.setattr(quantised, "resolve_quantization_backend", resolve)
    if importlib.util.find_spec("gptqmodel") is None:
        monkeypatch.setitem(sys.modules, PACKING, sys.modules[__name__])


def _empty(kind: str, N: int, K: int, bias: bool) -> nn.Module:
    if kind.startswith("minimal"):
        return (AwqTorchLinear if kind.endswith("awq") else TorchLinear)(K, N, bias)
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear as Gptq
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear as Awq

    settings = dict(bits=BITS, group_size=GROUP, sym=False, desc_act=False, bias=bias)
    layer = (Awq if kind == "awq" else Gptq)(
        in_features=K, out_features=N, register_buffers=True, **settings
    )
    if kind == "gptq":
        layer.qzero_format(2)
        # Compiling what dequantises would take most of a test's time.
        layer.optimized = True
    return layer


def hqq_config() -> dict:
    from hqq.core.quantize import BaseQuantizeConfig

    return BaseQuantizeConfig(nbits=BITS, group_size=GROUP)


def packed(
    kind: str, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A layer of this W (N, K), quantised. ``dtype``: of HQQ, whose inputs must have it."""
    N, K = weight.shape
    if kind == "hqq":
        core = pytest.importorskip("hqq.core.quantize")
        plain = nn.Linear(K, N, bias=bias is not None)
        with torch.no_grad():
            plain.weight.copy_(weight)
            if bias is not None:
                plain.bias.copy_(bias)
        return core.HQQLinear(plain, hqq_config(), compute_dtype=dtype, device="cpu")
    layer, order = _empty(kind, N, K, bias is not None), list(range(PER_WORD))
    codes, zeros, scales = codes_of(weight)
    if kind.endswith("awq"):
        order = AWQ_ORDER
        layer.qweight = words(codes, order)
    else:
        layer.qweight = words(codes.T, order).T.contiguous()
    layer.qzeros, layer.scales = words(zeros, order), scales
    if bias is not None:
        layer.bias = bias.half()
    if not kind.startswith("minimal"):
        layer.post_init()
    return layer.requires_grad_(False)


def replace_linears(model: nn.Module, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with the linear layers of its blocks packed, as a loader leaves it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers." in name:
            bias = None if module.bias is None else module.bias.data
            layer = packed(kind, module.weight.data, bias, dtype)
            model.set_submodule(name, layer.train(model.training))
    return model
