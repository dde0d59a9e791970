"""Continual-learning strategies that train a sequence of tasks with whatever parameters require
gradients: any PEFT method, and this package's layers. A plain loop calls them like this
(``strategies.trainer.StrategyTrainer`` does the same inside transformers' Trainer):

    for batches in tasks:
        strategy.before_task(model)
        for batch in batches:
            batch = strategy.batch(batch)
            loss, _ = forward(model, batch)
            strategy.loss(model, batch, loss).backward()
            optimizer.step()
            strategy.after_step(model)
            optimizer.zero_grad()
        strategy.after_task(model, batches)
        with strategy.evaluation(model):
            ...

With gradient accumulation each micro-batch's loss, as ``strategy.loss`` returns it, is divided by
their number, and ``after_step`` follows the optimiser's step alone.
"""

from functools import partial

from .base import Strategy, transformers_forward
from .ewc import EWC
from .general_text import BaseKL, GeneralReplay
from .ilora import ILoRA
from .interpolation import Interpolated
from .replay import Replay

STRATEGIES = {"sequential": Strategy, "replay": Replay, "ewc": EWC, "ilora": ILoRA}
PREDICTED = {
    "base kl": BaseKL,
    "base kl, weight 4": partial(BaseKL, weight=4.0),
    "base kl, weight 16": partial(BaseKL, weight=16.0),
    "base kl, weight 4, 0.7 of the way": lambda **rows: Interpolated(
        BaseKL(**rows, weight=4.0), 0.7
    ),
}
ON_GENERAL_TEXT = {**PREDICTED, "general replay": GeneralReplay}

__all__ = [
    "EWC",
    "ON_GENERAL_TEXT",
    "PREDICTED",
    "STRATEGIES",
    "BaseKL",
    "GeneralReplay",
    "ILoRA",
    "Interpolated",
    "Replay",
    "Strategy",
    "transformers_forward",
]
