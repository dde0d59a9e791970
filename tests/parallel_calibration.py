"""Checks that run in every one of two processes: ``calibrate`` over text that the ranks share."""

from pathlib import Path

import torch
from parallel import fully_sharded, llama, share, tokens
from parallel_data import layers_of
from torch import nn


def adapted() -> nn.Module:
    from peft import get_peft_model

    from secura_kernels.peft import SecuraConfig

    return get_peft_model(llama(), SecuraConfig(
        variant="curlora", r=4, basis="whitened", target_modules=["q_proj", "v_proj", "down_proj"]))


def calibrated(rank: int, folder: Path) -> None:
    """Two processes with half of the text each, whole or sharded by FSDP2, give what one gives."""
    from secura_kernels import calibrate

    first = torch.multinomial
    torch.multinomial = lambda p, n, **_: p.topk(n).indices  # draws would depend on the batches
    try:
        one, two, sharded = adapted(), adapted(), adapted()
        alone = torch.distributed.is_initialized
        torch.distributed.is_initialized = lambda: False
        try:
            found = calibrate(one, [tokens()], progress=False)
        finally:
            torch.distributed.is_initialized = alone
        fully_sharded(sharded, layers_of(sharded))
        for model in (two, sharded):
            mine = calibrate(model, [share(tokens(), rank)], progress=False)
            assert mine.tokens == found.tokens, (mine, found)
            expected = dict(one.named_buffers())
            folds = {n: b for n, b in model.named_buffers() if "fold" in n or n.endswith("unit")}
            assert len(folds) == 3 * 2 * 3
            for name, value in folds.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)
    finally:
        torch.multinomial = first


CHECKS = [calibrated]
