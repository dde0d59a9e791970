"""Every contender of one layer, on the same frozen weight, its update not zero."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_kernels import CURLoRALinear, SECURALinear, SMagNorm
from secura_kernels.backends import reference
from secura_kernels.ops import resolve, why_unavailable


@dataclass(frozen=True)
class Rival:
    """``truth``: the name of the rival that computes the same, in plain PyTorch; None for the floor
    and for other methods. ``timed``: False for one that is only compared with."""

    layer: nn.Module
    truth: str | None = None
    timed: bool = True


class PlainLinear(nn.Module):
    """A layer of ours as eager PyTorch: the formula, gradients by autograd."""

    def __init__(self, layer: CURLoRALinear | SECURALinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        return reference.cur_linear(
            x,
            layer.weight,
            layer.bias,
            layer.core(),
            *layer.C_and_R(layer.weight),
            alpha=layer.alpha,
            norm=layer.norm,
            adapter_bias=getattr(layer, "adapter_bias", None),
            task_gate=layer.gate,
        )


class DenseLinear(PlainLinear):
    """The published form: the update as a dense (N, K) matrix, formed and multiplied every step."""

    def forward(self, x: Tensor) -> Tensor:
        layer, W = self.layer, self.layer.weight
        C, R = W[:, layer.cols], W[layer.rows, :]
        core = layer.core().to(W.dtype)
        delta = F.linear(x, reference.delta_weight(core, C, R, layer.alpha))
        base = F.linear(x, W, layer.bias)
        if layer.norm is None:
            return base + delta
        delta = reference.eager.add(delta, layer.adapter_bias)
        wide = torch.promote_types(x.dtype, torch.float32)
        return reference.smagnorm(base.to(wide), delta.to(wide), layer.norm).to(x.dtype)


def rivals(linear: nn.Linear, r: int, *, compiled: bool) -> tuple[dict[str, Rival], list[str]]:
    """Contenders by name, and why others are missing."""
    device, dtype = linear.weight.device, linear.weight.dtype
    found = {"frozen": Rival(copy.deepcopy(linear).requires_grad_(False))}
    missing = []
    forms = {
        "CURLoRA": (CURLoRALinear, {}),
        "SECURA": (SECURALinear, dict(m=_m(linear, r), adapter_bias=False, norm=SMagNorm())),
        "SECURA, weight domain": (
            SECURALinear,
            dict(m=_m(linear, r), adapter_bias=False, norm=SMagNorm(domain="weight")),
        ),
    }
    for form, (kind, settings) in forms.items():
        for impl in ("reference", "triton", "cuda"):
            reason = why_unavailable(impl, device, dtype, r)
            if reason is not None:
                missing.append(f"{form}, {impl}: {reason}")
                continue
            found[f"{form}, {impl}"] = Rival(
                _ours(kind, linear, r, impl, settings), f"{form}, eager"
            )
        plain = PlainLinear(_ours(kind, linear, r, "reference", settings))
        found[f"{form}, eager"] = Rival(plain)
        if compiled:
            found[f"{form}, compiled"] = Rival(torch.compile(plain), f"{form}, eager")
        if form != "SECURA, weight domain":
            dense = DenseLinear(_ours(kind, linear, r, "reference", settings))
            found[f"{form}, dense"] = Rival(dense, f"{form}, eager")
    found |= _defaults(linear, r)
    found["LoRA (addmm)"] = Rival(_HandWritten(linear, r, _Addmm.apply))
    for name, add in (("PEFT", _peft), ("Unsloth", _unsloth)):
        try:
            found |= add(linear, r)
        except ImportError as error:
            missing.append(f"LoRA ({name}): {error}")
    missing.append("LoRA (Liger): its kernels have no LoRA layer")
    return found, missing


def _defaults(linear: nn.Linear, r: int) -> dict[str, Rival]:
    """What a user gets who sets nothing, a calibrated layer, whose C and R are stored, without and
    with a gate for tokens of the task, and a gated layer as SECURA's own defaults have it; on the
    backend that ``impl="auto"`` takes."""
    impl = resolve("auto", linear.weight.device, linear.weight.dtype, r)
    gated = dict(m=_m(linear, r), adapter_bias=True, norm=SMagNorm())
    found = {}
    for form, kind, settings in (
        ("CURLoRA, orthonormal", CURLoRALinear, dict(basis="orthonormal")),
        ("CURLoRA, natural", CURLoRALinear, dict(basis="natural")),
        ("CURLoRA, natural, gated", CURLoRALinear, dict(basis="natural")),
        ("SECURA, orthonormal, bias", SECURALinear, dict(basis="orthonormal", **gated)),
    ):
        ours, plain = (_ours(kind, linear, r, each, settings) for each in (impl, "reference"))
        if settings["basis"] == "natural":
            for layer in (ours, plain):
                put_natural_basis(layer, gated=form.endswith("gated"))
        found[f"{form}, {impl}"] = Rival(ours, f"{form}, eager")
        found[f"{form}, eager"] = Rival(PlainLinear(plain), timed=False)
    return found


def _m(linear: nn.Linear, r: int) -> int:
    """m > r as published (200 for 150), as far as the layer allows."""
    return min(r + (r + 2) // 3, linear.in_features)


def _ours(kind, linear: nn.Linear, r: int, impl: str, settings: dict) -> nn.Module:
    """The same columns, rows and core for every ``impl``."""
    generator = torch.Generator().manual_seed(0)
    layer = kind.from_linear(
        copy.deepcopy(linear),
        r,
        selection="inverted",
        replace=False,
        generator=generator,
        impl=impl,
        **dict(basis="raw") | settings,
    )
    _start(layer)
    return layer


def _start(layer: nn.Module) -> None:
    with torch.no_grad():
        shape = layer.core_parameter().shape
        start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        layer.core_parameter().copy_(0.02 * start)


def put_natural_basis(layer: nn.Module, gated: bool = False) -> None:
    """In the place of ``calibrate``: orthonormal C and R, and a gate, that know of no text, since
    how fast a layer is does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    sides = (
        torch.randn(size, layer.r, generator=generator).to(layer.weight.device)
        for size in layer.weight.shape
    )
    C, R = (torch.linalg.qr(side).Q for side in sides)
    gate = torch.randn(layer.r, 2, generator=generator).to(layer.weight.device) / layer.r
    layer.move_on(C, R.T, 1.0, layer.weight, learned=False, gate=gate if gated else None)
    _start(layer)


def _peft(linear: nn.Linear, r: int) -> dict[str, Rival]:
    from peft import LoraConfig, get_peft_model

    found = {}
    for name, dora in (("LoRA (PEFT)", False), ("DoRA (PEFT)", True)):
        config = LoraConfig(r=r, lora_alpha=r, target_modules=["0"], use_dora=dora)
        model = get_peft_model(nn.Sequential(copy.deepcopy(linear)), config)
        layer = model.base_model.model[0]
        nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
        found[name] = Rival(layer.to(linear.weight.dtype))
    return found


class _HandWritten(nn.Module):
    """LoRA whose ``function(x, W, A, B)`` brings its own backward pass."""

    def __init__(self, linear: nn.Linear, r: int, function: Callable) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        options = dict(dtype=linear.weight.dtype, device=linear.weight.device)
        self.A = nn.Parameter(torch.randn(r, linear.in_features, **options) * 0.02)
        self.B = nn.Parameter(torch.randn(linear.out_features, r, **options) * 0.02)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.A, self.B)


class _Addmm(torch.autograd.Function):
    """The fewest passes that the library's products allow: the update is added inside one."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        t = x @ A.T
        ctx.save_for_backward(x, W, A, B, t)
        return (x @ W.T).addmm_(t, B.T)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        x, W, A, B, t = ctx.saved_tensors
        dt = dy @ B
        return (dy @ W).addmm_(dt, A), None, dt.T @ x, dy.T @ t


def _unsloth(linear: nn.Linear, r: int) -> dict[str, Rival]:
    """Unsloth's hand-written LoRA of one layer (``LoRA_W``), where it is installed."""
    try:
        from unsloth.kernels.fast_lora import LoRA_W
    except Exception as error:  # it looks for a GPU, a compiler and more when it is imported
        raise ImportError(f"unsloth cannot be imported: {error}") from error
    return {
        "LoRA (Unsloth)": Rival(
            _HandWritten(linear, r, lambda x, W, A, B: LoRA_W.apply(x[None], W, None, A, B, 1.0)[0])
        )
    }
