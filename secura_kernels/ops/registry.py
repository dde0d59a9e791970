"""How an op is registered, the settings it carries, and the one ``impl`` switch.

An op is defined with ``torch.library.Library`` (not ``custom_op``, under which ``torch.func.grad``
fails and forward-mode gradients are silently zero); autograd stands outside it, in one flat
``autograd.Function`` per pair of ops.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from ..backends.operands import CurOperands
from ..backends.programs import by_heart
from ..checks import check_choice
from ..settings import SMagNorm

# Several copies of this code may be loaded from the kernel hub beside the installed package, each
# under a name of its own, under which the hub wants its ops.
_ROOT = __name__.partition(".")[0]
NAMESPACE = "secura" if _ROOT == "secura_kernels" else _ROOT
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
IMPLS = ("auto", "triton", "cuda", "reference")


def why_unavailable(
    impl: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    r: int = 1,
    norm: SMagNorm | None = None,
) -> str | None:
    """Why a backend cannot run a layer of ``dtype``, rank ``r`` and gate ``norm`` on ``device``, or
    None."""
    if impl == "reference":
        return None
    if norm is not None and not norm.detach_gate:
        return "the gate's full derivative (detach_gate=False) is in the reference alone"
    if impl == "triton" and not _is_installed("triton"):
        return "triton is not installed (pip install triton)"
    if impl == "cuda" and not _is_installed("..backends.cuda"):
        return (
            "the CUDA kernels are in the package secura-kernels, not in its form for the kernel hub"
        )
    return _package(impl).why_unavailable(device, dtype, r)


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package, __package__) is not None


@functools.cache
def _package(impl: str) -> ModuleType:
    return importlib.import_module(f"..backends.{impl}", __package__)


def resolve(
    impl: str, device: torch.device, dtype: torch.dtype, r: int, norm: SMagNorm | None = None
) -> str:
    """The backend that runs ``impl`` for a layer of ``dtype``, rank ``r`` and gate ``norm`` on
    ``device``.

    ``"auto"`` is Triton on an NVIDIA GPU; where it cannot run there, the CUDA kernels, and where
    they cannot either, the reference; with one warning that says why.

    Raises:
        ValueError: an unknown name. RuntimeError: a named backend that cannot run, and why.
    """
    check_choice("impl", impl, IMPLS)
    if impl != "auto":
        reason = why_unavailable(impl, device, dtype, r, norm)
        if reason:
            raise RuntimeError(f"impl={impl!r} cannot run here: {reason}; impl='reference' can")
        return impl
    if device.type != "cuda":
        return "reference"
    reasons = []
    for candidate in ("triton", "cuda"):
        reason = why_unavailable(candidate, device, dtype, r, norm)
        if reason is None:
            break
        if reason not in reasons:
            reasons.append(reason)
    else:
        candidate = "reference"
    if reasons:
        _warn_once(f"impl='auto' runs impl={candidate!r} on {device.type}: {'; '.join(reasons)}")
    return candidate


def backend(impl: str, op: str, like: Tensor, r: int, norm: SMagNorm | None = None) -> Any:
    """What runs an op (``forward``, and ``backward``), loaded when first used: a module of the
    reference, a schedule over the passes of another backend.

    Args:
        op: "linear", "weight", "epilogue" or "batched". like: a tensor of the layer's dtype and
            device. norm: the layer's gate.
    """
    return getattr(_package(resolve(impl, like.device, like.dtype, r, norm)), op)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def pack_norm(norm: SMagNorm | None) -> list[float]:
    """The gate's numbers as an op carries them: [] for no gate, else [scale, shift, ref, beta,
    eps] with 0 for ``ref="max"``."""
    if norm is None:
        return []
    # torch.compile traces through a cache, and warns of it.
    return list((_pack.__wrapped__ if torch.compiler.is_compiling() else _pack)(norm))


@functools.lru_cache(maxsize=64)
def _pack(norm: SMagNorm) -> tuple[float, ...]:
    ref = 0.0 if norm.ref == "max" else float(norm.ref)
    return float(norm.scale), float(norm.shift), ref, norm.base_weight, float(norm.eps)


def unpack_norm(values: list[float], domain: str, detach_gate: bool) -> SMagNorm | None:
    """Inverse of ``pack_norm``."""
    return _unpack(tuple(values), domain, detach_gate) if values else None


def unpack_layer(
    tensors: tuple[Tensor | None, ...],
    alpha: float,
    norm: list[float],
    domain: str,
    detach_gate: bool,
    task_gate: Tensor | None = None,
) -> CurOperands:
    """A layer from its tensors, in the order of ``CurOperands``, and its packed settings."""
    return CurOperands(*tensors, alpha, unpack_norm(norm, domain, detach_gate), task_gate)


@functools.lru_cache(maxsize=64)
def _unpack(values: tuple[float, ...], domain: str, detach_gate: bool) -> SMagNorm:
    scale, shift, ref, beta, eps = values
    return SMagNorm(scale, shift, ref or "max", beta, eps, domain, detach_gate)


def register(
    schema: str, run: Callable, fake: Callable, flops: Callable, vmap: Callable | None = None
) -> Callable:
    """Defines ``secura::<schema>``; returns the op.

    Args:
        run: the implementation, for every device. fake: shapes and dtypes of the outputs.
        flops: arguments' shapes -> floating-point operations.
        vmap: batching rule; None: one call per sample, stacked.
    """
    name = LIBRARY.define(" ".join(schema.split()))
    run = _outside_autocast(by_heart(run))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    register_flop_formula(packet)(flops)
    rule = vmap or functools.partial(one_by_one, packet.default)
    torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=LIBRARY)
    _runs[packet.default] = run
    return packet.default


_runs: dict[Callable, Callable] = {}  # what an op runs
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), float, int, bool, str, list, tuple))


def call(op: Callable, *args):
    """``op(*args)``; past PyTorch's dispatcher, which takes longer than a launch, where nothing
    traces, transforms or counts ops and every tensor is a plain one."""
    watched = (
        transformed()
        or torch._C._len_torch_dispatch_stack()
        or torch.jit.is_tracing()
        or torch._C._functorch.is_legacy_batchedtensor(args[0])
    )  # is_grads_batched
    if watched or not _PLAIN.issuperset(map(type, args)):
        return op(*args)
    return _runs[op](*args)


def transformed() -> bool:
    """Whether torch.compile traces this, or a transform of ``torch.func`` is active."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _outside_autocast(run: Callable) -> Callable:
    """An op computes in the dtypes it is given: ``functional`` has cast by then, and backward
    passes may run with autocast on or off."""

    @functools.wraps(run)
    def wrapper(*args, **kwargs):
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return run(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return run(*args, **kwargs)

    return wrapper


def one_by_one(op: Callable, info, in_dims: tuple, *args):
    """vmap as a loop: right for every combination of batched arguments."""
    dims = batched_dims(in_dims, args)
    samples = [
        op(*[a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)])
        for i in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
    return outputs, (0,) * len(outputs)


def batched_dims(in_dims: tuple, args: tuple) -> list[int | None]:
    """The batched dimension of each argument; vmap gives a list for a list of numbers."""
    return [d if isinstance(a, Tensor) else None for d, a in zip(in_dims, args, strict=True)]


def empty_if_none(gradients: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """An op returns tensors only: (0,) stands for a gradient that was not asked for."""
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


def fake_gradients(
    dy: Tensor,
    weight: Tensor,
    core: Tensor,
    adapter_bias: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """Shapes and dtypes of what the backward ops return."""
    dx = dy.new_empty(dy.shape[0], weight.shape[1]) if needs[0] else None
    dcore = torch.empty_like(core) if needs[1] else None
    dbias = torch.empty_like(adapter_bias) if needs[2] else None
    return empty_if_none((dx, dcore, dbias), dy)


def forward_mode() -> bool:
    """Whether forward-mode derivatives are taken (``torch.func.jvp``, ``jacfwd``, ``hessian``, dual
    numbers). The ops have none; the plain formula does."""
    return forward_ad._current_level >= 0 and not torch.compiler.is_compiling()


def apply(function: type[torch.autograd.Function], *inputs):
    """``function.apply(*inputs)``. Where nothing transforms it, by a form without
    ``setup_context``, for which PyTorch would bind the arguments to a signature in every call; and
    without gradients by ``function.alone``, which saves nothing for a backward pass."""
    if transformed():
        return function.apply(*inputs)
    if not torch.is_grad_enabled():
        return function.alone(*inputs)
    return _in_one(function).apply(*inputs)


@functools.cache
def _in_one(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    class InOne(function):
        setup_context = staticmethod(torch.autograd.Function.setup_context)

        @staticmethod
        def forward(ctx, *inputs):
            output = function.forward(*inputs)
            function.setup_context(ctx, inputs, output)
            return output

    InOne.__name__ = InOne.__qualname__ = function.__name__
    return InOne
