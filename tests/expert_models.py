"""Tiny mixtures of experts for the tests of ``target_parameters``, one for each layout."""

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from secura_kernels.peft import SecuraConfig

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
COMMON = dict(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    num_experts_per_tok=2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
# (E, 2 I, H) and (E, H, I); a shared expert beside them; two layouts of gate and up; transposed
# and with biases.
KINDS = {
    "qwen3": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(moe_intermediate_size=24, num_experts=6, head_dim=8, **COMMON),
    ),
    "qwen2": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            moe_intermediate_size=24, shared_expert_intermediate_size=16, num_experts=6, **COMMON
        ),
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(intermediate_size=24, num_local_experts=6, **COMMON),
    ),
    "gpt-oss": (
        GptOssForCausalLM,
        GptOssConfig(intermediate_size=24, num_local_experts=6, head_dim=8, **COMMON),
    ),
}


def moe(
    kind: str = "qwen3", dtype: torch.dtype = torch.float32, seed: int = 0, run: str = "eager"
) -> nn.Module:
    """``run``: the experts' implementation; transformers' own grouped one has no float64."""
    model_class, config = KINDS[kind]
    config._experts_implementation = run
    config._attn_implementation = "eager"
    model = model_class(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def adapted(model: nn.Module, **settings) -> nn.Module:
    """Of the experts alone, unless told otherwise."""
    settings = dict(r=4, target_modules=[], target_parameters=BOTH) | settings
    return get_peft_model(model, SecuraConfig(**settings)).eval()


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold stacked weights, whether adapted or not."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.endswith(".experts") or name == "experts"
    }
