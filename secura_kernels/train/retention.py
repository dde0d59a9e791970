"""How far a fine-tuned model has moved from its base: drift of its weights, gradients, base loss.

For the callbacks that log these while training see ``callbacks.py``.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from math import inf, nan

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import fail

IGNORED_LABEL = -100  # of torch's cross entropy and of transformers' models
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
    itself, in front of a gate: a gate on outputs is no linear map, so no weight has its change.
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
    for name, module, adapters in _changed_layers(model):
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


@torch.no_grad()
def base_loss(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> float:
    """The mean loss of ``model`` over ``batches``, per label token, without dropout.

    A batch's own mean loss counts as often as it has labels. Labels of two or more dimensions of
    integers are tokens: those that are not -100 count, the first of each sequence excepted, which
    a causal model predicts from nothing (not so for encoder-decoders, masked language models and
    token classifiers). Other labels count once per sample. The model is put in eval mode, and
    each of its modules back in the mode it was in.

    Args:
        batches: what the model's forward takes, ``labels`` among it; moved to its device.

    Raises:
        ValueError: a batch without labels, or no label at all.
    """
    device = next(model.parameters()).device
    total, labels = torch.zeros((), dtype=torch.float64, device=device), 0
    with evaluating(model):
        for i, batch in enumerate(batches):
            if not isinstance(batch.get("labels"), Tensor):
                raise fail(f"batches[{i}]", sorted(batch), "a dict with a tensor of labels")
            count = _count_labels(model, batch["labels"])
            if count:
                output = model(
                    **{
                        key: value.to(device) if isinstance(value, Tensor) else value
                        for key, value in batch.items()
                    }
                )
                loss = output["loss"] if isinstance(output, dict) else output[0]
                total += count * loss.to(device, torch.float64)
                labels += count
    if not labels:
        raise fail("labels in batches", labels, "at least one that counts")
    return float(total / labels)


@torch.no_grad()
def base_kl(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> float:
    """The mean KL divergence, in nats a token, of ``model`` from itself without its adapters:
    KL(base || model) of the next token's distributions, without dropout. Two forward passes.

    It is of what adapters change: the base of plain layers is the W that they have now, which M1
    stages move, and what is trained beside adapters is in both (but PEFT's ``modules_to_save``).

    Args:
        batches: what the model's forward takes, moved to its device; ``labels`` are left out, and
            tokens that ``attention_mask`` leaves out do not count.

    Raises:
        ValueError: no tokens; a model without logits. RuntimeError: a merged layer.
    """
    device = next(model.parameters()).device
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    with evaluating(model):
        for batch in batches:
            inputs = {
                key: value.to(device) if isinstance(value, Tensor) else value
                for key, value in batch.items()
                if key != "labels"
            }
            with without_adapters(model):
                base = log_probabilities(model, inputs)
            moved = log_probabilities(model, inputs)
            total += (base.exp() * (base - moved)).sum(dtype=torch.float64)
            tokens += len(base)
    if not tokens:
        raise fail("batches", tokens, "at least one token")
    return float(total / tokens)


def log_probabilities(model: nn.Module, inputs: dict) -> Tensor:
    """(tokens, classes), float32, of the tokens that are no padding."""
    logits = getattr(model(**inputs), "logits", None)
    if logits is None:
        raise fail("model", type(model).__name__, "one whose output has logits")
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == logits.shape[:-1]:
        logits = logits[mask.bool()]
    return logits.reshape(-1, logits.shape[-1]).float().log_softmax(-1)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[int]:
    """The base model: adapted layers, of this package and of PEFT, are their bases. It says how
    many there are.

    Raises:
        RuntimeError: a merged layer, which has no base.
    """
    found = []
    for name, module in model.named_modules():
        flag = "_disable_adapters" if hasattr(module, "_disable_adapters") else "disable_adapters"
        if not isinstance(getattr(module, flag, None), bool):  # transformers' models have a method
            continue
        if getattr(module, "merged", False):
            raise RuntimeError(f"{name} is merged: unmerge the model first")
        found.append((module, flag, getattr(module, flag)))
    try:
        for module, flag, _ in found:
            setattr(module, flag, True)
        yield len(found)
    finally:
        for module, flag, before in found:
            setattr(module, flag, before)


@torch.no_grad()
def core_size(model: nn.Module) -> float:
    """||V||^2 unit^2 / 2, summed over the calibrated layers of ``model``: the change of its
    predictions on general text, in nats a token, if the layers' changes did not add up. They do:
    the KL divergence that is measured is some times as much (see ``RetentionCallback``), but grows
    in proportion while training goes on. It costs no pass of the model.

    Of a natural basis it is what was trained since the last ``calibrate``. 0 without such layers;
    layers that calibration left out are not in it.
    """
    sizes = [adapter.core_size() for adapter in calibrated_adapters(model)]
    return float(torch.stack(sizes).nansum()) if sizes else 0.0


def core_sizes(model: nn.Module) -> dict[str, float]:
    """``core_size`` of each calibrated layer, by its name; {} without such layers."""
    return {
        name: float(sum(adapter.core_size().double() for adapter in adapters))
        for name, adapters in _calibrated_layers(model)
    }


def calibrated_adapters(model: nn.Module) -> list[nn.Module]:
    """Those in use whose core is measured in nats."""
    return [adapter for _, adapters in _calibrated_layers(model) for adapter in adapters]


def _calibrated_layers(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    for name, adapters in layers_in_use(model):
        calibrated = [adapter for adapter in adapters if adapter.unit is not None]
        if calibrated:
            yield name, calibrated


def layers_in_use(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """This package's layers by name, each with its adapters in use."""
    for name, module, adapters in _changed_layers(model):
        if hasattr(module, "change_factors"):
            yield (
                name,
                [module] if adapters is None else [module.secura_adapter[a] for a in adapters],
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module's own mode comes back, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _changed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[str] | None]]:
    """Each adapted layer, its name and, of a PEFT layer, those of its active adapters it holds:
    a model's active adapters need not be in every layer."""
    for name, module in model.named_modules():
        peft = hasattr(module, "base_layer") and hasattr(module, "active_adapters")
        if not hasattr(module, "change_factors") and not (
            peft and hasattr(module, "get_delta_weight")
        ):
            continue
        adapters = None
        if peft:
            held = [getattr(module, part, ()) for part in module.adapter_layer_names]
            adapters = [a for a in module.active_adapters if any(a in part for part in held)]
        if adapters is None or adapters:
            yield name, module, adapters


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


def _count_labels(model: nn.Module, labels: Tensor) -> int:
    if labels.ndim < 2 or labels.is_floating_point():
        return labels.shape[0]
    whole = getattr(getattr(model, "config", None), "is_encoder_decoder", False) or getattr(
        model, "loss_type", None
    ) in ("ForMaskedLM", "ForTokenClassification")
    return int((labels[..., 0 if whole else 1 :] != IGNORED_LABEL).sum())
