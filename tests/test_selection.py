import pytest
import torch
from layer_cases import relative_error

from secura_kernels import SMagNorm, select
from secura_kernels.bases import orthonormal_basis
from secura_kernels.settings import ImportanceDecay

W = torch.randn(30, 20, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("rule", "descending"), [("lowest", False), ("highest", True)])
def test_deterministic_rules(rule, descending):
    cols, rows = select(W, 6, rule)
    assert cols.dtype == rows.dtype == torch.int64
    assert cols.tolist() == W.norm(dim=0).sort(descending=descending).indices[:6].tolist()
    assert rows.tolist() == W.norm(dim=1).sort(descending=descending).indices[:6].tolist()


def test_ties_go_by_index():
    cols, rows = select(torch.ones(6, 5), 3, "highest")
    assert cols.tolist() == rows.tolist() == [0, 1, 2]


def test_inverted_sampling_is_seeded_and_leaves_the_global_generator_alone():
    def draw(seed, replace):
        return select(
            W, 8, "inverted", replace=replace, generator=torch.Generator().manual_seed(seed)
        )

    for replace in (True, False):
        state = torch.get_rng_state()
        a, b, c = draw(1, replace), draw(1, replace), draw(2, replace)
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert not all(torch.equal(x, y) for x, y in zip(a, c, strict=True))
    assert len(set(draw(1, False)[0].tolist())) == 8


def test_inverted_probabilities():
    """Frequencies over many draws equal (1 / p) / sum(1 / p)."""
    weight = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat(
        [select(weight, 3, "inverted", replace=True, generator=generator)[0] for _ in range(4000)]
    )
    inverse = torch.tensor([1, 1 / 4, 1 / 16])
    frequencies = torch.bincount(draws, minlength=3) / draws.numel()
    torch.testing.assert_close(frequencies, inverse / inverse.sum(), rtol=0, atol=0.015)


def test_a_column_of_zeros_is_never_drawn():
    weight = W.clone()
    weight[:, 3] = 0
    for replace in (True, False):
        cols, _ = select(weight, 19, "inverted", replace=replace)
        assert 3 not in cols.tolist()
    with pytest.raises(ValueError, match="r=20 is not allowed: it must be at most 19"):
        select(weight, 20, "inverted")


def test_orthonormal_basis_spans_the_same():
    C, R = W[:, :4], W[:5, :][:4]
    Q_c, S_c, Q_r, S_r = orthonormal_basis(C, R)
    eye = torch.eye(4, dtype=torch.float64)
    for Q in (Q_c, Q_r):
        torch.testing.assert_close(Q.T @ Q, eye)
    assert relative_error(Q_c @ S_c, C) < 1e-12 and relative_error((Q_r @ S_r).T, R) < 1e-12
    assert (S_c.diagonal() > 0).all() and (S_r.diagonal() > 0).all()
    V = torch.randn(4, 4, dtype=torch.float64)
    core = torch.linalg.inv(S_c) @ V @ torch.linalg.inv(S_r).T
    torch.testing.assert_close(C.double() @ core @ R.double(), Q_c @ V @ Q_r.T)
    with pytest.raises(ValueError, match=r"columns .* are linearly dependent \(rank 3\)"):
        orthonormal_basis(W[:, [0, 1, 2, 2]], R)


@pytest.mark.parametrize(
    ("weight", "r", "settings", "error", "message"),
    [
        (
            W,
            0,
            {},
            ValueError,
            r"r=0 is not allowed: it must be an integer from 1 to 20, min\(N, K\)",
        ),
        (W, 21, {}, ValueError, "r=21 is not allowed"),
        (W, 2.0, {}, ValueError, "r=2.0 is not allowed"),
        (W, True, {}, ValueError, "r=True is not allowed"),
        (W, 4, dict(rule="random"), ValueError, "selection='random' is not allowed: .*'inverted'"),
        (W, 4, dict(rule="lowest", replace=True), ValueError, "replace=True is not allowed"),
        (W * 0, 4, {}, ValueError, "a tensor of zeros"),
        (W / 0, 4, {}, ValueError, "NaN or infinite"),
        (W.long(), 4, {}, TypeError, "weight has dtype torch.int64: it must be a floating-point"),
        (W[0], 4, {}, ValueError, r"weight.shape=\(20,\) is not allowed: .*two-dimensional"),
    ],
)
def test_bad_input(weight, r, settings, error, message):
    with pytest.raises(error, match=message):
        select(weight, r, **settings)


def test_presets():
    calibrated, published, figure = map(SMagNorm.preset, ("calibrated", "published", "figure"))
    assert SMagNorm() == calibrated and calibrated.continuous
    assert calibrated.base_weight == calibrated.gate_at_zero == pytest.approx(1.9525741268)
    assert (published.base_weight, published.gate_at_zero) == (2, 1.5) and not published.continuous
    assert (figure.ref, figure.domain, figure.base_weight) == ("max", "weight", 1)
    assert SMagNorm.of("published") == SMagNorm.of(published.to_dict()) == published
    assert SMagNorm.preset("figure", domain="output").domain == "output"
    assert SMagNorm.of(None) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(scale=0), "scale=0 is not allowed: it must be a finite number > 0"),
        (dict(scale=float("nan")), "scale=nan"),
        (dict(scale="6"), "scale='6'"),
        (dict(shift=float("inf")), "shift=inf"),
        (dict(ref=0), 'ref=0 is not allowed: .* or "max"'),
        (dict(ref="mean"), "ref='mean'"),
        (
            dict(beta=0.5),
            "beta=0.5 is not allowed: it must be None, for g\\(0\\), or a number from 1",
        ),
        (dict(eps=0), "eps=0"),
        (
            dict(domain="input"),
            "domain='input' is not allowed: it must be one of 'output', 'weight'",
        ),
        (dict(detach_gate="no"), "detach_gate='no'"),
    ],
)
def test_bad_norms(settings, message):
    with pytest.raises(ValueError, match=message):
        SMagNorm(**settings)


def test_bad_specifications():
    with pytest.raises(ValueError, match="norm='best' is not allowed: it must be one of 'calib"):
        SMagNorm.of("best")
    with pytest.raises(ValueError, match=r"norm={'slope': 1} is not allowed"):
        SMagNorm.of({"slope": 1})
    for bad in (dict(ratio=1), dict(edge=1), dict(edge=2), dict(decay=0), dict(decay=1.1)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ImportanceDecay(**bad)
