"""Checks that run in every one of two processes: DTensor operands, and PEFT layers over bases that
tensor parallelism has sharded."""

import functools
from pathlib import Path

import torch
import torch.distributed as dist
from parallel import CURLORA, RANKS, check_equal, full, gradients, llama, loss, tokens, with_peft
from parallel_data import refused
from torch import Tensor, nn

from secura_kernels import SMagNorm, cur_linear
from secura_kernels.functional.epilogue import cur_epilogue

NORMS = [
    None,
    SMagNorm(),
    SMagNorm(detach_gate=False),
    SMagNorm(ref="max"),
    SMagNorm(ref="max", detach_gate=False),
]


@functools.cache
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (RANKS,))


# The ops.


def _random(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


def rules_linear(rank: int, folder: Path) -> None:
    """Every way of sharding gives what whole operands give; the expected ones stay sharded."""
    from torch.distributed.tensor import Shard

    N, K, r = 10, 7, 3  # K is not even
    x, W, bias, core, adapter_bias, dy = _random((2, 3, K), (N, K), (N,), (r, r), (N,), (2, 3, N))
    cols, rows = torch.tensor([1, 4, 6]), torch.tensor([0, 6, 9])
    ways = {
        "tokens": dict(x=Shard(0)),
        "inputs": dict(x=Shard(2), weight=Shard(1), R=Shard(1)),
        "columns": dict(weight=Shard(0), bias=Shard(0), C=Shard(0), adapter_bias=Shard(0)),
        "whole": {},
    }
    for norm in NORMS:
        for sides in (dict(C=W[:, cols], R=W[rows]), dict(cols=cols, rows=rows)):
            for biases in (dict(bias=bias, adapter_bias=adapter_bias), {}):
                operands = dict(x=x, weight=W, core=core) | sides | biases
                for name, way in ways.items():
                    lies = _check_sharded(
                        functools.partial(cur_linear, norm=norm),
                        operands,
                        dy,
                        way,
                        trained=("x", "core", "adapter_bias"),
                    )
                    local = norm is None or norm.ref != "max"
                    if name == "tokens" and local:
                        assert lies == Shard(0)
                    if name == "columns" and local and "C" in sides:
                        assert lies == Shard(2)
                    if name == "inputs" and norm is not None:
                        assert not lies.is_partial()


def rules_inputs(rank: int, folder: Path) -> None:
    """Row parallel: y is a sum over ranks, without a gate or biases only."""
    from torch.distributed.tensor import Shard

    x, W, core, bias, dy = _random((6, 8), (10, 8), (3, 3), (10,), (6, 10))
    operands = dict(x=x, weight=W, core=core, C=W[:, :3].contiguous(), R=W[:3].contiguous())
    way = dict(x=Shard(1), weight=Shard(1), R=Shard(1))
    check = functools.partial(_check_sharded, dy=dy, way=way, trained=("x", "core"))
    for _ in range(2):  # what was decided for one call must not be taken for another
        assert check(cur_linear, operands).is_partial()
        assert not check(cur_linear, operands | dict(bias=bias)).is_partial()
        assert not check(functools.partial(cur_linear, norm=SMagNorm()), operands).is_partial()


def rules_update(rank: int, folder: Path) -> None:
    from torch.distributed.tensor import Partial, Shard

    y0, t, core, C, adapter_bias, dy = _random((6, 10), (6, 3), (3, 3), (10, 3), (10,), (6, 10))
    ways = [
        (dict(y0=Shard(0), t=Shard(0)), Shard(0)),
        ({}, None),
        (dict(y0=Shard(1), C=Shard(0), adapter_bias=Shard(0)), Shard(1)),
        (dict(y0=Partial(), t=Partial()), Partial()),
    ]
    for norm in NORMS:
        for biases in ({}, dict(adapter_bias=adapter_bias)):
            operands = dict(y0=y0, t=t, core=core, C=C) | biases
            for way, expected in ways:
                lies = _check_sharded(
                    functools.partial(cur_epilogue, norm=norm),
                    operands,
                    dy,
                    way,
                    trained=("y0", "t", "core", "adapter_bias"),
                )
                if (
                    expected is not None
                    and (norm is None or norm.ref != "max")
                    and (not expected.is_partial() or (norm is None and not biases))
                ):
                    assert lies == expected, (norm, way, lies)


def _check_sharded(
    function, operands: dict[str, Tensor], dy: Tensor, way: dict, trained: tuple[str, ...]
):
    """Output and gradients with operands sharded as ``way`` says; returns how y lies."""
    from torch.distributed.tensor import Replicate

    def outcome(operands, dy):
        operands = {k: v.detach().requires_grad_(k in trained) for k, v in operands.items()}
        y = function(**operands)
        lies = y.placements[0] if hasattr(y, "placements") else None
        if lies is not None:
            y = y.redistribute(placements=[Replicate()])
        wanted = [k for k in trained if k in operands]
        found = torch.autograd.grad(y, [operands[k] for k in wanted], dy)
        values = zip(["y", *wanted], [y.detach(), *found], strict=True)
        return {k: full(v) for k, v in values}, lies

    expected, _ = outcome(operands, dy)
    sharded = {k: _placed(v, way.get(k)) for k, v in operands.items()}
    found, lies = outcome(sharded, _placed(dy, None))
    check_equal(found, expected)
    return lies


def _placed(value: Tensor, placement):
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    if placement is not None and placement.is_partial():
        return DTensor.from_local(value * (1 + dist.get_rank()) / 3, mesh(), [placement])
    return distribute_tensor(value, mesh(), [placement or Replicate()])


# PEFT layers.


def _mlp(hidden: int) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(10, hidden), nn.GELU(), nn.Linear(hidden, 10), nn.Linear(10, 6, bias=False)
    ).double()


def _plans() -> dict[str, tuple[int, dict]]:
    """The hidden width (uneven where torch takes it), and how layers are parallelised."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    gathered = ColwiseParallel(output_layouts=Replicate())
    return {
        "local": (14, {"0": ColwiseParallel(), "2": RowwiseParallel()}),
        "dtensor": (
            13,
            {
                "0": ColwiseParallel(use_local_output=False),
                "2": RowwiseParallel(use_local_output=False),
                "3": gathered,
            },
        ),
        "whole outputs": (
            13,
            {"0": gathered, "3": gathered, "2": RowwiseParallel(input_layouts=Replicate())},
        ),
    }


def tp_torch(rank: int, folder: Path) -> None:
    """Bases parallelised before adapters are added, and after."""
    from torch.distributed.tensor.parallel import parallelize_module

    (x,) = _random((2, 5, 10))
    for settings in (
        dict(),
        CURLORA,
        dict(basis="orthonormal"),
        dict(norm=dict(detach_gate=False)),
        dict(norm="published"),
    ):
        settings = dict(r=3, target_modules=["0", "2", "3"]) | settings
        for name, (hidden, plan) in _plans().items():
            expected = _outcome(with_peft(_mlp(hidden), **settings), x)
            base = parallelize_module(_mlp(hidden), mesh(), plan)
            before = with_peft(base, **settings)
            after = with_peft(_mlp(hidden), **settings)
            parallelize_module(
                after.base_model.model, mesh(), {f"{k}.base_layer": v for k, v in plan.items()}
            )
            for model in (before, after):
                try:
                    check_equal(_outcome(model, x), expected)
                except AssertionError as error:
                    raise AssertionError(f"{settings}, {name}: {error}") from error


def tp_stages(rank: int, folder: Path) -> None:
    """An earlier stage's core counts too, gated or not."""
    from torch.distributed.tensor.parallel import parallelize_module

    (x,) = _random((2, 5, 10))
    hidden, plan = _plans()["local"]
    for norm in (None, "calibrated"):
        outcomes = []
        for base in (_mlp(hidden), parallelize_module(_mlp(hidden), mesh(), plan)):
            model = with_peft(base, r=3, target_modules=["0", "2"], norm=norm)
            for layer in (m for m in model.modules() if hasattr(m, "stage_m2")):
                layer.stage_m2()
                with torch.no_grad():
                    layer.secura_adapter["default"].B.fill_(0.1)
            outcomes.append(_outcome(model, x))
        check_equal(outcomes[1], outcomes[0])


def tp_task_gate(rank: int, folder: Path) -> None:
    """Every rank gates the whole of t, whichever side of W is sharded."""
    from torch.distributed.tensor.parallel import parallelize_module

    x, gate = _random((2, 5, 10), (3, 2))
    for name, (hidden, plan) in _plans().items():
        outcomes = []
        for base in (_mlp(hidden), parallelize_module(_mlp(hidden), mesh(), plan)):
            model = with_peft(
                base, **CURLORA | dict(r=3, basis="raw", target_modules=["0", "2", "3"])
            )
            for layer in (m for m in model.modules() if hasattr(m, "secura_adapter")):
                layer.secura_adapter["default"].gate = gate.clone()
            outcomes.append(_outcome(model, x))
        try:
            check_equal(outcomes[1], outcomes[0])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def _outcome(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = full(model(x))
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | gradients(model)


def tp_transformers(rank: int, folder: Path) -> None:
    """A Llama loaded with its own plan: loss, gradients, inference and the adapter's file."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import LlamaForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    if rank == 0:
        llama().save_pretrained(folder / "llama")
    dist.barrier()
    load = functools.partial(
        LlamaForCausalLM.from_pretrained,
        folder / "llama",
        dtype=torch.float64,
        attn_implementation="eager",
    )
    for settings in (dict(), CURLORA | dict(basis="orthonormal")):
        one = with_peft(load(), **settings)
        model = with_peft(load(distributed_config=DistributedConfig(tp_plan="auto")), **settings)
        for each in (one, model):
            each.value = loss(each, tokens())
            each.value.backward()
        check_equal({"loss": model.value.detach()}, {"loss": one.value.detach()})
        check_equal(gradients(model), gradients(one))
        with torch.no_grad():
            check_equal({"y": model(tokens()).logits}, {"y": one(tokens()).logits})
        found, expected = get_peft_model_state_dict(model), get_peft_model_state_dict(one)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        trained = ("A", "B", "U", "adapter_bias")
        set_peft_model_state_dict(
            model,
            {
                k: 2 * v if k.rsplit(".", 1)[1] in trained else v
                for k, v in expected.items()
                if not k.endswith("checksum")
            },
        )  # of the former values
        with torch.no_grad():
            assert not torch.allclose(loss(model, tokens()), one.value)
        refused(RuntimeError, "sharded over ranks", model.merge_adapter)


def tp_refusals(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    (x,) = _random((2, 4, 10))

    def attempt(plan=None, x=x, names=None, **settings):
        base = parallelize_module(_mlp(14), mesh(), {"0": plan or ColwiseParallel()})
        model = with_peft(base, r=3, target_modules=["0"], **settings)
        model.add_adapter("other", model.peft_config["default"])
        layer = model.base_model.model[0].eval()
        return layer(x) if names is None else layer(x, adapter_names=names)

    refused(ValueError, "norm_domain='weight'", lambda: attempt(norm_domain="weight"))
    refused(ValueError, "importance decay", lambda: attempt(importance_decay=True))
    refused(ValueError, "ref='max'", lambda: attempt(norm=dict(ref="max")))
    refused(
        ValueError,
        "other tokens",
        lambda: attempt(ColwiseParallel(input_layouts=Shard(1)), x.chunk(RANKS, 1)[rank]),
    )
    refused(ValueError, "adapter_names", lambda: attempt(names=["default", "other"]))
    attempt(names=["default"] * 2)

    model = with_peft(_mlp(14), r=3, target_modules=["0"])
    layer, two = model.base_model.model[0], init_device_mesh("cpu", (RANKS, 1))
    layer.base_layer.weight = nn.Parameter(
        distribute_tensor(layer.base_layer.weight.detach(), two, [Shard(0), Shard(1)]),
        requires_grad=False,
    )
    refused(ValueError, "one dimension", lambda: layer._ready("default"))


CHECKS = [
    rules_linear,
    rules_inputs,
    rules_update,
    tp_torch,
    tp_stages,
    tp_task_gate,
    tp_transformers,
    tp_refusals,
]
