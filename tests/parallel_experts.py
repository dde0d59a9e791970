"""Checks that run in every one of two processes: stacked experts under DDP and FSDP2."""

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from parallel import check_equal, fully_sharded, gradients, loss, share, tokens
from parallel_data import layers_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

FORMS = [dict(), dict(variant="secura"), dict(norm="calibrated"), dict(basis="raw", alpha=0.5)]


class Block(nn.Module):
    """Experts and a router, in float64 throughout, which transformers' own routers are not."""

    def __init__(self, config):
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        super().__init__()
        self.router = nn.Linear(config.hidden_size, config.num_experts)
        self.experts = Qwen3MoeExperts(config)

    def forward(self, x):
        x = F.layer_norm(x, x.shape[-1:])
        shares, chosen = self.router(x).softmax(-1).topk(2)
        return x + self.experts(x, chosen, shares)


class Mixture(nn.Module):
    def __init__(self):
        from transformers import Qwen3MoeConfig

        super().__init__()
        config = Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=16, num_experts=4)
        config._experts_implementation = "eager"
        self.embeddings, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.layers = nn.ModuleList([Block(config) for _ in range(2)])
        generator = torch.Generator().manual_seed(0)
        self.double()
        for parameter in self.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.2 * noise)

    def forward(self, input_ids, labels=None):
        x = self.embeddings(input_ids).flatten(0, 1)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x).view(*input_ids.shape, -1)
        value = None
        if labels is not None:
            value = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=value, logits=logits)


def adapted(moved: bool = True, **settings) -> nn.Module:
    from peft import get_peft_model

    from secura_kernels.peft import SecuraConfig

    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = SecuraConfig(r=4, target_modules=[], target_parameters=names, **settings)
    model = get_peft_model(Mixture(), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters() if moved else ():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.2 * noise.to(parameter.dtype)
    return model


def experts(rank: int, folder: Path) -> None:
    """Gradients of two processes, with whole weights and with shards, are those of one."""
    for settings in FORMS:
        one, sharded = adapted(**settings), adapted(**settings)
        whole = DistributedDataParallel(adapted(**settings))
        fully_sharded(sharded, layers_of(sharded))
        loss(one, tokens()).backward()
        for model in (whole, sharded):
            loss(model, share(tokens(), rank)).backward()
            check_equal(gradients(model), gradients(one))


def experts_files(rank: int, folder: Path) -> None:
    """A file saved from shards is the one of one process, to the bit."""
    from peft import get_peft_model_state_dict

    for settings in FORMS:
        expected = get_peft_model_state_dict(adapted(**settings))
        model = adapted(**settings)
        fully_sharded(model, layers_of(model))
        found = get_peft_model_state_dict(model)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def experts_calibrated(rank: int, folder: Path) -> None:
    """Half of the text in each process gives the moments of all of it."""
    from secura_kernels import calibrate

    first, alone = torch.multinomial, torch.distributed.is_initialized
    torch.multinomial = lambda p, n, **_: p.topk(n).indices  # draws would depend on the batches
    one, two = (adapted(moved=False, basis="whitened") for _ in range(2))
    try:
        torch.distributed.is_initialized = lambda: False
        found = calibrate(one, [tokens()], progress=False)
        torch.distributed.is_initialized = alone
        mine = calibrate(two, [share(tokens(), rank)], progress=False)
    finally:
        torch.multinomial, torch.distributed.is_initialized = first, alone
    assert mine.tokens == found.tokens and mine.left_out == found.left_out
    others = dict(two.named_buffers())
    folds = {name: b for name, b in one.named_buffers() if "fold" in name or name.endswith("unit")}
    assert len(folds) == 2 * 2 * 3
    for name, value in folds.items():
        torch.testing.assert_close(others[name], value, rtol=1e-9, atol=1e-9, equal_nan=True)


CHECKS = [experts, experts_files, experts_calibrated]
