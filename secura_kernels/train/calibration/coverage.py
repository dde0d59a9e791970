"""Whether what was measured says enough of each layer, and what those get of which it does not."""

import warnings
from typing import Any

from . import experts, natural, whitened
from .measuring import Layers

Moments = whitened.Moments | natural.Moments | experts.Moments


def check_finite(moments: dict[str, Moments]) -> None:
    for name, sums in moments.items():
        if not sums.finite():
            raise ValueError(
                f"layer {name!r}: its inputs or gradients on general text are not "
                "finite; the model gives NaN there, or float16 overflows"
            )


def without_enough(
    layers: Layers, moments: dict[str, Moments], seen: dict[str, int], too_few: str
) -> list[str]:
    """The layers that general text says too little of."""
    found = []
    for name, (_, adapter) in layers.items():
        count = seen.get(name, adapter.r)
        if count >= adapter.r and moments[name].reached():
            continue
        if too_few == "error":
            raise ValueError(
                f"layer {name!r} saw {count} tokens of general text, fewer than its "
                f"rank {adapter.r}, or they do not reach the predictions: bring more text, or pass "
                "too_few='orthonormal'"
            )
        found.append(name)
    if len(found) == len(layers):
        raise ValueError("no layer saw enough general text: bring more")
    return found


def complete_experts(whole: dict[str, tuple], moments: dict[str, Any]) -> list[str]:
    """Gives experts that general text says too little of orthonormal folds, with a warning."""
    left_out = []
    for name, sums in moments.items():
        if not isinstance(sums, experts.Moments) or not sums.reached():
            continue
        whole[name] = sums.completed(*whole[name])
        unknown = (~sums.known()).nonzero().flatten().tolist()
        left_out += [f"{name}[{e}]" for e in unknown]
    if left_out:
        warnings.warn(
            f"{len(left_out)} experts saw fewer tokens of general text than their rank and have "
            f"orthonormal bases, as {left_out[0]}: bring more text where they matter",
            stacklevel=3,
        )
    return left_out


def unreached(found: dict[str, Any], too_few: str) -> list[str]:
    """The layers that the task never reaches."""
    names = [name for name, sides in found.items() if sides is None]
    if names and too_few == "error":
        raise ValueError(
            f"the task's batches do not reach layer {names[0]!r}: bring others, or "
            "pass too_few='orthonormal'"
        )
    if names and len(names) == len(found):
        raise ValueError("the task's batches reach no layer")
    return names
