"""transformers' Trainer with a strategy."""

from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from secura_kernels.checks import fail

from .base import Strategy

STATE = "strategy.pt"  # the strategy's state, in each checkpoint's folder


class StrategyTrainer(Trainer):
    """A Trainer of one task: trains on ``strategy``'s batches and losses, evaluates and predicts
    with its weights, saves it with each checkpoint and resumes it. The caller calls ``before_task``
    before ``train()`` and ``after_task`` after it.

    The loss of an optimiser's step is the mean over its micro-batches of what ``strategy.loss``
    returns, each from the mean loss of its micro-batch. Trainer's usual division by the tokens of
    all micro-batches is off: it would count the tasks' own tokens alone, not the replayed ones,
    and add a penalty once for each micro-batch.

    Raises ValueError for a ``compute_loss_func``, which takes that division on itself, and for
    more than one process or device.
    """

    def __init__(self, *args, strategy: Strategy, **kwargs):
        if not isinstance(strategy, Strategy):
            raise fail("strategy", strategy, "a Strategy")
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise fail("compute_loss_func", self.compute_loss_func, "None with a strategy")
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise fail(
                "args.world_size",
                max(self.args.world_size, self.args.n_gpu),
                "1 with a strategy: one process, one GPU (CUDA_VISIBLE_DEVICES chooses it)",
            )
        self.model_accepts_loss_kwargs = False
        self.strategy = strategy
        self.add_callback(StrategyCallback(strategy))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:  # Trainer evaluates through this function too
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = self.strategy.batch(dict(inputs))
        # A copy, since label smoothing takes the labels out of it.
        loss, outputs = super().compute_loss(model, dict(batch), True, num_items_in_batch)
        loss = self.strategy.loss(self.model, batch, loss)  # self.model has the names of the task
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args, **kwargs):
        with self.strategy.evaluation(self.model):
            return super().evaluation_loop(*args, **kwargs)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As Trainer's; a checkpoint's strategy is loaded with it."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            file = Path(folder) / STATE
            if not file.is_file():
                raise fail("resume_from_checkpoint", str(folder), f"a checkpoint with {STATE}")
            self.strategy.load_state_dict(self.model, torch.load(file, weights_only=True))
        return super().train(resume_from_checkpoint, *args, **kwargs)


class StrategyCallback(TrainerCallback):
    """Tells a strategy of the optimiser's steps, not of the micro-batches between them."""

    def __init__(self, strategy: Strategy):
        self.strategy = strategy

    def on_optimizer_step(self, args, state, control, *, model, **kwargs):
        self.strategy.after_step(model)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        torch.save(self.strategy.state_dict(), folder / STATE)
