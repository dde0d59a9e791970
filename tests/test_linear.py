"""The layers: start, training, merging, stages, importance decay, Conv1D, bad input."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secura_kernels import CURLoRALinear, ImportanceDecay, SECURALinear, SMagNorm, cur_linear
from secura_kernels.bases import orthonormal_basis
from secura_kernels.nn import factors

GATED = dict(norm="calibrated")
KINDS = [(CURLoRALinear, {}), (SECURALinear, {}), (SECURALinear, GATED)]
BASES = ["raw", "orthonormal", "svd"]
WEIGHT = SMagNorm(domain="weight")
MERGEABLE = [
    (CURLoRALinear, {}),
    (CURLoRALinear, dict(basis="orthonormal")),
    (SECURALinear, dict(norm=None)),
    (SECURALinear, dict(norm=WEIGHT)),
    (SECURALinear, dict(norm="figure", basis="orthonormal")),
    (SECURALinear, dict(norm=WEIGHT, adapter_bias=False)),
]


def train(layer, steps=3, lr=0.05, x=None):
    """A few steps that move everything that trains."""
    x = torch.randn(6, layer.in_features, dtype=layer.weight.dtype) if x is None else x
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(x).float().square().mean().backward()
        optimizer.step()
    return layer


def make(kind, N=20, K=24, bias=True, dtype=torch.float64, r=4, **settings):
    return kind.from_linear(nn.Linear(K, N, bias, dtype=dtype), r, **settings)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24), (2, 1, 3, 24)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_starts_as_the_base_layer_to_the_bit(kind, settings, basis, dtype, shape, bias):
    linear = nn.Linear(24, 20, bias, dtype=dtype)
    layer = kind.from_linear(linear, 4, basis=basis, **settings)
    x = torch.randn(shape).to(dtype)
    assert torch.equal(layer(x), F.linear(x, linear.weight, linear.bias))
    assert layer.weight is linear.weight and layer.bias is linear.bias
    trained = {n: p.dtype for n, p in layer.named_parameters() if p.requires_grad}
    wide = torch.promote_types(dtype, torch.float32)
    names = ["U"] if kind is CURLoRALinear else ["A", "B", "adapter_bias"]
    assert trained == dict.fromkeys(names, wide)


@pytest.mark.parametrize("preset", ["published", "figure"])
def test_every_preset_starts_as_the_base_layer(preset):
    layer = make(SECURALinear, norm=preset)
    x = torch.randn(5, 24, dtype=torch.float64)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_known_defect_of_the_published_preset():
    """g jumps from 2 to 1.5 as d leaves 0: one tiny step multiplies outputs by about 4/3."""
    x = torch.randn(50, 24, dtype=torch.float64)
    for preset, low, high in (("published", 1.32, 1.34), ("calibrated", 0.99, 1.01)):
        layer = make(SECURALinear, norm=preset)
        base = layer(x).detach()
        with torch.no_grad():
            layer.B.normal_(std=1e-9)
        assert low < (layer(x) / base).median().item() < high


@pytest.mark.parametrize(("kind", "settings"), KINDS)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains(kind, settings, basis, dtype):
    layer = make(kind, dtype=dtype, basis=basis, r=8, **settings)
    weight, x = layer.weight.clone(), torch.randn(64, 24).to(dtype)
    C, R = (side.detach() for side in layer.C_and_R(layer.weight))
    target = (layer(x) + 0.2 * x @ R.T @ torch.randn(8, 8).to(dtype) @ C.T).detach().float()
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(F.mse_loss(layer(x).float(), target))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(layer.weight, weight)


def test_orthonormal_update_lies_between_orthonormal_bases():
    layer = train(make(CURLoRALinear, basis="orthonormal"))
    Q_c = torch.linalg.qr(layer.weight[:, layer.cols]).Q
    Q_r = torch.linalg.qr(layer.weight[layer.rows].T).Q
    delta = layer.delta_weight()
    torch.testing.assert_close(Q_c @ Q_c.T @ delta @ Q_r @ Q_r.T, delta)
    # U is between orthonormal bases: its norm is the update's.
    torch.testing.assert_close(layer.U.norm(), delta.norm())


def test_ill_conditioned_bases_are_stored():
    linear = nn.Linear(24, 20, bias=False)
    with torch.no_grad():
        linear.weight[:, 1] = linear.weight[:, 0] * (1 + 1e-6 * torch.randn(20))
    cols, rows = torch.arange(4), torch.arange(4)
    layer = CURLoRALinear(linear, cols, rows, basis="orthonormal")
    assert layer.fold_c is None
    torch.testing.assert_close(layer.C.T @ layer.C, torch.eye(4))
    train(layer)
    torch.testing.assert_close(layer.U.norm(), layer.delta_weight().norm())
    assert CURLoRALinear(linear, cols + 1, rows, basis="orthonormal").C is None


@pytest.mark.parametrize("condition", [4, 32])
def test_folded_bases_cost_little_precision(condition, monkeypatch):
    """The change in bfloat16 against float64: folded factors beside stored bases."""
    N = K = 128
    r, cols, rows = 32, torch.arange(32), torch.arange(64, 96)
    scales = torch.logspace(0, math.log10(condition), r)
    W = torch.linalg.qr(torch.randn(N, K)).Q
    W[:, cols] = W[:, cols] * scales
    W[rows, :] = W[rows, :] * scales[:, None]
    linear = nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    linear.weight.requires_grad_(False).copy_(W)
    V, x = torch.randn(r, r), torch.randn(64, K).bfloat16()
    errors = {}
    for name, limit in (("folded", 1e9), ("stored", 0)):
        monkeypatch.setitem(factors.LARGEST_CONDITION, torch.bfloat16, limit)
        layer = CURLoRALinear(copy.deepcopy(linear), cols, rows, basis="orthonormal")
        assert (layer.C is None) == (name == "folded")
        with torch.no_grad():
            layer.U.copy_(V)
            layer.weight.zero_()  # leaves the change alone
            sides = (
                dict(C=linear.weight[:, cols], R=linear.weight[rows])
                if layer.C is None
                else dict(C=layer.C, R=layer.R)
            )
            change = cur_linear(x, layer.weight, layer.core(), **sides)
        Q_c, _, Q_r, _ = orthonormal_basis(linear.weight[:, cols], linear.weight[rows])
        truth = x.double() @ (Q_c @ V.double() @ Q_r.T).T
        errors[name] = float((change.double() - truth).norm() / truth.norm())
    assert errors["folded"] < 3 * errors["stored"]


@pytest.mark.parametrize(("kind", "settings"), MERGEABLE)
@pytest.mark.parametrize("bias", [True, False])
def test_merge_and_unmerge(kind, settings, bias):
    layer = train(make(kind, bias=bias, **settings))
    x = torch.randn(3, 24, dtype=torch.float64)
    y, weight, b = layer(x), layer.weight, layer.bias
    before = weight.clone()
    layer.merge()
    assert layer.merged and "merged=True" in repr(layer)
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(layer.to_linear()(x), y)
    merged_state = layer.state_dict()
    layer.merge()
    layer.unmerge()
    layer.unmerge()
    assert layer.weight is weight and torch.equal(weight, before) and layer.bias is b
    assert torch.equal(layer(x), y)
    plain = layer.to_linear()
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), y)
    assert merged_state.keys() == layer.state_dict().keys()
    assert all(torch.equal(v, merged_state[k]) for k, v in layer.state_dict().items())


def test_an_output_gate_refuses_to_merge_and_says_what_can_be_done():
    layer = train(make(SECURALinear, **GATED))
    weight = layer.weight.clone()
    for call in (layer.merge, layer.to_linear):
        with pytest.raises(RuntimeError, match=r"not a linear map.*stage_m1\(\).*weight domain"):
            call()
    assert not layer.merged and torch.equal(layer.weight, weight)


@pytest.mark.parametrize("stage", ["stage_m1", "stage_m2"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (CURLoRALinear, {}),
        (CURLoRALinear, dict(basis="orthonormal")),
        (SECURALinear, dict(norm=None)),
    ],
)
def test_stages_keep_the_function_without_a_gate(stage, kind, settings):
    layer = make(kind, **settings)
    if kind is SECURALinear:
        layer.A.requires_grad_(False)  # M2 takes A_long <- A, which moves an older base with it
    train(layer)
    x = torch.randn(3, 24, dtype=torch.float64)
    W = layer.weight.clone()
    for _ in range(2):
        y, delta = layer(x), layer.delta_weight()
        getattr(layer, stage)()
        assert not layer.core_parameter().any()
        torch.testing.assert_close(layer(x), y)
        assert torch.equal(layer.weight, W)
        train(layer)
    assert layer.C is None and layer.stage_weight is None  # beside W there is a core, no more
    assert float(delta.norm()) > 0
    if kind is CURLoRALinear:
        y = layer(x)
        layer.merge()
        torch.testing.assert_close(layer(x), y)


def test_m1_of_the_published_form_keeps_delta_w_alone():
    layer = train(make(SECURALinear, norm="published", adapter_bias=False))
    W, delta = layer.weight.clone(), layer.delta_weight()
    layer.stage_m1()
    assert torch.equal(layer.weight, W)
    torch.testing.assert_close(layer.stage_weight, W + delta)
    x = torch.randn(3, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, W + delta, layer.bias))
    y = layer(x)
    layer.merge()  # nothing is in front of the gate now
    torch.testing.assert_close(layer(x), y)


def test_m1_of_a_weight_gate_is_refused():
    """W_eff is no delta_W. M2 is possible, and so is a new layer over ``to_linear``."""
    layer = train(make(SECURALinear, norm=WEIGHT, adapter_bias=False))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="W_eff is no delta_W; stage_m2 is possible"):
        layer.stage_m1()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    x = torch.randn(3, 24, dtype=torch.float64)
    again = SECURALinear(layer.to_linear(), layer.cols, layer.rows, norm=WEIGHT)
    torch.testing.assert_close(again(x), layer(x))


def test_m2_accumulates_as_published():
    """B_long <- B_long + B, A_long <- A; the next base is W + C A_long^T B_long^T R."""
    layer = train(make(SECURALinear, basis="raw", norm=None, adapter_bias=False))
    total = torch.zeros_like(layer.B)
    for _ in range(2):
        total += layer.B.detach()
        layer.stage_m2()
        train(layer)
    A = layer.A_long
    C, R = layer.weight[:, layer.cols], layer.weight[layer.rows]
    torch.testing.assert_close(layer.B_long, total)
    torch.testing.assert_close(
        layer.merged_matrix(layer.weight),
        layer.weight + layer.delta_weight() + C @ A.T @ total.T @ R,
    )


def test_stages_do_not_mix_and_need_an_unmerged_layer():
    layer = train(make(SECURALinear, norm=None))
    layer.merge()
    for stage in (layer.stage_m1, layer.stage_m2):
        with pytest.raises(RuntimeError, match=r"call unmerge\(\) first"):
            stage()
    layer.unmerge()
    layer.stage_m1()
    with pytest.raises(RuntimeError, match="one kind of stage"):
        layer.stage_m2()


def test_published_start_is_a_slice_and_svd_start_is_close():
    layer = make(SECURALinear, r=6, m=9)
    assert torch.equal(layer.A, layer.weight[:6, :9].T)
    layer = make(SECURALinear, r=20, m=22, a_init="truncated_svd", dtype=torch.float32)
    torch.testing.assert_close(layer.A, layer.weight[:20, :22].T.clone(), rtol=1e-3, atol=1e-4)
    linear = nn.Linear(24, 20)
    state = torch.get_rng_state()
    twice = [
        SECURALinear(linear, layer.cols, layer.rows, a_init="truncated_svd").A for _ in range(2)
    ]
    assert torch.equal(*twice) and torch.equal(state, torch.get_rng_state())


def test_conv1d():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(20, 24).double()
    linear = nn.Linear(24, 20, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias.normal_())
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    for kind, settings in MERGEABLE:
        layers = [
            train(kind(base, torch.arange(4), torch.arange(4), **settings), x=x)
            for base in (copy.deepcopy(conv), copy.deepcopy(linear))
        ]
        torch.testing.assert_close(layers[0](x), layers[1](x))
        assert layers[0].weight.shape == (24, 20)
        plain = layers[0].to_linear()
        assert isinstance(plain, Conv1D)
        torch.testing.assert_close(plain(x), layers[1](x))
        for layer in layers:
            layer.stage_m2()
        torch.testing.assert_close(layers[0](x), layers[1](x))


class TestImportanceDecay:
    def layer(self, ratio=0.5, edge=1.9, norm="calibrated"):
        return make(SECURALinear, norm=norm, importance_decay=ImportanceDecay(ratio, edge, 0.9))

    def test_waits_for_the_gate_and_decays_the_next_step(self):
        layer = self.layer()
        x = torch.randn(40, 24, dtype=torch.float64)
        layer(x).sum().backward()
        assert (layer.importance.factor == 1).all()  # nothing has moved
        with torch.no_grad():
            layer.B.normal_(std=10)
        layer(x).sum().backward()
        decayed = layer.importance.factor < 1
        assert int(decayed.sum()) == max((20 - 4) // 2, 20 // 4)
        assert layer.importance.factor[decayed].unique().tolist() == pytest.approx([0.9])
        factor = layer.importance.factor
        y = layer(x)
        without = copy.deepcopy(layer)
        without.importance.factor.fill_(1)
        base = F.linear(x, layer.weight, layer.bias)
        z = without(x)
        assert torch.equal(y[:, ~decayed], z[:, ~decayed])
        # Updated value times decay: out_j = ((beta - 1) b + c (b + d)) / g.
        beta = layer.norm.base_weight
        d = F.linear(x, layer.delta_weight()) + layer.adapter_bias
        g = (beta * base + d) / z
        torch.testing.assert_close(y, ((beta - 1) * base + factor * (base + d)) / g)

    def test_only_training_counts_and_recomputation_does_not_matter(self):
        from torch.utils.checkpoint import checkpoint

        layer = self.layer()
        x = torch.randn(40, 24, dtype=torch.float64)
        layer.eval()(x)
        assert layer.importance.count.tolist() == [0, 0]
        layer.train()
        torch.nn.init.normal_(layer.B, std=10)
        plain = copy.deepcopy(layer)
        for step in range(3):
            torch.manual_seed(step)
            plain(x).sum().backward()
            torch.manual_seed(step)
            checkpoint(layer, x, use_reentrant=False).sum().backward()
            assert torch.equal(plain.importance.factor, layer.importance.factor)
            assert torch.equal(plain.B.grad, layer.B.grad)
        assert (layer.importance.factor < 1).any()

    def test_samples_channels_by_row_norm(self):
        layer = self.layer(ratio=0.0)
        with torch.no_grad():
            layer.weight[:10] *= 1e-6
            layer.B.normal_()
        layer.refresh()
        layer(torch.randn(40, 24, dtype=torch.float64)).sum().backward()
        small, large = layer.importance.factor[:10], layer.importance.factor[10:]
        assert (small == 1).all() and large.sum() < 9.3

    def test_a_copy_goes_on(self):
        layer = copy.deepcopy(self.layer(ratio=0.0))
        torch.nn.init.normal_(layer.B)
        layer(torch.randn(4, 24, dtype=torch.float64)).sum().backward()
        assert (layer.importance.factor < 1).any()

    def test_works_in_the_weight_domain(self):
        layer = self.layer(ratio=0.0, norm=WEIGHT)
        torch.nn.init.normal_(layer.B)
        layer(torch.randn(4, 24, dtype=torch.float64)).sum().backward()
        assert (layer.importance.factor < 1).any()
        train(layer)


@pytest.mark.parametrize(
    ("kind", "settings", "error", "message"),
    [
        (CURLoRALinear, dict(r=0), ValueError, "r=0 is not allowed"),
        (CURLoRALinear, dict(r=21), ValueError, r"r=21 is not allowed: it must be .* to 20"),
        (SECURALinear, dict(r=4, m=4), ValueError, "m=4 is not allowed: .* from 5 to 24"),
        (SECURALinear, dict(r=4, m=25), ValueError, "m=25 is not allowed"),
        (SECURALinear, dict(r=4, a_init="zeros"), ValueError, "a_init='zeros' is not allowed"),
        (SECURALinear, dict(r=4, norm="loud"), ValueError, "norm='loud' is not allowed"),
        (SECURALinear, dict(r=4, adapter_bias=1.5), ValueError, "adapter_bias=1.5"),
        (CURLoRALinear, dict(r=4, basis="qr"), ValueError, "basis='qr' is not allowed"),
        (
            CURLoRALinear,
            dict(r=4, basis="orthonormal", replace=True, selection="highest"),
            ValueError,
            "replace=True",
        ),
        (CURLoRALinear, dict(r=4, alpha=float("nan")), ValueError, "alpha=nan is not allowed"),
        (CURLoRALinear, dict(r=4, impl="fast"), ValueError, "impl='fast' is not allowed"),
        (CURLoRALinear, dict(r=4, impl="cuda"), RuntimeError, "impl='cuda' cannot run here"),
        (
            CURLoRALinear,
            dict(r=4, importance_decay=ImportanceDecay()),
            ValueError,
            "importance_decay=",
        ),
        (
            SECURALinear,
            dict(r=4, importance_decay=ImportanceDecay()),
            ValueError,
            "importance_decay=",
        ),
        (
            SECURALinear,
            GATED | dict(r=4, importance_decay=True),
            ValueError,
            "importance_decay=True",
        ),
    ],
)
def test_bad_settings_change_nothing(kind, settings, error, message, monkeypatch):
    monkeypatch.setattr("secura_kernels.backends.cuda.why_unavailable", lambda *_: "not built")
    linear = nn.Linear(24, 20)
    before = linear.weight.clone()
    with pytest.raises(error, match=message):
        kind.from_linear(linear, **settings)
    assert linear.weight.requires_grad and linear.bias.requires_grad
    assert torch.equal(linear.weight, before)


def test_bad_bases():
    for kind in (CURLoRALinear, SECURALinear):
        with pytest.raises(TypeError, match=r"linear is a Conv2d: it must be an nn.Linear"):
            kind.from_linear(nn.Conv2d(1, 1, 1), 1)
        with pytest.raises(ValueError, match="meta"):
            kind.from_linear(nn.Linear(4, 4, device="meta"), 1)
        quantised = nn.Linear(4, 4)
        quantised.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
        with pytest.raises(TypeError, match=r"weight has dtype torch.uint8"):
            kind.from_linear(quantised, 1)
        with pytest.raises(ValueError, match="NaN"):
            broken = nn.Linear(4, 4)
            broken.weight.data[0, 0] = torch.nan
            kind.from_linear(broken, 1)
    linear = nn.Linear(24, 20)
    fine = torch.arange(4)
    with pytest.raises(ValueError, match=r"cols=\[0, 24\] is not allowed: .* from 0 to 23"):
        CURLoRALinear(linear, torch.tensor([0, 24]), fine)
    with pytest.raises(ValueError, match=r"rows=\[-1, 2\]"):
        CURLoRALinear(linear, fine, torch.tensor([-1, 2]))
    with pytest.raises(ValueError, match=r"rows.shape=\(3,\) is not allowed"):
        CURLoRALinear(linear, fine, fine[:3])
    with pytest.raises(ValueError, match=r"cols=.*int64"):
        CURLoRALinear(linear, fine.float(), fine)
    assert linear.weight.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.randn(3, 23)), r"x.shape=\(3, 23\) is not allowed: it must be \(..., 24\)"),
        (dict(x=torch.randn(3, 24).double()), "x.dtype=torch.float64 is not allowed"),
        (dict(core=torch.zeros(4, 3)), "core=.*floating point"),
        (dict(cols=None), "either cols and rows, or C and R"),
        (dict(C=torch.zeros(20, 4), R=torch.zeros(4, 24)), "either cols and rows"),
        (dict(rows=torch.arange(3)), r"rows.shape=\(3,\) is not allowed: it must be \(4,\)"),
        (dict(rows=torch.arange(4).int()), "rows.dtype=torch.int32"),
        (dict(adapter_bias=torch.zeros(3)), r"adapter_bias.shape=\(3,\)"),
        (dict(weight=torch.zeros(20, 24, requires_grad=True)), "weight.requires_grad=True"),
        (dict(weight=torch.zeros(20, 24, device="meta")), "x.device='cpu'"),
        (dict(alpha=float("inf")), "alpha=inf"),
        (dict(norm="calibrated"), "norm='calibrated' is not allowed"),
        (dict(task_gate=torch.zeros(2, 4)), r"task_gate.shape=\(2, 4\) is not .*\(4, 2\)"),
        (dict(task_gate=torch.zeros(4, 2), norm=SMagNorm()), "task_gate=.* None beside a norm"),
        (dict(task_gate=torch.zeros(4, 2), norm=WEIGHT), "task_gate=.* None beside a norm"),
    ],
)
def test_bad_arguments_of_the_function(changes, message):
    from secura_kernels import cur_linear

    arguments = (
        dict(
            x=torch.randn(3, 24),
            weight=torch.randn(20, 24),
            core=torch.zeros(4, 4),
            cols=torch.arange(4),
            rows=torch.arange(4),
        )
        | changes
    )
    with pytest.raises(ValueError, match=message):
        cur_linear(**arguments)
