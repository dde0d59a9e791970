"""LoRA's rivals that look at text before they train: where their factors start.

- ``corda``: CorDA's knowledge-preserving mode (Yang et al. 2024, arXiv 2406.05223), PEFT's own:
  the factors take the components of W that general text uses least.
- ``eva``: EVA (Paischer et al. 2024, arXiv 2410.07170), PEFT's own: A's rows are the main
  directions of the first task's activations. It has no part for what is to be kept.
- ``null``: LoRA-Null with its A frozen, which keeps more (Tang et al. 2025, arXiv 2503.02659): A
  spans the r directions that general text's activations use least, and B A starts as W on them.
"""

from collections.abc import Callable, Sequence

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn

Batch = dict[str, Tensor]
Batches = Callable[[], Sequence[Batch]]


def corda(model: nn.Module, config: LoraConfig, general: Batches, task: Batches) -> nn.Module:
    from peft.tuners.lora.corda import preprocess_corda  # needs attrs

    def read() -> None:
        for batch in general():
            for row in range(len(next(iter(batch.values())))):  # its hook takes one row at a time
                model(**{name: tensor[row : row + 1] for name, tensor in inputs(batch).items()})

    config.init_lora_weights = "corda"
    config.corda_config = CordaConfig(corda_method="kpm", verbose=False)
    preprocess_corda(model, config, run_model=read)
    return get_peft_model(model, config)


def eva(model: nn.Module, config: LoraConfig, general: Batches, task: Batches) -> nn.Module:
    config.init_lora_weights, config.eva_config = "eva", EvaConfig()
    model = get_peft_model(model, config)
    initialize_lora_eva_weights(
        model,
        [inputs(batch) for batch in task()],
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda args, *_: args[0].flatten(0, -2),
        show_progress_bar=False,
    )
    return model


@torch.no_grad()
def null(model: nn.Module, config: LoraConfig, general: Batches, task: Batches) -> nn.Module:
    model = get_peft_model(model, config)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    moments = dict.fromkeys(layers, 0.0)

    def add(layer: nn.Module, args: tuple[Tensor]) -> None:
        rows = args[0].flatten(0, -2).double()
        moments[layer] = moments[layer] + rows.T @ rows

    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    for batch in general():
        model(**inputs(batch))
    for hook in hooks:
        hook.remove()
    for layer in layers:
        weight, factors = layer.base_layer.weight, [layer.lora_A, layer.lora_B]
        a, b = (factor["default"].weight for factor in factors)
        quiet = torch.linalg.eigh(moments[layer]).eigenvectors[:, : len(a)]  # (K, r)
        p, s, q = torch.linalg.svd(weight.double() @ quiet, full_matrices=False)
        a.copy_(s.sqrt()[:, None] * (q @ quiet.T)).requires_grad_(False)
        b.copy_(p * s.sqrt())
        weight.sub_(layer.scaling["default"] * (b @ a))
    return model


def inputs(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


STARTS = {"corda": corda, "eva": eva, "null": null}
