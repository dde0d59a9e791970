"""The callbacks in transformers' Trainer: what is logged, what stops training, stages."""

import logging
import math

import pytest

from secura_kernels import CURLoRALinear, SECURALinear
from secura_kernels.train.drift import drift
from secura_kernels.train.retention import base_loss

pytest.importorskip("transformers", reason="the callbacks are transformers'")
pytest.importorskip("tensorboard", reason="the callbacks' logs are read from its files")
from retention_models import DATA, HELD_OUT, llama
from transformers import Trainer, TrainerCallback, TrainingArguments

from secura_kernels.train.callbacks import RetentionCallback, StageCallback


def adapted(kind=CURLoRALinear, **settings):
    model = llama().requires_grad_(False)
    for name, linear in list(model.named_modules()):
        if name.endswith(("q_proj", "v_proj")):
            model.set_submodule(name, kind.from_linear(linear, 4, selection="highest", **settings))
    return model


def trainer_of(model, folder, *callbacks, eval_dataset=None, **settings):
    settings = dict(max_steps=5, logging_steps=2, save_strategy="no") | settings
    return Trainer(
        model,
        TrainingArguments(
            str(folder),
            use_cpu=True,
            report_to=["tensorboard"],
            disable_tqdm=True,
            seed=0,
            learning_rate=0.05,
            per_device_train_batch_size=2,
            **settings,
        ),
        train_dataset=DATA,
        eval_dataset=eval_dataset,
        callbacks=list(callbacks),
    )


def curve(history, name):
    return {logs["step"]: logs[name] for logs in history if name in logs}


def test_retention_logs_to_the_history_and_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = adapted(SECURALinear, norm="calibrated")
    start = base_loss(model, HELD_OUT)
    trainer = trainer_of(model, tmp_path, max_grad_norm=0.01)
    callback = RetentionCallback(iter(HELD_OUT), every=2).attach(trainer)
    trainer.train()
    history = trainer.state.log_history
    names = ["drift_mean", "drift_max", "spectral", "singular_values", "base_loss", "forgetting"]
    for name in names:
        assert list(curve(history, f"retention/{name}")) == [0, 2, 4, 5], name
    # Clipped, and taken before the optimiser's step ended with zeroed gradients.
    assert curve(history, "retention/gradient_norm") == pytest.approx(
        dict.fromkeys([2, 4, 5], 0.01), rel=1e-3
    )
    assert list(curve(history, "loss")) == [2, 4]  # the Trainer's own records stay

    layers = drift(model).values()
    last = {name: curve(history, f"retention/{name}")[5] for name in names}
    assert last["drift_mean"] == pytest.approx(sum(x.relative for x in layers) / 4)
    assert last["drift_max"] == max(x.relative for x in layers) > last["drift_mean"]
    assert last["spectral"] == pytest.approx(sum(x.spectral for x in layers) / 4)
    assert last["singular_values"] == pytest.approx(sum(x.nuclear for x in layers) / 4)
    assert last["base_loss"] == base_loss(model, HELD_OUT) != start
    assert last["forgetting"] == last["base_loss"] - start
    assert curve(history, "retention/base_loss")[0] == start
    assert model.training and callback.stopped is None

    files = list(tmp_path.rglob("events.out.tfevents.*"))
    events = EventAccumulator(str(files[0])).Reload()
    for name in names:
        scalars = {e.step: e.value for e in events.Scalars(f"train/retention/{name}")}
        assert scalars == pytest.approx(curve(history, f"retention/{name}"), rel=1e-6)


@pytest.mark.parametrize(
    "limit, name", [("drift_limit", "drift_max"), ("forgetting_limit", "forgetting")]
)
def test_a_limit_stops_training_at_the_first_measurement_above_it(limit, name, tmp_path, caplog):
    trainer = trainer_of(adapted(), tmp_path, max_steps=6)
    RetentionCallback(HELD_OUT, every=1).attach(trainer)
    trainer.train()
    values = curve(trainer.state.log_history, f"retention/{name}")
    assert values[2] < values[3] < values[4]

    trainer = trainer_of(adapted(), tmp_path, max_steps=6)
    # Between steps 2 and 3, seen at step 4 by a callback that looks every second step.
    callback = RetentionCallback(HELD_OUT, every=2, **{limit: (values[2] + values[3]) / 2}).attach(
        trainer
    )
    with caplog.at_level(logging.WARNING, "secura_kernels.train.callbacks"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert callback.stopped.startswith(f"step 4: {name} {values[4]:.6g} is not within its limit")
    messages = [
        r.getMessage() for r in caplog.records if r.name == "secura_kernels.train.callbacks"
    ]
    assert messages == [f"training stops at {callback.stopped}"]
    assert curve(trainer.state.log_history, f"retention/{name}")[4] == values[4]


def test_a_diverged_model_is_above_every_limit(tmp_path):
    trainer = trainer_of(adapted(), tmp_path, max_steps=3)
    callback = RetentionCallback(every=1, drift_limit=1e9).attach(trainer)
    trainer.model.model.layers[1].self_attn.q_proj.U.data[0, 0] = math.nan
    trainer.train()
    assert trainer.state.global_step == 1 and "drift_max nan" in callback.stopped


def test_measures_where_another_callback_stops_training_off_schedule(tmp_path):
    class StopWhenEvaluated(TrainerCallback):
        def on_evaluate(self, args, state, control, **_):
            control.should_training_stop = True

    trainer = trainer_of(
        adapted(),
        tmp_path,
        StopWhenEvaluated(),
        eval_strategy="steps",
        eval_steps=3,
        eval_dataset=DATA,
        max_steps=8,
    )
    RetentionCallback(every=2).attach(trainer)
    trainer.train()
    assert list(curve(trainer.state.log_history, "retention/drift_max")) == [0, 2, 3]
    # Nothing was logged after TensorBoard had closed its file, which would open another.
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 1


@pytest.mark.parametrize("restore", [False, True], ids=["", "restored callbacks"])
def test_a_resumed_run_keeps_the_first_base_loss(restore, tmp_path):
    def run(steps, resume, batches=HELD_OUT):
        trainer = trainer_of(
            adapted(),
            tmp_path,
            max_steps=steps,
            save_strategy="steps",
            save_steps=3,
            restore_callback_states_from_checkpoint=restore,
        )
        RetentionCallback(batches, every=2).attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return {
            name: curve(trainer.state.log_history, f"retention/{name}")
            for name in ("base_loss", "forgetting")
        }

    start = run(3, False)["base_loss"][0]
    resumed = run(5, True)
    assert list(resumed["base_loss"]) == [0, 2, 3, 4, 5]
    for step in (4, 5):
        assert resumed["base_loss"][step] != start
        assert resumed["forgetting"][step] == resumed["base_loss"][step] - start


def test_two_runs_of_one_callback_are_two_starts(tmp_path):
    trainer = trainer_of(adapted(), tmp_path, max_steps=2)
    callback = RetentionCallback(HELD_OUT, every=1, drift_limit=1e-9).attach(trainer)
    trainer.train()
    moved = base_loss(trainer.model, HELD_OUT)
    assert callback.stopped and trainer.state.global_step == 1
    callback.limits.clear()
    trainer.train()
    assert curve(trainer.state.log_history, "retention/base_loss")[0] == moved
    assert list(curve(trainer.state.log_history, "retention/gradient_norm")) == [1, 2]
    assert callback.stopped is None


def test_retention_without_what_it_needs(tmp_path):
    with pytest.raises(RuntimeError, match=r"call callback\.attach\(trainer\)"):
        trainer_of(adapted(), tmp_path, RetentionCallback()).train()
    trainer = trainer_of(llama(), tmp_path)
    RetentionCallback().attach(trainer)
    with pytest.raises(ValueError, match=r"model='LlamaForCausalLM'.*adapted layers"):
        trainer.train()
    trainer = trainer_of(adapted(), tmp_path)
    RetentionCallback().attach(trainer)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="trainer='FSDP or DeepSpeed'"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_attach_joins_once(tmp_path):
    callback = RetentionCallback()
    trainer = trainer_of(adapted(), tmp_path, callback)
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RetentionCallback(every=0), "every=0"),
        (lambda: RetentionCallback(batches=[]), "batches=.*at least one batch"),
        (lambda: RetentionCallback(drift_limit=-1), "drift_limit=-1"),
        (lambda: RetentionCallback(HELD_OUT, forgetting_limit=math.nan), "forgetting_limit=nan"),
        (lambda: RetentionCallback(forgetting_limit=0.1), "forgetting_limit=0.1.*without batches"),
        (lambda: RetentionCallback().attach("trainer"), "trainer='trainer'"),
        (lambda: StageCallback("m3"), "kind='m3'"),
        (lambda: StageCallback("m1", every=0), "every=0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture
def stages(monkeypatch):
    """The steps at which a layer takes a stage; filled while ``staged`` trains."""
    taken = []

    def note(kind):
        own = getattr(CURLoRALinear, f"stage_{kind}")

        def stage(layer):
            taken.append((kind, id(layer), bool(layer.U.any())))
            own(layer)

        monkeypatch.setattr(CURLoRALinear, f"stage_{kind}", stage)

    note("m1")
    note("m2")
    return taken


class Steps(TrainerCallback):
    """Which steps began after a stage: it joins behind the StageCallback."""

    def __init__(self, taken):
        self.taken, self.seen, self.steps = taken, 0, []

    def on_step_begin(self, args, state, control, **_):
        if len(self.taken) > self.seen:
            self.steps.append(state.global_step)
            self.seen = len(self.taken)


@pytest.mark.parametrize(
    "kind, every, settings, expected",
    [
        ("m1", 2, {}, [2, 4]),
        ("m2", 2, dict(max_steps=4), [2]),  # none after the last step
        ("m1", 2, dict(gradient_accumulation_steps=2), [2, 4]),
        ("m2", None, dict(max_steps=-1, num_train_epochs=3), [4, 8]),  # 4 steps an epoch
    ],
)
def test_stages_fall_between_steps(kind, every, settings, expected, stages, tmp_path):
    steps = Steps(stages)
    trainer = trainer_of(adapted(), tmp_path, StageCallback(kind, every), steps, **settings)
    trainer.train()
    assert steps.steps == expected
    assert {taken for taken, _, _ in stages} == {kind}
    assert all(moved for _, _, moved in stages)
    assert len({layer for _, layer, _ in stages}) == 4 == len(stages) / len(expected)


def test_stages_of_peft_layers_keep_their_drift(tmp_path):
    peft = pytest.importorskip("peft", reason="the layers are PEFT's")
    from secura_kernels.peft import SecuraConfig

    model = peft.get_peft_model(
        llama(), SecuraConfig(r=4, variant="curlora", target_modules=["q_proj", "v_proj"])
    )
    trainer = trainer_of(model, tmp_path, StageCallback("m1", 1), max_steps=3)
    RetentionCallback(HELD_OUT, every=1).attach(trainer)
    trainer.train()
    values = curve(trainer.state.log_history, "retention/drift_mean")
    assert 0 == values[0] < values[1] < values[2] < values[3]


@pytest.mark.parametrize("every, save, expected", [(2, 2, [2, 4]), (None, 6, []), (None, 4, [4])])
def test_a_resumed_run_takes_the_stages_that_its_checkpoint_stood_before(
    every, save, expected, stages, tmp_path
):
    settings = dict(save_strategy="steps", save_steps=save)
    trainer_of(adapted(), tmp_path, StageCallback("m2", every), max_steps=save, **settings).train()
    stages.clear()
    steps = Steps(stages)
    trainer = trainer_of(
        adapted(),
        tmp_path,
        StageCallback("m2", every),
        steps,
        max_steps=save + 1 if every is None else 5,
        **settings,
    )
    trainer.train(resume_from_checkpoint=True)
    assert steps.steps == expected


def test_stages_need_a_layer_that_has_them(tmp_path):
    with pytest.raises(ValueError, match=r"model='LlamaForCausalLM'.*CURLoRA or SECURA"):
        trainer_of(llama(), tmp_path, StageCallback("m1")).train()
