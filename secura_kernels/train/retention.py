"""What is left of what the base model knew: its loss, its predictions, the size of the cores.

For the callbacks that log these while training see ``callbacks.py``.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..checks import fail
from .adapted import calibrated_adapters, calibrated_layers, evaluating, without_adapters

IGNORED_LABEL = -100  # of torch's cross entropy and of transformers' models


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
        for name, adapters in calibrated_layers(model)
    }


def _count_labels(model: nn.Module, labels: Tensor) -> int:
    if labels.ndim < 2 or labels.is_floating_point():
        return labels.shape[0]
    whole = getattr(getattr(model, "config", None), "is_encoder_decoder", False) or getattr(
        model, "loss_type", None
    ) in ("ForMaskedLM", "ForTokenClassification")
    return int((labels[..., 0 if whole else 1 :] != IGNORED_LABEL).sum())
