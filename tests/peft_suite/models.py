"""Tiny random models under the names by which PEFT's tests ask the model hub for them.

They are folders of the directory that the tests run in, where ``from_pretrained`` finds them before
it would ask the hub. Their weights are larger than usual, so that adapters show in the outputs.
"""

from pathlib import Path

import torch
import transformers as tf
from peft import LoraConfig

PEFT, TRL, HF = "peft-internal-testing", "trl-internal-testing", "hf-internal-testing"
# A LoRA adapter's configuration, which every method's class must read.
LORA = f"{PEFT}/tiny-opt-lora-revision"

TEXT = dict(
    vocab_size=128,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
    initializer_range=0.2,
)
LLAMA = TEXT | dict(num_key_value_heads=2, pad_token_id=0)
GPT = dict(
    vocab_size=128,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_inner=48,
    n_positions=64,
    rotary_dim=4,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
)
OPT = dict(
    vocab_size=128,
    hidden_size=32,
    word_embed_proj_dim=32,
    ffn_dim=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    init_std=0.2,
)
BART = dict(
    vocab_size=128,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    max_position_embeddings=64,
    init_std=0.2,
)
T5 = dict(
    vocab_size=128,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    decoder_start_token_id=0,
    initializer_factor=0.3,
)

MODELS = {
    f"{PEFT}/tiny-random-OPTForCausalLM": (tf.OPTForCausalLM, tf.OPTConfig, OPT),
    f"{PEFT}/opt-125m": (
        tf.OPTForCausalLM,
        tf.OPTConfig,
        OPT
        | dict(
            hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=12, init_std=0.05
        ),
    ),
    f"{PEFT}/tiny-random-GPT2LMHeadModel": (tf.GPT2LMHeadModel, tf.GPT2Config, GPT),
    f"{PEFT}/tiny-random-GPTJForCausalLM": (tf.GPTJForCausalLM, tf.GPTJConfig, GPT),
    f"{TRL}/tiny-random-LlamaForCausalLM": (tf.LlamaForCausalLM, tf.LlamaConfig, LLAMA),
    f"{TRL}/tiny-LlamaForSequenceClassification-3.2": (
        tf.LlamaForSequenceClassification,
        tf.LlamaConfig,
        LLAMA | dict(num_labels=1),
    ),
    f"{PEFT}/tiny-dummy-qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config, LLAMA),
    f"{HF}/tiny-random-Gemma3ForCausalLM": (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig,
        LLAMA | dict(head_dim=8, tie_word_embeddings=False),
    ),
    f"{PEFT}/tiny-random-T5ForConditionalGeneration-calibrated": (
        tf.T5ForConditionalGeneration,
        tf.T5Config,
        T5,
    ),
    f"{PEFT}/tiny-random-BartForConditionalGeneration": (
        tf.BartForConditionalGeneration,
        tf.BartConfig,
        BART,
    ),
    f"{PEFT}/tiny-random-BertModel": (tf.BertModel, tf.BertConfig, TEXT),
    f"{PEFT}/tiny-random-RobertaModel": (tf.RobertaModel, tf.RobertaConfig, TEXT),
    f"{PEFT}/tiny-random-DebertaModel": (tf.DebertaModel, tf.DebertaConfig, TEXT),
    f"{PEFT}/tiny-random-DebertaV2Model": (tf.DebertaV2Model, tf.DebertaV2Config, TEXT),
    f"{PEFT}/tiny-random-BertForSequenceClassification": (
        tf.BertForSequenceClassification,
        tf.BertConfig,
        TEXT,
    ),
    f"{PEFT}/tiny-random-RobertaForSequenceClassification": (
        tf.RobertaForSequenceClassification,
        tf.RobertaConfig,
        TEXT,
    ),
    f"{PEFT}/tiny-random-LlamaForCausalLM": (tf.LlamaForCausalLM, tf.LlamaConfig, LLAMA),
    f"{PEFT}/tiny-random-BloomForCausalLM": (
        tf.BloomForCausalLM,
        tf.BloomConfig,
        dict(vocab_size=128, hidden_size=32, n_layer=5, n_head=4),
    ),
    f"{PEFT}/tiny-clip-text-2": (tf.CLIPTextModelWithProjection, tf.CLIPTextConfig, TEXT),
    "bert-base-uncased": (tf.BertForSequenceClassification, tf.BertConfig, TEXT),
    "google/flan-t5-small": (tf.T5ForConditionalGeneration, tf.T5Config, T5),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, GPT),
}


def write(folder: Path) -> None:
    """Writes the models, and the adapter's configuration."""
    tf.utils.logging.disable_progress_bar()
    for name, (model, config, settings) in MODELS.items():
        torch.manual_seed(0)
        model(config(**settings)).save_pretrained(folder / name)
    LoraConfig().save_pretrained(folder / LORA)
