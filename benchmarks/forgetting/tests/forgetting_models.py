"""Random models of two layers and their tokenizers, for the tests of benchmarks/forgetting."""

from pathlib import Path

import safetensors.torch
import tokenizers
import torch
import transformers

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "red", "blue", "small"]
VOCABULARY = 40
END = 2


def write_encoder(folder: Path) -> Path:
    """A BERT as the package has the real one: pooler and positions included."""
    torch.manual_seed(0)
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*marks, *WORDS])}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            initializer_range=0.5,
        )
    )
    model.config.save_pretrained(folder)
    positions = {"embeddings.position_ids": torch.arange(256)[None]}
    safetensors.torch.save_file(model.state_dict() | positions, folder / "model.safetensors")
    return folder


def tiny_language_model(seed: int = 0, dtype: torch.dtype = torch.float64):
    """A Llama whose predictions are far from uniform."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=END,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def letters_tokenizer():
    """One token a letter, and a chat template."""
    letters = "abcdefghijklmnopqrstuvwxyz :\n."
    vocabulary = {token: i for i, token in enumerate(["?", "<s>", "<e>", *letters])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="?", eos_token="<e>", bos_token="<s>"
    )
    made.chat_template = (
        "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<e>{% endif %}"
    )
    return made
