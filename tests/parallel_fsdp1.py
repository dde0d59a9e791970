"""Checks that run in every one of two processes: FSDP1, where a layer's parameters are parts of one
flat parameter that requires a gradient as a whole."""

import warnings
from pathlib import Path

import torch
from parallel import CURLORA, check_equal, llama, loss, share, tokens, with_peft
from parallel_data import KINDS, refused
from torch import nn


def wrapped(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    with warnings.catch_warnings():  # that frozen parameters take part takes memory
        warnings.filterwarnings("ignore", ".*has both parameters with requires_grad")
        return FullyShardedDataParallel(
            model,
            use_orig_params=True,
            device_id=torch.device("cpu"),
            auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
        )


def whole(model: nn.Module):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel.summon_full_params(model, with_grads=True)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.replace("_fsdp_wrapped_module.", ""): p for name, p in model.named_parameters()}


def fsdp1(rank: int, folder: Path) -> None:
    """Gradients are those of one process; no step moves what is frozen, even if it is handed every
    parameter."""
    for build, settings in KINDS:
        one, model = build(llama(), **settings), wrapped(build(llama(), **settings))
        loss(one, tokens()).backward()
        loss(model, share(tokens(), rank)).backward()
        trained = {n: p for n, p in one.named_parameters() if p.requires_grad}
        with whole(model):
            found = named(model)
            check_equal(
                {n: found[n].grad for n in trained}, {n: p.grad for n, p in trained.items()}
            )
        torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
        with whole(model):
            for name, parameter in named(model).items():
                before = one.get_parameter(name)
                assert torch.equal(parameter, before) != before.requires_grad, name


def fsdp1_files(rank: int, folder: Path) -> None:
    """A file saved from the gathered state is the one of one process, to the bit."""
    from peft import get_peft_model_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import StateDictType

    for settings in (dict(), dict(save_projection=False), CURLORA | dict(basis="raw")):
        expected = get_peft_model_state_dict(with_peft(llama(), **settings))
        model = wrapped(with_peft(llama(), **settings))
        with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            state = model.state_dict()
        if rank == 0:
            found = get_peft_model_state_dict(model.module, state_dict=state)
            assert found.keys() == expected.keys(), set(found) ^ set(expected)
            for name, value in expected.items():
                assert torch.equal(found[name], value), name


def fsdp1_refusals(rank: int, folder: Path) -> None:
    """Importance decay hooks into a parameter's gradient, which is a part of another one here."""
    model = wrapped(with_peft(llama(), importance_decay=True).train())
    refused(
        RuntimeError,
        "use fully_shard (FSDP2)",
        lambda: loss(model, share(tokens(), rank)).backward(),
    )


CHECKS = [fsdp1, fsdp1_files, fsdp1_refusals]
