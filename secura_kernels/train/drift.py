"""How far each adapted layer's weight has moved, and the norms of what moves it."""

from dataclasses import dataclass
from functools import reduce
from math import inf, nan

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import fail
from .adapted import changed_layers

# PEFT layers, by the name of their parameters, whose get_delta_weight is a factor of W.
MULTIPLICATIVE = {"oft_R", "boft_R", "hra_u", "hira_A"}


@dataclass(frozen=True)
class Drift:
    """How far one layer's weight has moved; nan in all three once the change is not finite.

    Attributes:
        relative: ||delta_W||_F / ||W||_F.
        spectral: the largest singular value of delta_W.
        nuclear: the sum of the singular values of delta_W.
    """

    relative: float
    spectral: float
    nuclear: float


@torch.no_grad()
def drift(model: nn.Module) -> dict[str, Drift]:
    """The drift of every adapted layer of ``model``, by the layer's name; computed in float64.

    CURLoRA and SECURA layers never form delta_W (N, K): the singular values of C core R are those
    of S_c core S_r^T, r x r, with C = Q_c S_c and R^T = Q_r S_r. Their drift is that of delta_W
    itself, in front of a gate: one on outputs, or for tokens of the task, is no linear map, so no
    weight has its change.
    Stages are counted, but for M1 stages of the module replacements, which move W: what follows
    one is measured from there.

    Other PEFT layers are measured by their ``get_delta_weight``, dense, summed over the active
    adapters; DoRA's magnitudes are not in it. Modules trained whole are not measured.

    Raises:
        ValueError: a PEFT layer whose change is no matrix added to a weight of its own (OFT, BOFT,
            HRA, HiRA; several parameters in one layer).
        RuntimeError: a merged layer, whose W is no longer the base's.
    """
    moved = {}
    for name, module, adapters in changed_layers(model):
        if module.merged:
            raise RuntimeError(f"{name} is merged: unmerge the model before drift()")
        if hasattr(module, "change_factors"):
            factors = (
                [module.change_factors()]
                if adapters is None
                else [module.change_factors(adapter) for adapter in adapters]
            )
            moved[name] = _drift(_singular_values(factors), module.base_matrix())
        else:
            assert adapters is not None  # a PEFT layer
            moved[name] = _dense_drift(name, module, adapters)
    return moved


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """The 2-norm of each trainable parameter's gradient, by name, and of all of them, ``"total"``.

    Parameters without a gradient are left out; the values are read in one synchronisation.
    """
    grads = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
    if not grads:
        return {"total": 0.0}
    device = next(iter(grads.values())).device
    norms = torch.stack([_norm(grad).to(device) for grad in grads.values()])
    total = torch.linalg.vector_norm(norms)
    values = torch.cat([norms, total[None]]).tolist()
    return dict(zip([*grads, "total"], values, strict=True))


def _singular_values(factors: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Those of the sum of C (N, r) core (r, r) R (r, K), in float64, largest first; of a stack of
    such sums, those of all of its matrices. A sum of changes is one: its C's side by side, its R's
    below each other, its cores on a diagonal."""
    Cs, cores, Rs = zip(*([part.double() for part in parts] for parts in factors), strict=True)
    S_c = torch.linalg.qr(torch.cat(Cs, dim=-1), mode="r")[1]
    S_r = torch.linalg.qr(torch.cat(Rs, dim=-2).mT, mode="r")[1]
    on_diagonal = cores[0]
    for core in cores[1:]:
        beside, below = on_diagonal.shape[-1], core.shape[-1]
        on_diagonal = F.pad(on_diagonal, (0, below, 0, below)) + F.pad(core, (beside, 0, beside, 0))
    return _svdvals(S_c @ on_diagonal @ S_r.mT).flatten().sort(descending=True).values


def _svdvals(matrix: Tensor) -> Tensor:
    if not matrix.isfinite().all():  # LAPACK raises, and a diverged run must be told, not broken
        return matrix.new_full((1,), nan)
    return torch.linalg.svdvals(matrix)


def _drift(values: Tensor, weight: Tensor) -> Drift:
    change, spectral, nuclear, base = torch.stack(
        [torch.linalg.vector_norm(values), values[0], values.sum(), _norm(weight).to(values)]
    ).tolist()
    without_base = inf if change else 0.0
    return Drift(change / base if base else without_base, spectral, nuclear)


def _dense_drift(name: str, module: nn.Module, adapters: list[str]) -> Drift:
    if MULTIPLICATIVE & set(module.adapter_layer_names):
        raise fail(name, type(module).__name__, "a PEFT layer that adds its change to W")
    from peft.utils.integrations import dequantize_module_weight

    delta = reduce(torch.add, (module.get_delta_weight(adapter) for adapter in adapters))
    weight = (
        dequantize_module_weight(module.base_layer)
        if hasattr(module.base_layer, "weight")
        else None
    )
    if weight is None or weight.shape != delta.shape:
        raise fail(name, type(module).__name__, "a PEFT layer over one weight of its own")
    return _drift(_svdvals(delta.double().flatten(1)), weight)


def _norm(tensor: Tensor) -> Tensor:
    """The 2-norm, float64. In two parts, since one float32 sum over a 4096 x 4096 matrix is off by
    6e-4 on the CPU, and a float64 one would copy the matrix."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    parts = torch.linalg.vector_norm(tensor, dim=-1, dtype=dtype) if tensor.ndim else tensor
    return torch.linalg.vector_norm(parts, dtype=torch.float64)
