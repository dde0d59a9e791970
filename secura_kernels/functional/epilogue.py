"""The change over a base output that somebody else computed (a quantised layer, a
tensor-parallel one): ``cur_epilogue``; and of a batch of several adapters: ``cur_batched``."""

import torch
from torch import Tensor

from ..backends import reference
from ..backends.operands import CurOperands
from ..backends.reference import batched
from ..checks import check_choice, fail
from ..ops import CurBatched, CurEpilogue, apply, forward_mode, pack_norm, prepare
from ..settings import SMagNorm
from .linear import autocast, check_settings, check_task_gate, check_uncounted


def cur_epilogue(
    y0: Tensor,
    t: Tensor,
    core: Tensor,
    C: Tensor,
    *,
    alpha: float = 1.0,
    norm: SMagNorm | None = None,
    adapter_bias: Tensor | None = None,
    decay: Tensor | None = None,
    task_gate: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """What ``cur_linear`` does to its base output, for any other base output.

    ``y = y0 + delta``, or S-MagNorm(y0, delta) with ``norm``, where ``delta = h C^T +
    adapter_bias`` and ``h = alpha t core^T`` (CURLoRA, arXiv 2408.14572; SECURA, arXiv 2502.18168).
    ``cur_linear(x, W, core, ...)`` is ``cur_epilogue(F.linear(x, W, bias), x @ R.T, core, C,
    ...)``.

    Args:
        y0: (..., N), the base output, its bias included; it is not changed.
        t: (..., r), x R^T. C: (N, r), frozen. One floating dtype and device with y0.
        core: (r, r), any floating dtype; float32 beside low precision.
        alpha: scale of the adapter path. norm: of domain "output".
        adapter_bias: (N,), part of the change. decay: (N,) importance-decay factors.
        task_gate: (r, 2), as in ``cur_linear``.
        impl: ``"auto"``, ``"triton"``, ``"cuda"`` or ``"reference"``.

    Returns:
        (..., N) in y0's dtype, and y0 to the bit where the change is 0; under autocast in the
        autocast dtype.

    Trained through autograd: y0, t, core, adapter_bias; second derivatives included. Saved for the
    backward pass: t and the coded gate (y0 itself where the gate is not detached).

    Raises:
        ValueError: shapes, dtypes, devices or names that do not fit; a norm of domain "weight"; a
            C, decay or task_gate that requires a gradient; a task_gate beside a norm.
        RuntimeError: a named ``impl`` that cannot run here.
    """
    layer = CurOperands.of_epilogue(core, C, adapter_bias, decay, alpha, norm, task_gate)
    return cur_epilogue_and_moved(y0, t, layer, impl)[0]


def cur_epilogue_and_moved(
    y0: Tensor, t: Tensor, layer: CurOperands, impl: str, edge: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``cur_epilogue``, and how many values of the gate lie at or under ``edge``: (1,) int64, or
    (0,) where ``edge`` is 0 or there is no gate."""
    core, adapter_bias, decay, alpha = layer.core, layer.adapter_bias, layer.decay, layer.alpha
    norm, task_gate = layer.norm, layer.task_gate
    _check_settings(alpha, norm, impl)
    check_task_gate(layer)
    prepare(y0, layer.C)
    y0, t, C = autocast(y0, t, layer.C)
    N, r = _check_base(y0, t, C)
    if core.shape != (r, r) or not core.is_floating_point():
        raise fail("core", _described(core), f"floating point, {(r, r)}")
    _check_others(
        y0,
        {
            "core": (core, (r, r)),
            "adapter_bias": (adapter_bias, (N,)),
            "decay": (decay, (N,)),
            "task_gate": (task_gate, (r, 2)),
        },
        frozen=("decay", "task_gate"),
    )
    if forward_mode():
        check_uncounted(edge)
        y = reference.cur_epilogue(
            y0.reshape(-1, N),
            t.reshape(-1, r),
            core,
            C,
            alpha=alpha,
            norm=norm,
            adapter_bias=adapter_bias,
            decay=decay,
            task_gate=task_gate,
        )
        return y.view(y0.shape), y.new_empty(0, dtype=torch.int64)
    y, _, moved = apply(
        CurEpilogue,
        y0.reshape(-1, N),
        t.reshape(-1, r),
        core,
        C,
        adapter_bias,
        decay,
        task_gate,
        float(alpha),
        pack_norm(norm),
        norm is None or norm.detach_gate,
        edge,
        impl,
    )
    return y.view(y0.shape), moved


def cur_batched(
    y0: Tensor,
    t: Tensor,
    cores: Tensor,
    adapter: Tensor,
    C: Tensor,
    *,
    alpha: float = 1.0,
    norm: SMagNorm | None = None,
    adapter_bias: Tensor | None = None,
    impl: str = "auto",
    check_ids: bool = False,
) -> Tensor:
    """``cur_epilogue`` of a batch in which every sample, or every token, has its own adapter.

    Each sample is what its single run with its own core gives; in particular ``ref="max"`` is the
    largest ratio of the one sample. ``adapter`` is never read on the host.

    Args:
        y0: (B, ..., N), not changed. t: (B, ..., r). C: (N, r), frozen. One floating dtype and
            device.
        cores: (A, r, r), any floating dtype, A >= 1.
        adapter: int64, (B,) by sample, or y0's shape without N by token (packed sequences); each in
            [0, A), or -1 for none, which keeps y0 to the bit. Any other number gives an undefined
            sample or token, and undefined gradients.
        alpha, impl: as in ``cur_epilogue``. adapter_bias: (A, N).
        norm: as in ``cur_epilogue``; by token ``ref`` is a number, since a token's own maximum says
            nothing of how far its sequence has moved.
        check_ids: a number out of range raises an error: on a GPU a device-side assertion, without
            waiting for it, so that it is seen at a later synchronisation.

    Returns:
        (B, ..., N) in y0's dtype; under autocast in the autocast dtype.

    Trained through autograd: y0, t, cores, adapter_bias; second derivatives included. Saved for the
    backward pass: t and the coded gate (y0 itself where the gate is not detached). Deterministic:
    two runs are bitwise equal.

    Raises:
        ValueError: as ``cur_epilogue``. RuntimeError: a named ``impl`` that cannot run here; an id
            out of range, with ``check_ids``.
    """
    _check_settings(alpha, norm, impl)
    check_choice("check_ids", check_ids, (True, False))
    y0, t, C = autocast(y0, t, C)
    N, r = _check_base(y0, t, C)
    if y0.ndim < 2:
        raise fail("y0.shape", tuple(y0.shape), f"(B, ..., {N})")
    if (
        cores.ndim != 3
        or not len(cores)
        or cores.shape[1:] != (r, r)
        or (not cores.is_floating_point())
    ):
        raise fail("cores", _described(cores), f"floating point, (A, {r}, {r}), A >= 1")
    _check_ids(adapter, y0, norm)
    _check_others(
        y0,
        {
            "cores": (cores, cores.shape),
            "adapter": (adapter, adapter.shape),
            "adapter_bias": (adapter_bias, (len(cores), N)),
        },
    )
    if check_ids:
        torch._assert_async(
            ((adapter >= -1) & (adapter < len(cores))).all(),
            f"adapter is not allowed: every id must be in [-1, {len(cores)}), the number of cores",
        )
    flat = (y0.reshape(-1, N), t.reshape(-1, r), cores, adapter.reshape(-1), C, adapter_bias)
    if forward_mode():
        y, _ = batched.forward(*flat, alpha, norm, False)
    else:
        y, _ = apply(
            CurBatched,
            *flat,
            float(alpha),
            pack_norm(norm),
            norm is None or norm.detach_gate,
            impl,
        )
    return y.view(y0.shape)


def _check_ids(adapter: Tensor, y0: Tensor, norm: SMagNorm | None) -> None:
    if adapter.dtype != torch.int64:
        raise fail("adapter.dtype", adapter.dtype, "torch.int64")
    by_sample, by_token = tuple(y0.shape[:1]), tuple(y0.shape[:-1])
    if tuple(adapter.shape) not in (by_sample, by_token):
        raise fail(
            "adapter.shape",
            tuple(adapter.shape),
            f"{by_sample}, an id a sample, or {by_token}, an id a token",
        )
    if adapter.ndim > 1 and norm is not None and norm.ref == "max":
        raise fail("norm.ref", norm.ref, "a number where adapter is given by token")


def _check_settings(alpha, norm, impl) -> None:
    check_settings(alpha, norm, impl)
    if norm is not None and norm.domain != "output":
        raise fail("norm.domain", norm.domain, "'output': the weight is not known here")


def _check_base(y0: Tensor, t: Tensor, C: Tensor) -> tuple[int, int]:
    """N and r."""
    if C.ndim != 2 or not C.is_floating_point():
        raise fail("C", _described(C), "floating point, (N, r)")
    N, r = C.shape
    if y0.ndim == 0 or y0.shape[-1] != N:
        raise fail("y0.shape", tuple(y0.shape), f"(..., {N}) for a C {(N, r)}")
    if t.shape != (*y0.shape[:-1], r):
        raise fail("t.shape", tuple(t.shape), f"{(*y0.shape[:-1], r)}")
    for name, value in (("t", t), ("C", C)):
        if value.dtype != y0.dtype:
            raise fail(f"{name}.dtype", value.dtype, f"y0's, {y0.dtype}, outside autocast")
    _check_others(y0, {"t": (t, t.shape), "C": (C, C.shape)}, frozen=("C",))
    return N, r


def _check_others(
    y0: Tensor, shapes: dict[str, tuple[Tensor | None, tuple]], frozen: tuple[str, ...] = ()
) -> None:
    for name, (value, shape) in shapes.items():
        if value is None:
            continue
        if tuple(value.shape) != tuple(shape):
            raise fail(f"{name}.shape", tuple(value.shape), f"{tuple(shape)}")
        if value.device != y0.device:
            raise fail(f"{name}.device", str(value.device), f"y0's, {y0.device}")
        if name in frozen and value.requires_grad:
            raise fail(f"{name}.requires_grad", True, "False: it is a constant here")


def _described(value: Tensor) -> str:
    return f"{value.dtype} {tuple(value.shape)}"
