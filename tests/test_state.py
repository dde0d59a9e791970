"""Saved states: round trips through safetensors, and every kind of file that must be refused."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_linear import BASES, KINDS, WEIGHT, make, train
from torch import nn

from secura_kernels import CURLoRALinear, ImportanceDecay, SECURALinear, load_adapter, save_adapter
from secura_kernels.nn.state import SETTINGS

STAGES = [None, "stage_m1", "stage_m2"]


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first, self.second = nn.Linear(24, 20, dtype=dtype), nn.Linear(20, 24, dtype=dtype)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def model_with_layers(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    base = Model(dtype)
    model = copy.deepcopy(base)
    model.first = SECURALinear.from_linear(
        model.first, 4, basis="orthonormal", norm="calibrated", importance_decay=ImportanceDecay()
    )
    model.second = CURLoRALinear.from_linear(model.second, 5, alpha=0.5)
    for layer in (model.first, model.second):
        train(layer)
    return base, model


@pytest.mark.parametrize(("kind", "settings"), KINDS)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stage", STAGES)
def test_state_dict_round_trip(kind, settings, basis, dtype, stage, tmp_path):
    layer = train(make(kind, dtype=dtype, basis=basis, **settings))
    if stage:
        getattr(layer, stage)()
        train(layer)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = make(kind, dtype=dtype, basis=basis, **settings)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(3, 24).to(dtype)
    assert torch.equal(other(x), layer(x))
    # A loaded layer goes on like the saved one; so does one that loads over a later stage.
    for each in (layer, other):
        train(each, x=x)
    assert torch.equal(other(x), layer(x))
    for fresh_stage in STAGES[1:]:
        third = make(kind, dtype=dtype, basis=basis, **settings)
        getattr(third, fresh_stage)()
        third.load_state_dict(layer.state_dict())
        assert torch.equal(third(x), layer(x))


def test_load_to_meta_with_assign():
    layer = train(make(CURLoRALinear, basis="orthonormal"))
    skeleton = copy.deepcopy(layer).to("meta")
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    skeleton.load_state_dict(state, assign=True)
    x = torch.randn(3, 24, dtype=torch.float64)
    assert torch.equal(skeleton(x), layer(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("U"), "the state has no U"),
        (lambda s: s.pop("cols"), "the state has no cols"),
        (lambda s: s.pop(SETTINGS), "its format is unknown"),
        (lambda s: s.update(U=torch.zeros(3, 3)), r"U.shape=\(3, 3\) is not allowed"),
        (lambda s: s.update(U=torch.zeros(4, 4, dtype=torch.int64)), "U.dtype=torch.int64"),
        (lambda s: s.update(cols=s["cols"] + 100), "cols=.*from 0 to 23"),
        (lambda s: s.update(rows=s["rows"] - 100), "rows=.*from 0 to 19"),
        (lambda s: s.update(cols=s["cols"].int()), "cols='torch.int32"),
        (lambda s: s.update(C=torch.zeros(20, 4)), r"the state has \['C'\] without \['R'\]"),
        (lambda s: s.update(U_long=torch.zeros(5, 4)), r"U_long.shape=\(5, 4\)"),
        (lambda s: s.update({SETTINGS: torch.zeros(9)}), "does not hold settings"),
        (
            lambda s: s.update({SETTINGS: torch.zeros(9, dtype=torch.uint8)}),
            "does not hold settings",
        ),
        (lambda s: edit(s, version=2), "format 'secura_kernels', version 2: this release reads"),
        (lambda s: edit(s, format="other"), "format 'other'"),
        (lambda s: edit(s, alpha=2.0), r"saved with alpha=2.0, the layer was built with alpha=1.0"),
        (lambda s: edit(s, kind="SECURALinear"), "kind='SECURALinear'"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    layer = train(make(CURLoRALinear, dtype=torch.float32))
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    with torch.no_grad():
        state["U"] += 1
        state["weight"] += 1
    change(state)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def edit(state, **changes):
    content = json.loads(bytes(state[SETTINGS].tolist())) | changes
    state[SETTINGS] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def test_a_merged_layer_loads_nothing():
    layer = train(make(CURLoRALinear))
    state = layer.state_dict()
    layer.merge()
    with pytest.raises(ValueError, match=r"merged: call unmerge\(\)"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_file(tmp_path, dtype):
    base, model = model_with_layers(dtype)
    save_adapter(model, tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    stored = load_file(tmp_path / "a.safetensors")
    assert not any("weight" in k or k.endswith(".bias") for k in stored if ".C" not in k)
    x = torch.randn(5, 24).to(dtype)
    for fresh in (copy.deepcopy(base), model_with_layers(dtype)[1]):
        names = load_adapter(fresh, tmp_path / "a.safetensors")
        assert names == ["first", "second"] or set(names) == {"first", "second"}
        assert torch.equal(fresh.eval()(x), model.eval()(x))
        assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in model.state_dict().items())
        trained = {n for n, p in fresh.named_parameters() if p.requires_grad}
        assert trained == {"first.A", "first.B", "first.adapter_bias", "second.U"}


def test_adapter_file_of_one_layer_and_of_other_settings(tmp_path):
    for settings in (dict(norm=None), dict(norm=WEIGHT, adapter_bias=False), dict(norm="figure")):
        torch.manual_seed(3)
        linear = nn.Linear(24, 20, bias=False)
        layer = train(SECURALinear.from_linear(copy.deepcopy(linear), 4, m=9, **settings))
        layer.stage_m2()
        train(layer)
        save_adapter(nn.ModuleList([layer]), tmp_path / "a.safetensors")
        fresh = nn.ModuleList([linear])
        load_adapter(fresh, tmp_path / "a.safetensors")
        x = torch.randn(3, 24)
        assert torch.equal(fresh[0](x), layer(x)) and repr(fresh[0]) == repr(layer)
        save_adapter(layer, tmp_path / "b.safetensors")
        load_adapter(layer, tmp_path / "b.safetensors")


def test_a_base_in_a_coarser_dtype_is_recognised(tmp_path):
    base, model = model_with_layers()
    save_adapter(model, tmp_path / "a.safetensors")
    low = copy.deepcopy(base).bfloat16()
    load_adapter(low, tmp_path / "a.safetensors")
    x = torch.randn(5, 24)
    torch.testing.assert_close(low(x.bfloat16()).float(), model(x), rtol=0.05, atol=0.05)


def test_m1_is_carried_by_the_file(tmp_path):
    base, model = model_with_layers()
    model.second.stage_m1()
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(base, tmp_path / "a.safetensors")
    x = torch.randn(5, 24)
    assert torch.equal(base.eval()(x), model.eval()(x))


class TestBadFiles:
    @pytest.fixture
    def saved(self, tmp_path):
        base, model = model_with_layers()
        save_adapter(model, tmp_path / "a.safetensors")
        return base, tmp_path / "a.safetensors"

    def refuses(self, model, path, message):
        """The load fails with one clear error and the model is untouched."""
        before = {k: v.clone() for k, v in model.state_dict().items()}
        types = [type(m) for m in model.modules()]
        gradients = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            load_adapter(model, path)
        assert types == [type(m) for m in model.modules()]
        assert gradients == [p.requires_grad for p in model.parameters()]
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    @pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.99])
    def test_truncated(self, saved, keep):
        base, path = saved
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])
        self.refuses(base, path, "is not a whole safetensors file")

    def test_pickles_are_not_opened(self, saved):
        base, path = saved
        torch.save({"first.U": torch.zeros(2)}, path)
        self.refuses(base, path, "is not a whole safetensors file")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.update({"first.B": torch.zeros(2, 2)}), "layer 'first': B.shape"),
            (lambda t: t.pop("second.U"), "layer 'second': the state has no U"),
            (lambda t: t.update({"third.U": torch.zeros(2)}), "tensors of no layer: third.U"),
            (lambda t: t.update({"second.V": torch.zeros(2)}), "unknown tensors"),
            (lambda t: t.update({"second.cols": t["second.cols"] + 50}), "layer 'second': cols="),
            (lambda t: t.update({"second.fingerprint": torch.zeros(16)}), "another base"),
            (
                lambda t: t.update({f"third.{SETTINGS}": t[f"first.{SETTINGS}"].clone()}),
                "no layer 'third'",
            ),
            (lambda t: edit_layer(t, version=9), "version 9"),
            (lambda t: edit_layer(t, kind="os.system"), "kind='os.system' is not allowed"),
            (lambda t: edit_layer(t, alpha="1"), "alpha='1' is not allowed"),
            (lambda t: edit_layer(t, norm={"scale": -1}), "scale=-1 is not allowed"),
            (lambda t: edit_layer(t, norm=[1]), r"norm=\[1\] is not allowed"),
            (lambda t: edit_layer(t, importance_decay={"speed": 1}), "speed"),
            (
                lambda t: t.clear() or t.update(x=torch.zeros(1)),
                "holds no layers of secura_kernels",
            ),
        ],
    )
    def test_tampered(self, saved, change, message):
        base, path = saved
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        self.refuses(base, path, message)

    def test_other_models(self, saved, tmp_path):
        base, path = saved
        other = Model()
        self.refuses(other, path, "layer 'first': it was trained on another base")
        wide = copy.deepcopy(base)
        wide.first = nn.Linear(30, 20)
        self.refuses(wide, path, "layer 'first'")
        self.refuses(nn.Sequential(nn.Linear(24, 20)), path, "the model has no layer 'first'")
        with pytest.raises(FileNotFoundError):
            load_adapter(base, tmp_path / "none.safetensors")
        with pytest.raises(ValueError, match="model='Model' is not allowed: it must be a model"):
            save_adapter(base, tmp_path / "b.safetensors")

    def test_an_interrupted_save_keeps_the_old_file(self, saved, monkeypatch):
        _, path = saved
        before = path.read_bytes()

        def interrupted(tensors, target, **_):
            target.write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr("secura_kernels.nn.checkpoint.save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(model_with_layers()[1], path)
        assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def edit_layer(tensors, **changes):
    key = f"first.{SETTINGS}"
    part = {SETTINGS: tensors[key]}
    edit(part, **changes)
    tensors[key] = part[SETTINGS]
