"""A check that runs in every one of two processes: DeepSpeed's ZeRO-3 on the CPU."""

import copy
import os
import sys
from pathlib import Path

import torch
from parallel import CURLORA, llama, loss, share, tokens, with_modules, with_peft

STEPS, RATE = 3, 10.0


def zero3(rank: int, folder: Path) -> None:
    """Weights and adapters partitioned, before adapters are added or after: after a few steps twice
    the error, against float64, of one process."""
    os.environ |= dict(DS_ACCELERATOR="cpu", LOCAL_SIZE="2")
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # would be compiled
    deepspeed.init_distributed("gloo")
    config = dict(
        train_micro_batch_size_per_gpu=2,
        zero_allow_untested_optimizer=True,
        zero_optimization=dict(stage=3, stage3_param_persistence_threshold=0),
    )
    for early, build, settings in (
        (False, with_modules, {}),
        (False, with_peft, {}),
        (True, with_peft, {}),
        (True, with_peft, CURLORA),
    ):
        one, base = build(llama(torch.float32), **settings), llama(torch.float32)
        start, exact = copy.deepcopy(one), copy.deepcopy(one).double()
        if early:
            deepspeed.zero.Init(module=base, config_dict_or_path=config)
        model = build(base, **settings)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        assert not any(p.numel() for p in model.parameters())
        for _ in range(STEPS):
            engine.backward(loss(engine, share(tokens(), rank)))
            engine.step()
        for each in (one, exact):
            optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=RATE)
            for _ in range(STEPS):
                optimizer.zero_grad()
                loss(each, tokens()).backward()
                optimizer.step()
        trained = [p for p in model.parameters() if p.requires_grad]
        with deepspeed.zero.GatheredParameters(trained):
            found = _flat(p.detach() for p in trained)
        expected, first, truth = (
            _flat(p.detach() for p in m.parameters() if p.requires_grad)
            for m in (one, start, exact)
        )
        errors = [float((v - truth).norm() / (truth - first).norm()) for v in (found, expected)]
        assert errors[0] <= 2 * errors[1] < 1e-3, (early, build.__name__, settings, errors)


def _flat(values) -> torch.Tensor:
    return torch.cat([v.double().flatten() for v in values])
