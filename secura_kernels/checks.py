"""Argument checks shared by every module: one clear error that names the argument, what it was
and what it may be, raised before anything is changed."""

import math
from numbers import Integral, Real
from typing import Any, TypeVar

T = TypeVar("T")


def fail(argument: str, value: object, allowed: str) -> ValueError:
    """The one form of the package's argument errors; the caller raises what this returns."""
    return ValueError(f"{argument}={value!r} is not allowed: it must be {allowed}")


def check_number(
    argument: str,
    value: Any,
    allowed: str,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
) -> float:
    """A finite real number in [low, high] (``open_low``: in (low, high])."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    # A comparison rather than math.isfinite, which torch.compile cannot trace for a symbolic float.
    if not real or not -math.inf < value < math.inf:
        raise fail(argument, value, allowed)
    if value < low or value > high or (open_low and value == low):
        raise fail(argument, value, allowed)
    return float(value)


def check_int(argument: str, value: Any, low: int, high: int, why: str = "") -> int:
    """An integer in [low, high]; ``why`` says where the bounds come from."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not low <= value <= high:
        raise fail(argument, value, f"an integer from {low} to {high}{why}")
    return int(value)


def check_choice(argument: str, value: T, choices: tuple) -> T:
    if value not in choices:
        raise fail(argument, value, "one of " + ", ".join(map(repr, choices)))
    return value
