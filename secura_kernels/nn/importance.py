"""Importance decay, kept on the device: a factor per output channel, no host synchronisation."""

import torch
from torch import Tensor, nn

from ..settings import ImportanceDecay


class ImportanceState(nn.Module):
    """Counts the gate's values during a step and chooses the next step's decay factors.

    [SECURA code] When more than ``settings.ratio`` of the gate lies at or under ``settings.edge``,
    sampled output channels are decayed. The published code tests this on the host in the same
    forward pass and samples sorted positions instead of channels; here the decision is one step
    late, on the device, and channels are sampled.

    Args:
        weight: W (N, K). r: the layer's rank. settings: the thresholds.
    """

    def __init__(self, weight: Tensor, r: int, settings: ImportanceDecay) -> None:
        super().__init__()
        N = weight.shape[0]
        self.settings, self.chosen = settings, max((N - r) // 2, N // 4)
        self.register_buffer("factor", torch.ones(N, device=weight.device))
        count = torch.zeros(2, dtype=torch.int64, device=weight.device)
        self.register_buffer("count", count)  # values at or under edge, values in all
        self.register_buffer("row_norms", None, persistent=False)
        self.watched: tuple[nn.Parameter | None] = (None,)  # in a tuple: not a parameter of ours
        self.measure(weight)

    @torch.no_grad()
    def measure(self, weight: Tensor) -> None:
        """Takes the row norms of W (N, K), the sampling weights."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.row_norms = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).float()

    @torch.no_grad()
    def add(self, moved: Tensor, values: int) -> None:
        """Adds a forward pass's count (1,) of ``values`` gate values."""
        self.count[0] += moved[0]
        self.count[1] += values

    def watch(self, parameter: nn.Parameter) -> None:
        """Chooses factors whenever the parameter's gradient has been accumulated: once a backward
        pass, after every recomputation of activation checkpointing has used the old factors."""
        if not parameter.is_leaf:
            raise RuntimeError(
                "importance decay is not possible under FullyShardedDataParallel (FSDP1), where no "
                "parameter has a gradient of its own: use fully_shard (FSDP2), or "
                "importance_decay=None"
            )
        if self.watched[0] is not parameter:  # a new one: sharding and loading replace it
            self.watched = (parameter,)
            parameter.register_post_accumulate_grad_hook(self._choose)

    def __setstate__(self, values: dict) -> None:
        super().__setstate__(values | dict(watched=(None,)))  # of a copy, which has no hooks

    @torch.no_grad()
    def _choose(self, _: Tensor) -> None:
        """Samples channels without replacement, with probability proportional to their row norms:
        the largest of norm / Exp(1) noise, which is what ``torch.multinomial`` does."""
        noise = torch.empty_like(self.row_norms).exponential_()
        channels = (self.row_norms / noise).topk(self.chosen).indices
        ones = torch.ones_like(self.factor)
        decayed = ones.index_fill(0, channels, self.settings.decay)
        moved, total = self.count
        new = torch.where(moved > self.settings.ratio * total, decayed, ones)
        self.factor.copy_(torch.where(total > 0, new, self.factor))
        self.count.zero_()
