"""The picture of where a model has moved: what it shows, and what it needs."""

import sys

import pytest
import torch
from torch import nn

matplotlib = pytest.importorskip("matplotlib")
from test_budget import adapted, move  # noqa: E402

from secura_kernels import CURLoRALinear  # noqa: E402
from secura_kernels.train import plot  # noqa: E402
from secura_kernels.train.drift import drift  # noqa: E402
from secura_kernels.train.plot import kind_and_block, plot_layers  # noqa: E402
from secura_kernels.train.retention import core_size, core_sizes  # noqa: E402


@pytest.fixture
def drawn(monkeypatch):
    """Every set of axes that is drawn, in order."""
    axes, draw = [], plot._draw
    monkeypatch.setattr(plot, "_draw", lambda each, *what: (axes.append(each), draw(each, *what)))
    return axes


@pytest.mark.parametrize("how", ["peft", CURLoRALinear])
@pytest.mark.parametrize("basis", ["whitened", "orthonormal"])
def test_it_shows_the_drift_and_the_size_of_every_layer(how, basis, drawn, tmp_path):
    model, _ = adapted(basis, how)
    move(model, 1.0)
    plot_layers(model, tmp_path / "layers.png")
    assert [p.name for p in tmp_path.iterdir()] == ["layers.png"]
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    shown = [
        {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()} for axes in drawn
    ]
    moved, sizes = drift(model), core_sizes(model)
    expected = [{name: layer.relative for name, layer in moved.items()}]
    if basis == "whitened":
        assert sizes.keys() == moved.keys()
        assert sum(sizes.values()) == pytest.approx(core_size(model), rel=1e-5)
        expected.append(sizes)
    else:
        assert sizes == {} and core_size(model) == 0
    for found, values in zip(shown, expected, strict=True):
        assert found == {
            kind: [value for name, value in values.items() if name.endswith(kind)]
            for kind in ("q_proj", "v_proj")
        }
        assert all(value > 0 for line in found.values() for value in line)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.model.layers.13.self_attn.q_proj", ("q_proj", 13)),
        ("transformer.h.0.mlp.c_fc", ("c_fc", 0)),
        ("model.layers.2.mlp.experts.7.w1", ("w1", 2)),
        ("0", ("0", None)),
        ("body.2", ("body.2", None)),
        ("lm_head", ("lm_head", None)),
    ],
)
def test_the_line_and_place_of_a_layer(name, expected):
    assert kind_and_block(name) == expected


def test_layers_without_blocks_stand_in_their_order(drawn, tmp_path):
    model = nn.Sequential(*(CURLoRALinear.from_linear(nn.Linear(8, 8), 2) for _ in range(3)))
    plot_layers(model, tmp_path / "layers.png")
    assert [line.get_xdata()[0] for line in drawn[0].get_lines()] == [0, 1, 2]


def test_what_it_cannot_draw(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"model='Linear' is not allowed: .* adapted layers"):
        plot_layers(nn.Linear(2, 2), tmp_path / "a.png")
    layer = CURLoRALinear.from_linear(nn.Linear(8, 8), 2)
    with pytest.raises(FileNotFoundError):
        plot_layers(layer, tmp_path / "nowhere" / "a.png")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="plot_layers needs matplotlib: pip install matplotlib"):
        plot_layers(layer, tmp_path / "a.png")
    assert not list(tmp_path.iterdir()) and torch.is_grad_enabled()
