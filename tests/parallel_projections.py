"""Checks that run in every one of two processes: layers that share an input, under DDP and FSDP."""

from pathlib import Path

import torch
from parallel import (
    check_equal,
    fully_sharded,
    gradients,
    llama,
    loss,
    share,
    tokens,
    with_modules,
    with_peft,
)
from parallel_data import layers_of
from parallel_fsdp1 import named, whole, wrapped
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from secura_kernels import fuse_projections
from secura_kernels.ops import projections

CURLORA = dict(variant="curlora", norm=None, target_modules="all-linear")
KINDS = [(with_modules, {}), (with_peft, {}), (with_peft, CURLORA)]


def fused(build, **settings) -> nn.Module:
    model = build(llama(), **settings)
    assert fuse_projections(model)
    return model


def ddp_projections(rank: int, folder: Path) -> None:
    plain, products = projections._side_by_side, []
    projections._side_by_side = lambda parts: (products.append(len(parts)), plain(parts))[1]
    for build, settings in KINDS:
        one = build(llama(), **settings)
        model = DistributedDataParallel(fused(build, **settings))
        loss(one, tokens()).backward()
        loss(model, share(tokens(), rank)).backward()
        check_equal(gradients(model), gradients(one))
    assert products
    projections._side_by_side = plain


def fsdp_projections(rank: int, folder: Path) -> None:
    """The sharded layers run one by one, also if the model was copied or moved before."""
    for build, settings in KINDS:
        one = build(llama(), **settings)
        model = fused(build, **settings).to(torch.float32).to(torch.float64)
        loss(one.to(torch.float32).to(torch.float64), tokens()).backward()
        fully_sharded(model.train(), layers_of(model))
        for _ in range(2):
            model.zero_grad()
            loss(model, share(tokens(), rank)).backward()
            check_equal(gradients(model), gradients(one))


def fsdp1_projections(rank: int, folder: Path) -> None:
    for build, settings in KINDS:
        one, model = build(llama(), **settings), wrapped(fused(build, **settings))
        loss(one, tokens()).backward()
        loss(model, share(tokens(), rank)).backward()
        with whole(model):
            found = named(model)
            expected = {n: p.grad for n, p in one.named_parameters() if p.requires_grad}
            check_equal({n: found[n].grad for n in expected}, expected)


CHECKS = [ddp_projections, fsdp_projections, fsdp1_projections]
