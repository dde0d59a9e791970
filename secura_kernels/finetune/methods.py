"""The methods: attach one to a model, save what it trained, load that into a fresh model."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .settings import METHODS, Job

WEIGHTS = "adapter.safetensors"
BASES = "bases.safetensors"
OWN_TOKENS = 1024  # which the model writes to show what it is to keep
TASK_BATCHES = 6  # whose gradient shows in which directions the task is learned


def attach(model: nn.Module, job: Job, sample: list[Tensor]) -> nn.Module:
    """Freeze `model` and put `job.method` on its targets; return the model to train.

    sample: batches of the task, other than it will be trained on.
    """
    model.requires_grad_(False)
    targets = target_layers(model, job.targets)
    if METHODS[job.method].package == "torch":
        for linear in targets.values():
            linear.weight.requires_grad_(True)
        return model
    if METHODS[job.method].package == "peft":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(target_modules=list(job.targets), task_type="CAUSAL_LM", **job.options)
        return get_peft_model(model, config)

    from .. import CURLoRALinear, SECURALinear

    layer = SECURALinear if job.method == "secura" else CURLoRALinear
    generator = torch.Generator().manual_seed(job.seed)
    for name, linear in targets.items():
        model.set_submodule(name, layer.from_linear(linear, generator=generator, **job.options))
    if METHODS[job.method].options.get("basis") == "natural":
        calibrate_bases(model, job, sample)
    return model


def calibrate_bases(model: nn.Module, job: Job, sample: list[Tensor]) -> None:
    """Measure what `model` is to keep, on text that it writes itself, and what it is to learn.

    One command measures once: the bases lie beside the tokens for its other methods, which differ
    in the gate alone.
    """
    bases = Path(job.tokens).with_name(BASES)
    gated = job.method == "gated"
    if not bases.exists():
        from transformers import AutoTokenizer

        from .. import calibrate, save_adapter

        calibrate(
            model,
            tokenizer=AutoTokenizer.from_pretrained(job.model),
            tokens=OWN_TOKENS,
            task=[{"input_ids": ids, "labels": ids} for ids in sample],
            gated=gated,
            seed=job.seed,
        )
        save_adapter(model, bases)
        return

    from .. import load_adapter

    for name in load_adapter(model, bases):
        if not gated:
            model.get_submodule(name).gate = None


def save(model: nn.Module, method: str, folder: Path) -> None:
    """Write only what was trained into `folder`."""
    if METHODS[method].package == "torch":
        trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, folder / WEIGHTS)
    elif METHODS[method].package == "peft":
        model.save_pretrained(folder)
    else:
        from .. import save_adapter

        save_adapter(model, folder / WEIGHTS)


def load(fresh: nn.Module, method: str, folder: Path) -> nn.Module:
    """Put what `save` wrote into `fresh`, an untouched base model."""
    if METHODS[method].package == "torch":
        fresh.load_state_dict(load_file(folder / WEIGHTS), strict=False)
        return fresh
    if METHODS[method].package == "peft":
        from peft import PeftModel

        return PeftModel.from_pretrained(fresh, folder)

    from .. import load_adapter

    load_adapter(fresh, folder / WEIGHTS)
    return fresh


def target_layers(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """The linear layers whose name ends in one of `targets`, by their full name."""
    layers = linear_layers(model).items()
    return {name: layer for name, layer in layers if name.rpartition(".")[2] in targets}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of `model` by its full name; GPT-2's Conv1D counts as one."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
