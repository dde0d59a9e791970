"""benchmarks/forgetting/strategies: formulas by hand, what each keeps of a task, resumption, and
transformers' Trainer against a plain loop."""

import io

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="the strategies are tested with PEFT's LoRA")
transformers = pytest.importorskip("transformers", reason="StrategyTrainer needs transformers")
from forgetting_models import tiny_language_model  # noqa: E402
from strategies import (  # noqa: E402
    EWC,
    STRATEGIES,
    BaseKL,
    GeneralReplay,
    ILoRA,
    Interpolated,
    Replay,
    Strategy,
    transformers_forward,
)
from strategies.ewc import fisher  # noqa: E402
from strategies.memory import Memory, stack  # noqa: E402
from strategies.trainer import StrategyTrainer  # noqa: E402

from secura_kernels import CURLoRALinear, SECURALinear  # noqa: E402


def regression(model, batch):
    """The forward of a plain module: its mean squared error, and its outputs as features."""
    z = model(batch["x"])
    return (z - batch["y"]).square().mean(), z


MAKE = {
    "sequential": lambda: Strategy(),
    "replay": lambda: Replay(8, 0.5, per_task=True),
    "ewc": lambda: EWC(300.0, forward=regression),
    "ilora": lambda: ILoRA(0.9, budget=8, per_task=True, forward=regression),
}
AROUND = {"interpolated": lambda: Interpolated(Replay(8, 0.5, per_task=True), 0.7)}
EVERY = MAKE | AROUND
each_strategy = pytest.mark.parametrize("name", EVERY)


def lora_model() -> nn.Module:
    """A frozen two-layer float64 network with LoRA on both layers."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2)).double()
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"]))


def two_tasks() -> list[list[dict]]:
    """Two regressions of inputs that overlap in part, whose targets disagree; 4 batches of 4."""
    tasks = []
    for seed, used in ((1, slice(0, 4)), (2, slice(2, 6))):
        torch.manual_seed(seed)
        x = torch.zeros(16, 6, dtype=torch.float64)
        x[:, used] = torch.randn(16, 4, dtype=torch.float64)
        y = torch.tanh(x @ torch.randn(6, 2, dtype=torch.float64))
        tasks.append([dict(x=a, y=b) for a, b in zip(x.split(4), y.split(4), strict=True)])
    return tasks


def steps(model, strategy, optimizer, batches):
    for batch in batches:
        batch = strategy.batch(batch)
        loss, _ = regression(model, batch)
        strategy.loss(model, batch, loss).backward()
        optimizer.step()
        strategy.after_step(model)
        optimizer.zero_grad()


def error(model, batches) -> float:
    with torch.no_grad():
        return float(sum(regression(model, batch)[0] for batch in batches)) / len(batches)


def weights(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def same(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def learned(name) -> tuple[float, float]:
    """The errors on tasks A and B after A and then B were learned."""
    model, strategy, tasks = lora_model(), MAKE[name](), two_tasks()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for batches in tasks:
        strategy.before_task(model)
        steps(model, strategy, optimizer, batches * 30)
        strategy.after_task(model, batches)
    with strategy.evaluation(model):
        return error(model, tasks[0]), error(model, tasks[1])


def test_each_keeps_more_of_the_first_task_than_sequential_training():
    untrained = error(lora_model(), two_tasks()[1])
    forgotten, _ = learned("sequential")
    for name in ("replay", "ewc", "ilora"):
        left, second = learned(name)
        assert left < 0.5 * forgotten, name
        assert second < 0.1 * untrained, name
    assert list(STRATEGIES) == list(MAKE)
    assert all(isinstance(MAKE[name](), STRATEGIES[name]) for name in MAKE)


def one_weight(w=2.0) -> nn.Module:
    """y = w x + 1 with the bias frozen."""
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.fill_(w)
        model.bias.fill_(1)
    model.bias.requires_grad_(False)
    return model


def points(*xy) -> dict:
    x, y = torch.tensor(xy, dtype=torch.float64).T.unsqueeze(-1)
    return dict(x=x, y=y)


def test_fisher_and_penalty_by_hand():
    model = one_weight()
    # Gradients of the rows' losses, 2 (w x + 1 - y) x: 2 · 2 · 1 = 4, 2 · (-2) · 1 = -4,
    # 2 · 1 · 3 = 6. The batch's own gradient of the first two would be 0.
    task = [points((1, 1), (1, 5)), points((3, 6))]
    ewc = EWC(3.0, forward=regression)
    model.weight.grad = torch.full_like(model.weight, 7)
    ewc.after_task(model.train(), task)
    assert model.training and model.weight.grad.item() == 7
    assert ewc.fisher["weight"].item() == pytest.approx((16 + 16 + 36) / 3)
    assert set(ewc.fisher) == {"weight"}
    assert fisher(model, task, 2, regression)["weight"].item() == pytest.approx(16)

    with torch.no_grad():
        model.weight.fill_(2.5)
    loss = ewc.loss(model, task[0], torch.tensor(10.0, dtype=torch.float64))
    assert loss.item() == pytest.approx(10 + 0.5 * 3 * 68 / 3 * 0.25)
    model.weight.grad = None
    loss.backward()
    assert model.weight.grad.item() == pytest.approx(3 * 68 / 3 * 0.5)
    # A second task adds its Fisher, and the centre moves: 2 · (2.5 + 1 - 3) · 1 = 1.
    ewc.after_task(model, [points((1, 3))])
    assert ewc.fisher["weight"].item() == pytest.approx(68 / 3 + 1)
    assert ewc.loss(model, task[0], torch.tensor(10.0)).item() == 10


def test_fisher_of_an_unused_weight_is_zero_and_dropout_is_off():
    model = nn.Sequential(nn.Dropout(0.9), one_weight())
    model.unused = nn.Parameter(torch.ones(3))
    found = fisher(model.train(), [points((1, 1))], 8, regression)
    assert torch.equal(found["unused"], torch.zeros(3)) and found["1.weight"].item() == 16
    assert model[0].training


def rows(first, count) -> list[dict]:
    return [dict(x=torch.arange(first, first + count))]


def kept(memory) -> list[list[int]]:
    return [sorted(int(row["x"]) for row in task) for task in memory.kept]


def test_memory_budgets():
    per_task, shared = Memory(4, True, 0), Memory(4, False, 0)
    for memory in (per_task, shared):
        memory.add_task(rows(0, 3))
        memory.add_task(rows(10, 50))
        memory.add_task(rows(100, 4))
    first, second, third = kept(per_task)
    assert first == [0, 1, 2] and third == [100, 101, 102, 103]
    assert len(set(second)) == 4 and set(second) <= set(range(10, 60))
    assert len(shared) == 4 and len(set(kept(shared)[0])) == 4


def test_memory_is_a_uniform_sample_and_its_seed_repeats_it():
    counts = [0] * 6
    for seed in range(600):
        memory = Memory(2, False, seed)
        memory.add_task(rows(0, 2))  # the two tasks share by their sizes
        memory.add_task(rows(2, 4))
        for x in kept(memory)[0]:
            counts[x] += 1
    assert sum(counts) == 1200
    # 200 each, with a standard deviation of sqrt(600 · 1/3 · 2/3) = 11.5.
    assert all(160 < count < 240 for count in counts), counts

    def drawn(seed):
        memory = Memory(5, False, seed)
        memory.add_task(rows(0, 20))
        return [[int(row["x"]) for row in memory.draw(3)] for _ in range(3)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert all(len(set(draw)) == 3 for draw in drawn(1))


def test_a_kept_row_does_not_keep_its_batch():
    memory = Memory(1, False, 0)
    batch = dict(x=torch.zeros(100, 3))
    memory.add_task([batch])
    batch["x"].fill_(1)
    row = memory.kept[0][0]["x"]
    assert row.untyped_storage().nbytes() == 12 and not row.any()


def test_a_task_that_fails_leaves_the_memory_as_it_was():
    memory = Memory(2, False, 0)
    memory.add_task(rows(0, 2))
    with pytest.raises(ValueError, match="batch='list'"):
        memory.add_task([*rows(10, 50), [1]])
    assert kept(memory) == [[0, 1]] and memory.seen == [2]


def test_replayed_share():
    replay = Replay(6, 0.3)
    batch = rows(0, 4)[0]
    assert replay.batch(batch) is batch  # nothing to replay yet
    replay.after_task(None, rows(100, 6))
    sizes = []
    for _ in range(5):
        mixed = replay.batch(batch)["x"]
        assert mixed[:4].tolist() == [0, 1, 2, 3] and all(mixed[4:] >= 100)
        sizes.append(len(mixed) - 4)
    assert sizes == [1, 1, 1, 1, 2]  # floors of 1.2, 2.4, 3.6, 4.8, 6
    full = Replay(2, 5.0)
    full.after_task(None, rows(100, 6))
    assert len(full.batch(batch)["x"]) == 6  # no row twice


def test_rows_of_different_lengths_are_padded():
    short = dict(
        input_ids=torch.tensor([5, 6]),
        attention_mask=torch.tensor([1, 1]),
        labels=torch.tensor([5, 6]),
    )
    long = {name: torch.tensor([7, 7, 7]) for name in short}
    batch = stack([short, long], torch.device("cpu"))
    assert {name: value[0].tolist() for name, value in batch.items()} == dict(
        input_ids=[5, 6, 0], attention_mask=[1, 1, 0], labels=[5, 6, -100]
    )


def test_ilora_by_hand():
    model = one_weight(2.0)
    ilora = ILoRA(0.75, weight=0.5, budget=1, forward=regression)
    ilora.before_task(model)
    ilora.after_task(model, [points((3, 10))])
    with torch.no_grad():
        model.weight.fill_(4.0)
    ilora.after_step(model)
    assert ilora.slow["weight"].item() == 0.75 * 2 + 0.25 * 4
    # Replayed: fast 13, slow 8.5, target 10: (loss + 3²) / 2 + 0.5 · 4.5².
    batch = points((1, 2), (1, 2))
    loss = ilora.loss(model, batch, regression(model, batch)[0])
    assert loss.item() == pytest.approx((9 + 9) / 2 + 0.5 * 4.5**2)
    loss.backward()
    # d/dw: (2 · 3 · 1 + 2 · 3 · 3) / 2 + 0.5 · 2 · 4.5 · 3, the slow weights constant.
    assert model.weight.grad.item() == pytest.approx(12 + 13.5)
    ilora.before_task(model)  # of the next task: the long-term memory goes on
    assert ilora.slow["weight"].item() == 2.5


def test_ilora_evaluates_its_slow_weights_and_restores_the_fast_ones():
    model = lora_model().to(torch.bfloat16)
    ilora = ILoRA(0.99, forward=regression)
    fast = weights(model)
    with ilora.evaluation(model):
        assert same(weights(model), fast)
    ilora.before_task(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    for _ in range(3):
        ilora.after_step(model)
    fast = weights(model)
    slow = [value.to(torch.bfloat16) for value in ilora.slow.values()]
    assert not same(fast, slow) and all(v.dtype == torch.float32 for v in ilora.slow.values())
    with pytest.raises(KeyError), ilora.evaluation(model):
        assert same(weights(model), slow)
        raise KeyError
    assert same(weights(model), fast)


def test_interpolation_goes_back_to_where_the_task_began():
    """What the other strategy does meanwhile is its own."""
    model, tasks, replay = lora_model(), two_tasks(), Replay(8, 0.5, per_task=True)
    strategy = Interpolated(replay, 0.25)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for batches in tasks:
        before = weights(model)
        strategy.before_task(model)
        steps(model, strategy, optimizer, batches)
        reached = weights(model)
        strategy.after_task(model, batches)
        for p, q, left in zip(before, reached, weights(model), strict=True):
            torch.testing.assert_close(left, 0.75 * p + 0.25 * q)
        assert not same(reached, before)
    assert len(replay.memory) and len(strategy.batch(tasks[0][0])["x"]) > 4


def test_strategies_train_this_packages_layers():
    torch.manual_seed(0)
    model = nn.Sequential(
        CURLoRALinear.from_linear(nn.Linear(6, 12), r=3),
        nn.Tanh(),
        SECURALinear.from_linear(nn.Linear(12, 2), r=2, m=4, norm="calibrated"),
    )
    tasks = [[{k: v.float() for k, v in batch.items()} for batch in task] for task in two_tasks()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ewc, ilora = EWC(1.0, forward=regression), ILoRA(0.9, forward=regression)
    ilora.before_task(model)
    steps(model, ilora, optimizer, tasks[0])
    for strategy in (ewc, ilora):
        strategy.after_task(model, tasks[0])
    assert set(ewc.fisher) == set(ilora.slow) == {"0.U", "2.A", "2.B", "2.adapter_bias"}
    z_fast = model(tasks[0][0]["x"])
    with ilora.evaluation(model):
        z_slow = model(tasks[0][0]["x"])
    assert not torch.equal(z_fast, z_slow)
    # One kept row, as it is drawn: the features of the slow weights without writing them.
    ilora.memory = Memory(1, False, 0)
    ilora.memory.add_task([{k: v[:1] for k, v in tasks[0][0].items()}])
    found = ilora.loss(model, tasks[0][0], torch.tensor(0.0)).item()
    replayed = error(model, [{k: v[:1] for k, v in tasks[0][0].items()}])
    assert found == pytest.approx(replayed / 2 + (z_fast - z_slow)[0].square().mean().item())


@each_strategy
def test_resumed_equals_uninterrupted(name):
    def run(interrupted):
        model, strategy, tasks = lora_model(), EVERY[name](), two_tasks()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        strategy.before_task(model)
        steps(model, strategy, optimizer, tasks[0])
        strategy.after_task(model, tasks[0])
        strategy.before_task(model)
        steps(model, strategy, optimizer, tasks[1][:3])
        if interrupted:
            file = io.BytesIO()
            torch.save((model.state_dict(), optimizer.state_dict(), strategy.state_dict()), file)
            steps(model, strategy, optimizer, tasks[1])  # must not reach the snapshot
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            model, strategy = lora_model(), EVERY[name]()
            model.load_state_dict(saved[0])
            optimizer = torch.optim.Adam(
                [p for p in model.parameters() if p.requires_grad], lr=0.02
            )
            optimizer.load_state_dict(saved[1])
            strategy.before_task(model)
            strategy.load_state_dict(model, saved[2])
        steps(model, strategy, optimizer, tasks[1][3:] + tasks[1])
        strategy.after_task(model, tasks[1])
        with strategy.evaluation(model):
            return weights(model), strategy.state_dict()

    (one, state), (other, restored) = run(False), run(True)
    assert same(one, other)
    torch.testing.assert_close(state, restored, rtol=0, atol=0)


@each_strategy
def test_a_snapshot_is_not_changed_by_training(name):
    model, strategy, tasks = lora_model(), EVERY[name](), two_tasks()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    strategy.before_task(model)
    strategy.after_task(model, tasks[0])
    taken = strategy.state_dict()
    file = io.BytesIO()
    torch.save(taken, file)
    loaded = EVERY[name]()
    loaded.load_state_dict(model, taken)
    for used in (strategy, loaded):
        steps(model, used, optimizer, tasks[1])
        used.after_task(model, tasks[1])
        file.seek(0)
        torch.testing.assert_close(taken, torch.load(file, weights_only=True), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Replay(0), "budget=0"),
        (lambda: Replay(True), "budget=True"),
        (lambda: Replay(8, 0), "ratio=0"),
        (lambda: Replay(8, per_task=1), "per_task=1"),
        (lambda: Replay(8, seed=-1), "seed=-1"),
        (lambda: EWC(-1.0), r"lam=-1\.0"),
        (lambda: EWC(float("nan")), "lam=nan"),
        (lambda: EWC(1.0, samples=0), "samples=0"),
        (lambda: ILoRA(1.5), r"ema=1\.5"),
        (lambda: ILoRA(0.9, -1), "weight=-1"),
        (lambda: Interpolated(Strategy(), 1.2), r"part=1\.2"),
        (lambda: ILoRA().after_step(lora_model()), "given to before_task"),
        (lambda: ILoRA().before_task(nn.ReLU()), "parameters that require gradients"),
        (lambda: Replay().after_task(None, []), "batches='an empty iterable'"),
        (lambda: EWC(1.0).after_task(lora_model(), []), "batches='an empty iterable'"),
        (lambda: Replay().after_task(None, [[1, 2]]), "batch='list'"),
        (
            lambda: Replay().after_task(None, [dict(x=torch.ones(2), y=torch.ones(3))]),
            "batch={'x': 2, 'y': 3}",
        ),
        (
            lambda: stack([dict(x=torch.ones(1)), dict(z=torch.ones(1))], torch.device("cpu")),
            r"batch=\['x'\]",
        ),
        (
            lambda: EWC(1.0, forward=regression).after_task(
                one_weight(), [points((1, float("nan")))]
            ),
            "row 1 of loss nan",
        ),
        (
            lambda: Strategy().load_state_dict(lora_model(), Replay().state_dict()),
            r"state=\['memory', 'rows'\]",
        ),
    ],
)
def test_bad_arguments(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def next_task(strategy, model, batches):
    strategy.before_task(model)
    strategy.after_task(model, batches)


@pytest.mark.parametrize("name", ["ewc", "ilora"])
def test_another_model_is_refused_and_changes_nothing(name):
    strategy, model = MAKE[name](), one_weight()
    next_task(strategy, model, [points((1, 1))])
    state, fresh = strategy.state_dict(), MAKE[name]()
    for call in (
        lambda: fresh.load_state_dict(lora_model(), state),
        lambda: strategy.loss(lora_model(), two_tasks()[0][0], torch.tensor(0.0)),
        lambda: next_task(strategy, lora_model(), two_tasks()[0]),
    ):
        with pytest.raises(ValueError, match=r"model=.*lora_A.*the one the strategy"):
            call()
    torch.testing.assert_close(fresh.state_dict(), MAKE[name]().state_dict())
    torch.testing.assert_close(strategy.state_dict(), state, rtol=0, atol=0)


MAKE_LM = {
    "sequential": lambda: Strategy(),
    "replay": lambda: Replay(8, 0.5),
    "ewc": lambda: EWC(100.0, samples=4),
    "ilora": lambda: ILoRA(0.9, budget=8),
}


def language_model() -> nn.Module:
    """A random two-layer Llama with LoRA whose B is not zero, so that all weights get gradients."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
    )
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )


def sentences(seed, count=10) -> list[dict]:
    """Rows of 8 tokens with 2 to 8 labels, so that micro-batches differ in their tokens."""
    torch.manual_seed(seed)
    ids = torch.randint(32, (count, 8))
    labels = ids.clone()
    for i in range(count):
        labels[i, : i % 7] = -100
    return [
        dict(input_ids=a, attention_mask=torch.ones_like(a), labels=b)
        for a, b in zip(ids, labels, strict=True)
    ]


def batched(samples) -> list[dict]:
    return [stack(samples[i : i + 2], torch.device("cpu")) for i in range(0, len(samples), 2)]


def sgd(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def trainer_of(model, strategy, samples, folder, **settings):
    settings = (
        dict(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            train_sampling_strategy="sequential",
            max_grad_norm=0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        | settings
    )
    return StrategyTrainer(
        model=model,
        args=transformers.TrainingArguments(**settings),
        train_dataset=samples,
        eval_dataset=samples,
        optimizers=sgd(model),
        strategy=strategy,
    )


def plain_task(model, strategy, batches):
    """Two epochs of 5 micro-batches, two to a step: the last step of an epoch has one."""
    optimizer, _ = sgd(model)
    model.train()
    for _ in range(2):
        for group in (batches[0:2], batches[2:4], batches[4:]):
            for batch in group:
                batch = strategy.batch(batch)
                loss, _ = transformers_forward(model, batch)
                (strategy.loss(model, batch, loss) / len(group)).backward()
            optimizer.step()
            strategy.after_step(model)
            optimizer.zero_grad()


@pytest.mark.parametrize("name", MAKE_LM)
def test_trainer_is_the_plain_loop(name, tmp_path):
    model, strategy = language_model(), MAKE_LM[name]()
    other, plain = language_model(), MAKE_LM[name]()
    for seed in (1, 2):
        samples = sentences(seed)
        strategy.before_task(model)
        trainer = trainer_of(model, strategy, samples, tmp_path)
        trainer.train()
        strategy.after_task(model, trainer.get_train_dataloader())
        plain.before_task(other)
        plain_task(other, plain, batched(samples))
        plain.after_task(other, batched(samples))
    torch.testing.assert_close(weights(model), weights(other))
    torch.testing.assert_close(strategy.state_dict(), plain.state_dict())

    before = strategy.state_dict()
    measured = trainer.evaluate()["eval_loss"]
    other.eval()
    with plain.evaluation(other), torch.no_grad():
        expected = transformers_forward(other, stack(samples[:8], torch.device("cpu")))[0]
        rest = transformers_forward(other, stack(samples[8:], torch.device("cpu")))[0]
    assert measured == pytest.approx((8 * expected.item() + 2 * rest.item()) / 10, rel=1e-5)
    torch.testing.assert_close(strategy.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["replay", "ilora"])
def test_trainer_resumes_a_checkpoint_bit_for_bit(name, tmp_path):
    def begun():
        model, strategy = language_model(), MAKE_LM[name]()
        strategy.before_task(model)
        strategy.after_task(model, batched(sentences(1)))
        strategy.before_task(model)
        return model, strategy

    model, strategy = begun()
    trainer_of(model, strategy, sentences(2), tmp_path, save_strategy="steps", save_steps=4).train()
    other, resumed = begun()
    resumed.memory.draw(3)  # what the checkpoint must undo
    trainer = trainer_of(other, resumed, sentences(2), tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 6
    assert same(weights(model), weights(other))
    torch.testing.assert_close(strategy.state_dict(), resumed.state_dict(), rtol=0, atol=0)

    (tmp_path / "checkpoint-4/strategy.pt").unlink()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=.*strategy\.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_trainer_refuses_what_it_cannot_train(tmp_path):
    with pytest.raises(ValueError, match="strategy='ewc'"):
        trainer_of(language_model(), "ewc", sentences(1), tmp_path)
    with pytest.raises(ValueError, match=r"compute_loss_func=.*None with a strategy"):
        StrategyTrainer(
            model=language_model(),
            args=transformers.TrainingArguments(
                output_dir=str(tmp_path), use_cpu=True, report_to="none"
            ),
            compute_loss_func=lambda *_, **__: 0,
            strategy=Strategy(),
        )


def test_hidden_states_leave_out_padding():
    model = language_model().eval()
    row = sentences(1)[0]
    padded = {
        name: nn.functional.pad(value, (0, 3), value=-100 if name == "labels" else 0)
        for name, value in row.items()
    }
    cpu = torch.device("cpu")
    loss, states = transformers_forward(model, stack([row], cpu))
    other, more = transformers_forward(model, stack([padded], cpu))
    assert [state.shape for state in more] == [(8, 16)] * 3
    torch.testing.assert_close((loss, *states), (other, *more))
    with pytest.raises(ValueError, match=r"forward='transformers_forward'.*no loss"):
        transformers_forward(model, dict(input_ids=row["input_ids"][None]))


def speaking(seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A tiny language model, rows of general text, and what it says of them."""
    model = tiny_language_model()
    ids = torch.randint(3, 40, (10, 8), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model, ids, model(input_ids=ids).logits.float().log_softmax(-1)


def test_base_kl_is_the_divergence_from_the_base_on_drawn_rows():
    model, ids, logs = speaking()
    strategy = BaseKL(ids, logs, weight=2.0, rows=3)
    loss = torch.tensor(1.0, requires_grad=True)
    assert float(strategy.loss(model, {}, loss)) == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.3)
    kept = strategy.state_dict()
    found = [float(strategy.loss(model, {}, loss)) for _ in range(3)]
    again = BaseKL(ids, logs, weight=2.0, rows=3, seed=5)
    again.load_state_dict(model, kept)
    assert found == [float(again.loss(model, {}, loss)) for _ in range(3)]
    assert len(set(found)) == 3  # other rows each time
    whole = BaseKL(ids, logs, rows=10)
    moved = model(input_ids=ids).logits.float().log_softmax(-1)
    expected = (logs.exp() * (logs - moved)).sum(-1).mean()
    assert float(whole.loss(model, {}, loss)) - 1 == pytest.approx(float(expected), rel=1e-4)
    whole.loss(model, {}, loss).backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.any()
    with pytest.raises(ValueError, match="rows=11 is not allowed"):
        BaseKL(ids, logs, rows=11)


def test_general_replay_appends_general_rows_and_keeps_no_task():
    _, ids, _ = speaking()
    strategy = GeneralReplay(ids)
    task = torch.full((4, 8), 39)
    batch = strategy.batch(dict(input_ids=task, labels=task))
    assert torch.equal(batch["input_ids"][:4], task) and len(batch["input_ids"]) == 8
    general = {tuple(row) for row in ids.tolist()}
    assert {tuple(row) for row in batch["input_ids"][4:].tolist()} <= general
    assert torch.equal(batch["labels"], batch["input_ids"])
    strategy.after_task(None, [dict(input_ids=task, labels=task)])
    assert len(strategy.memory) == 10
