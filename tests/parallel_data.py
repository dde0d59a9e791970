"""Checks that run in every one of two processes: DDP, FSDP2, transformers' Trainer under both."""

import copy
import os
from pathlib import Path

import torch
from parallel import (
    CURLORA,
    RANKS,
    check_equal,
    full,
    fully_sharded,
    gradients,
    llama,
    loss,
    share,
    tokens,
    with_modules,
    with_peft,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

KINDS = [
    (with_modules, {}),
    (with_modules, dict(norm="figure")),
    (with_modules, dict(basis="orthonormal")),
    (with_peft, {}),
    (with_peft, CURLORA),
    (with_peft, dict(norm_domain="weight")),
    (with_peft, dict(basis="orthonormal")),
]


def layers_of(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.modules() if hasattr(m, "layers")).layers


def ddp(rank: int, folder: Path) -> None:
    for build, settings in KINDS:
        one, model = build(llama(), **settings), DistributedDataParallel(build(llama(), **settings))
        loss(one, tokens()).backward()
        loss(model, share(tokens(), rank)).backward()
        check_equal(gradients(model), gradients(one))


def fsdp(rank: int, folder: Path) -> None:
    for build, settings in KINDS:
        one, model = build(llama(), **settings), build(llama(), **settings)
        loss(one, tokens()).backward()
        for m in model.modules():
            if hasattr(m, "gradient_checkpointing_enable"):
                m.gradient_checkpointing_enable(dict(use_reentrant=False))
                break
        fully_sharded(model.train(), layers_of(model))
        loss(model, share(tokens(), rank)).backward()
        check_equal(gradients(model), gradients(one))


def fsdp_files(rank: int, folder: Path) -> None:
    """A file saved from shards is the one of one process, to the bit."""
    from peft import get_peft_model_state_dict
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    for settings in (dict(), dict(basis="orthonormal"), dict(save_projection=False)):
        expected = get_peft_model_state_dict(with_peft(llama(), **settings))
        model = with_peft(llama(), **settings)
        fully_sharded(model, layers_of(model))
        state = get_model_state_dict(model, options=options)
        gathered = [get_peft_model_state_dict(model)]  # by every rank
        if rank == 0:
            gathered.append(get_peft_model_state_dict(model, state_dict=state))
        for found in gathered:
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(found[name], value), name


def fsdp_bfloat16(rank: int, folder: Path) -> None:
    """Twice the error, against float64, of one process whose parameters are bfloat16 too."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for settings in (dict(), dict(norm_domain="weight"), dict(basis="orthonormal"), CURLORA):
        model = with_peft(llama(torch.float32), **settings)
        for m in model.modules():  # as a file brings them, in the dtype of the parameters
            if settings.get("variant") and hasattr(m, "secura_adapter"):
                m.secura_adapter["default"].untie(m.base_matrix())
        exact, low = copy.deepcopy(model).double(), copy.deepcopy(model).bfloat16()
        fully_sharded(model, layers_of(model), mp_policy=policy)
        for each in (exact, low):
            loss(each, tokens()).backward()
        loss(model, share(tokens(), rank)).backward()
        truth = torch.cat([g.flatten() for g in gradients(exact).values()])
        errors = [
            float(
                (torch.cat([g.double().flatten() for g in gradients(each).values()]) - truth).norm()
                / truth.norm()
            )
            for each in (model, low)
        ]
        assert 0 < errors[0] <= 2 * errors[1], (settings, errors)


def fsdp_importance(rank: int, folder: Path) -> None:
    """The hook that chooses factors outlives the parameters that sharding replaces."""
    model = with_peft(llama(), importance_decay=dict(ratio=0.0, edge=1.999))
    layers = [m for m in model.modules() if hasattr(m, "secura_adapter")]
    model.base_model.model.gradient_checkpointing_enable(dict(use_reentrant=False))
    fully_sharded(model.train(), layers_of(model))
    for _ in range(2):
        before = [m.secura_adapter["default"].importance.factor.clone() for m in layers]
        loss(model, share(tokens(), rank)).backward()
        for layer, factor in zip(layers, before, strict=True):
            importance = layer.secura_adapter["default"].importance
            assert (importance.factor != 1).sum() == importance.chosen
            assert not torch.equal(importance.factor, factor) and not importance.count.any()


def fsdp_refusals(rank: int, folder: Path) -> None:
    model = with_peft(llama())
    fully_sharded(model, layers_of(model))
    refused(
        RuntimeError,
        "add them first",
        lambda: model.add_adapter("second", copy.deepcopy(model.peft_config["default"])),
    )
    refused(RuntimeError, "sharded over ranks", model.merge_adapter)
    assert "second" not in str(model)


def refused(kind: type[Exception], words: str, call) -> None:
    try:
        call()
    except kind as error:
        assert words in str(error), error
        return
    raise AssertionError(f"no {kind.__name__} with {words!r}")


# transformers' Trainer.

STEPS, RATE = 3, 1.0


class Batch(torch.utils.data.Dataset):
    """Every step takes all of it, so that the order does not matter."""

    def __len__(self) -> int:
        return len(tokens())

    def __getitem__(self, i: int) -> dict:
        return dict(input_ids=tokens()[i], labels=tokens()[i])


def trainer_ddp(rank: int, folder: Path) -> None:
    _check_trainer(folder / "ddp")


def trainer_fsdp(rank: int, folder: Path) -> None:
    """As on GPUs: accelerate itself takes FSDP for them only, and DDP on the CPU."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    first = AcceleratorState.__init__

    def on_any_device(self, *args, **kwargs):
        first(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None:
            self.fsdp_plugin, self.distributed_type = kwargs["fsdp_plugin"], DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState._reset_state(True)
    AcceleratorState.__init__, os.environ["ACCELERATE_USE_FSDP"] = on_any_device, "true"
    config = dict(
        fsdp_version=2,
        transformer_layer_cls_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="FULL_STATE_DICT",
    )
    try:
        _check_trainer(folder / "fsdp", fsdp=True, fsdp_config=config)
    finally:
        AcceleratorState.__init__ = first
        os.environ.pop("ACCELERATE_USE_FSDP")
        AcceleratorState._reset_state(True)


def _check_trainer(folder: Path, **settings) -> None:
    """A few steps, and the file saved by rank 0, against plain gradient descent."""
    import transformers
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    transformers.logging.set_verbosity_error()
    one, start = with_peft(llama()), with_peft(llama())
    for _ in range(STEPS):
        one.zero_grad()
        loss(one, tokens()).backward()
        with torch.no_grad():
            for p in one.parameters():
                if p.requires_grad:
                    p -= RATE * p.grad
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=len(tokens()) // RANKS,
        max_steps=STEPS,
        learning_rate=RATE,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **settings,
    )
    trainer = transformers.Trainer(model=with_peft(llama()), args=arguments, train_dataset=Batch())
    trainer.train()
    kind = "FSDP" if settings else "DistributedDataParallel"
    assert type(trainer.model_wrapped).__name__.startswith(kind)
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    before, after = dict(start.named_parameters()), dict(one.named_parameters())
    check_equal(
        {n: full(p.detach()) - before[n] for n, p in trained.items()},
        {n: after[n] - before[n] for n in trained},
    )
    trainer.save_model(str(folder))
    torch.distributed.barrier()
    found, expected = (
        load_file(folder / "adapter_model.safetensors"),
        get_peft_model_state_dict(one),
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("checksum"):  # of other roundings
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)


CHECKS = [
    ddp,
    fsdp,
    fsdp_files,
    fsdp_bfloat16,
    fsdp_importance,
    fsdp_refusals,
    trainer_ddp,
    trainer_fsdp,
]
