"""The four methods: attach one to a model, save what it trained, load that into a fresh model."""

from pathlib import Path

import torch
from settings import METHODS, Job
from torch import nn


def attach(model: nn.Module, job: Job) -> nn.Module:
    """Freeze `model` and put `job.method` on its targets; return the model to train."""
    model.requires_grad_(False)
    if METHODS[job.method].package == "peft":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(target_modules=list(job.targets), task_type="CAUSAL_LM", **job.options)
        return get_peft_model(model, config)

    from secura_kernels import CURLoRALinear, SECURALinear

    layer = {"secura": SECURALinear, "curlora": CURLoRALinear}[job.method]
    generator = torch.Generator().manual_seed(job.seed)
    for name, linear in target_layers(model, job.targets).items():
        model.set_submodule(name, layer.from_linear(linear, generator=generator, **job.options))
    return model


def save(model: nn.Module, method: str, folder: Path) -> None:
    """Write only what was trained into `folder`."""
    if METHODS[method].package == "peft":
        model.save_pretrained(folder)
    else:
        from secura_kernels import save_adapter

        save_adapter(model, folder / "adapter.safetensors")


def load(fresh: nn.Module, method: str, folder: Path) -> nn.Module:
    """Put the adapter that `save` wrote into `fresh`, an untouched base model."""
    if METHODS[method].package == "peft":
        from peft import PeftModel

        return PeftModel.from_pretrained(fresh, folder)

    from secura_kernels import load_adapter

    load_adapter(fresh, folder / "adapter.safetensors")
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
