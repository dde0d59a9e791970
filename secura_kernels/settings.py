"""S-MagNorm's settings: the sigmoid gate that restrains how far each value moves.

For matching elements ``b`` of a base and ``d`` of its change, one family covers every published
and proposed form::

    rho = |d| / (|b| + eps)               relative magnitude of the change
    z   = scale * (rho / ref - shift)     ref: a number, or max(rho) over the whole matrix
    g   = 2 - sigmoid(z)                  the gate, in (1, 2)
    out = (beta * b + d) / g              and out = b wherever d == 0

Sources: SECURA, arXiv 2502.18168 (the figure of the algorithm) and its author's training code.
"""

import math
from dataclasses import asdict, dataclass, fields, replace

from .checks import check_choice, check_number, fail

FLOAT32_TINY = 2.0**-126  # below it eps would underflow to 0 in the float32 the gate is computed in


def _sigmoid(z: float) -> float:
    if z >= 0:
        return 1 / (1 + math.exp(-z))
    return math.exp(z) / (1 + math.exp(z))  # exp(-z) would overflow here


@dataclass(frozen=True)
class SMagNorm:
    """Frozen settings of S-MagNorm; the defaults are the preset ``calibrated``.

    Args:
        scale: steepness of the sigmoid, > 0.
        shift: relative magnitude (in units of ``ref``) at the middle of the sigmoid.
        ref: what ``rho`` is measured against: a number > 0, or ``"max"``, the largest ``rho`` of
            the whole matrix.
        beta: weight of the base before the division, in [1, 2]; None means g(0), so that ``out``
            is continuous at d = 0.
        eps: keeps the division finite where b = 0, >= 2**-126.
        domain: ``"output"``: b is the layer's base output, d its change. ``"weight"``: b is W, d
            is ``delta_W``; then the gated layer is still a linear map and merges exactly.
        detach_gate: the gate is a constant in the backward pass (as published); False takes the
            full derivative, for which there are no kernels: on a GPU the plain formula runs.

    Raises:
        ValueError: a field outside the values above.

    Known defect of the preset ``published``: g jumps from 2 (d == 0) to 1.5 at the first d != 0,
    so the first optimiser step multiplies outputs by about 4/3. ``figure`` jumps the other way,
    to about 0.51. ``calibrated`` has no jump.
    """

    scale: float = 6.0
    shift: float = 0.5
    ref: float | str = 1.0
    beta: float | None = None
    eps: float = 1e-10
    domain: str = "output"
    detach_gate: bool = True

    def __post_init__(self) -> None:
        check_number("scale", self.scale, "a finite number > 0", 0, open_low=True)
        check_number("shift", self.shift, "a finite number", -math.inf)
        if self.ref != "max":
            check_number("ref", self.ref, 'a finite number > 0 or "max"', 0, open_low=True)
        if self.beta is not None:
            check_number("beta", self.beta, "None, for g(0), or a number from 1 to 2", 1, 2)
        check_number("eps", self.eps, "a finite number >= 2**-126", FLOAT32_TINY)
        check_choice("domain", self.domain, ("output", "weight"))
        check_choice("detach_gate", self.detach_gate, (True, False))

    @property
    def gate_at_zero(self) -> float:
        """g(0) = 2 - sigmoid(-scale * shift), the limit of the gate as rho goes to 0."""
        return 2 - _sigmoid(-self.scale * self.shift)

    @property
    def base_weight(self) -> float:
        """``beta`` as a number: the field, or g(0) where the field is None."""
        return self.gate_at_zero if self.beta is None else float(self.beta)

    @property
    def continuous(self) -> bool:
        """Whether g(0) is beta, so that nothing jumps as d leaves 0."""
        return math.isclose(self.base_weight, self.gate_at_zero, rel_tol=1e-12)

    @classmethod
    def preset(cls, name: str, **changes) -> "SMagNorm":
        """``"calibrated"``, ``"published"`` or ``"figure"``, with some fields changed."""
        check_choice("norm", name, tuple(PRESETS))
        return replace(PRESETS[name], **changes)

    @classmethod
    def of(cls, norm: "SMagNorm | str | dict | None") -> "SMagNorm | None":
        """Settings from whatever a user may write: settings, a preset's name, a dict, or None."""
        if norm is None or isinstance(norm, cls):
            return norm
        if isinstance(norm, str):
            return cls.preset(norm)
        names = [f.name for f in fields(cls)]
        if isinstance(norm, dict) and set(norm) <= set(names):
            return cls(**norm)
        allowed = f"None, an SMagNorm, one of {tuple(PRESETS)}, or a dict with keys among {names}"
        raise fail("norm", norm, allowed)

    def to_dict(self) -> dict:
        return asdict(self)


PRESETS = {
    # ours: continuous, starts exactly at the base model
    "calibrated": SMagNorm(),
    # the author's training code; outputs, ratio to the base output
    "published": SMagNorm(shift=0.0, beta=2.0),
    # the paper's figure: fused weight, ratio to the former weight, norm, sigmoid, divide
    "figure": SMagNorm(ref="max", beta=1.0, domain="weight"),
}


@dataclass(frozen=True)
class ImportanceDecay:
    """Importance decay (SECURA's published code): when more than ``ratio`` of the gate lies at or
    under ``edge``, that is when most values moved a lot, a sampled set of output channels
    (probability proportional to the row norm of W, count ``max((N - r) / 2, N / 4)``) has its
    updated value multiplied by ``decay`` in the next step.

    Args:
        ratio: in [0, 1). edge: in (1, 2). decay: in (0, 1].

    Raises:
        ValueError: a field outside these.
    """

    ratio: float = 0.9
    edge: float = 1.2
    decay: float = 0.99

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, "a number from 0 to less than 1", 0, math.nextafter(1, 0))
        check_number(
            "edge", self.edge, "a number between 1 and 2", 1, math.nextafter(2, 0), open_low=True
        )
        check_number("decay", self.decay, "a number above 0, at most 1", 0, 1, open_low=True)
