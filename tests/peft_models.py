"""Tiny models for the tests of the PEFT method, and how their adapters are moved and compared."""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from secura_kernels.peft import SecuraConfig, SecuraLinear

QV = ["q_proj", "v_proj"]
SECURA = dict(r=4, variant="secura")
GATE_FREE = SECURA | dict(m=6)
GATED = GATE_FREE | dict(norm="calibrated")
CURLORA = dict(r=4, variant="curlora")


def _weights(model: nn.Module, seed: int, dtype: torch.dtype) -> nn.Module:
    """Of the size of trained ones, so that what an adapter does can be seen in the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower() and "ln_" not in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.tie_weights()
    return model.to(dtype).eval()


def llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return _weights(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=50,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=32,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        ),
        seed,
        dtype,
    )


def loaded(folder: Path) -> Iterator[nn.Module]:
    """``llama()`` with the adapter of a folder, in each way to load one."""
    yield PeftModel.from_pretrained(llama(), folder)
    yield PeftModel.from_pretrained(llama(), folder, low_cpu_mem_usage=True)
    model = llama()
    assert not model.load_adapter(folder).unexpected_keys
    yield model


def check_trains(model: nn.Module, batch: dict, steps: int, rate: float) -> None:
    """Some steps on one batch lower its loss, and reach nothing that is frozen."""
    model.train()
    first = model(**batch).loss
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.95 * first
    assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)


def gpt2(seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    return _weights(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=50,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=32,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        seed,
        dtype,
    )


def bert(seed: int = 0, dtype: torch.dtype = torch.float32) -> BertForSequenceClassification:
    return _weights(
        BertForSequenceClassification(
            BertConfig(
                vocab_size=50,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=32,
                num_labels=3,
            )
        ),
        seed,
        dtype,
    )


def t5(seed: int = 0, dtype: torch.dtype = torch.float32) -> T5ForConditionalGeneration:
    return _weights(
        T5ForConditionalGeneration(
            T5Config(
                vocab_size=50,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                decoder_start_token_id=0,
                pad_token_id=0,
                eos_token_id=1,
            )
        ),
        seed,
        dtype,
    )


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return (
        nn.Sequential(
            nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 28, bias=False), nn.ReLU(), nn.Linear(28, 5)
        )
        .to(dtype)
        .eval()
    )


def tokens(batch: int = 2, length: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 50, (batch, length), generator=generator)


def peft(model: nn.Module, **settings):
    """``get_peft_model``, by default of the attention's q and v."""
    settings.setdefault("target_modules", ["0", "2"] if isinstance(model, nn.Sequential) else QV)
    return get_peft_model(model, SecuraConfig(**settings)).eval()


def layers(model: nn.Module) -> dict[str, SecuraLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SecuraLinear)}


@torch.no_grad()
def move(model: nn.Module, name: str = "default", seed: int = 0, std: float = 0.3):
    """Gives an adapter's trained tensors other values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model).values():
        if name in layer.secura_adapter:
            for parameter in layer.secura_adapter[name].parameters():
                parameter.add_(
                    std
                    * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(
                        parameter.dtype
                    )
                )
    return model


def logits(model: nn.Module, inputs: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        out = model(inputs, **kwargs)
    return getattr(out, "logits", out)


def runs_of_each(model, inputs, names) -> list[torch.Tensor]:
    """The whole batch's logits under each of the adapters alone; "__base__" is none."""
    found = []
    for name in names:
        if name == "__base__":
            with model.disable_adapter():
                found.append(logits(model, inputs))
        else:
            model.set_adapter(name)
            found.append(logits(model, inputs))
    return found


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
