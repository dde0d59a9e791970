"""Checks that run in every one of two processes: ``calibrate`` over text that the ranks share."""

from pathlib import Path

import torch
from parallel import fully_sharded, llama, share, tokens
from parallel_data import layers_of
from torch import nn


def adapted(basis: str) -> nn.Module:
    from peft import get_peft_model

    from secura_kernels.peft import SecuraConfig

    return get_peft_model(
        llama(),
        SecuraConfig(
            variant="curlora", r=4, basis=basis, target_modules=["q_proj", "v_proj", "down_proj"]
        ),
    )


def task(ids: torch.Tensor) -> list[dict]:
    """Of fewer words than the general text."""
    return [dict(input_ids=ids // 2, labels=ids // 2)]


def calibrated(rank: int, folder: Path) -> None:
    """Two processes with half of the text each, whole or sharded by FSDP2, give what one gives."""
    from secura_kernels import calibrate

    first = torch.multinomial
    torch.multinomial = lambda p, n, **_: p.topk(n).indices  # draws would depend on the batches
    try:
        for basis in ("whitened", "natural"):
            learn = basis == "natural"
            one, two, sharded = adapted(basis), adapted(basis), adapted(basis)
            settings = dict(gated=learn, progress=False)
            alone = torch.distributed.is_initialized
            torch.distributed.is_initialized = lambda: False
            try:
                found = calibrate(one, [tokens()], task(tokens()) if learn else None, **settings)
            finally:
                torch.distributed.is_initialized = alone
            fully_sharded(sharded, layers_of(sharded))
            for model in (two, sharded):
                mine = calibrate(
                    model,
                    [share(tokens(), rank)],
                    task(share(tokens(), rank)) if learn else None,
                    **settings,
                )
                assert mine.tokens == found.tokens, (mine, found)
                compare(one, model, basis)
    finally:
        torch.multinomial = first


def compare(one: nn.Module, other: nn.Module, basis: str) -> None:
    expected, found = dict(one.named_buffers()), dict(other.named_buffers())
    if basis == "natural":  # of singular vectors the sign is chance
        sides = [name.removesuffix(".C") for name in found if name.endswith(".C")]
        assert len(sides) == 2 * 3
        for name in sides:
            a, b = (b[f"{name}.C"] @ b[f"{name}.R"] for b in (expected, found))
            assert (a - b).norm() < 1e-3 * b.norm(), (name, (a - b).norm() / b.norm())
            a, b = (b[f"{name}.gate"][:, 0] @ b[f"{name}.R"].float() for b in (expected, found))
            assert (a - b).norm() < 1e-2 * b.norm(), (name, (a - b).norm() / b.norm())
        return
    folds = [name for name in found if "fold" in name or name.endswith("unit")]
    assert len(folds) == 3 * 2 * 3
    for name in folds:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)


CHECKS = [calibrated]
