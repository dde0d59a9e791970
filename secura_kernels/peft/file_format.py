"""What an adapter's file holds for each layer, and every check before one is loaded.

The adapter's own tensors: ``cols``, ``rows``, the trained ones, stages, importance. Beside them,
with ``save_projection``, ``C`` and ``R`` (the orthonormal ones for that basis), so that delta_W is
the same on any base; without, ``fingerprint``, 16 values of W that the base must have.

transformers' own ``load_adapter`` (and its ``from_pretrained`` of an adapter's folder) does not ask
a PEFT method how to read its file: it copies what it finds a place for, and reports the rest as
unexpected. The configuration therefore says which late tensors there are. A fingerprint it cannot
check; ``PeftModel.from_pretrained`` does.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from ..adapter import Adapter
from ..checks import fail
from ..selection import check_indices
from ..state import FINGERPRINT, fingerprint, same_base
from . import base_weight, sharding
from .config import SecuraConfig
from .layer import SecuraLinear

PREFIX = "base_model.model."


def completed(found: dict[str, Tensor], model: nn.Module, config: SecuraConfig, adapter_name: str,
              state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors as its file holds them, by the model's names.

    Args:
        found: the adapter's own part of ``state_dict``, the model's. Where that holds sharded
            tensors they are gathered, for which every rank must be here.
    """
    found = {k: sharding.whole(v) for k, v in found.items()}
    late = set()
    for name, layer, adapter in adapters_of(model, adapter_name):
        start = f"{name}.secura_adapter.{adapter_name}."
        if not any(k.startswith(start) for k in found):
            continue  # not a part of what is to be saved
        for key, value in adapter.state_dict().items():
            if key in model.peft_config:  # PEFT has taken it for the adapter of that name
                found.setdefault(start + key, value)
        found |= _about_base(layer, adapter, config, state_dict.get(f"{name}.base_layer.weight"),
                             start)
        if start + FINGERPRINT in found:
            for key in ("C", "R"):
                found.pop(start + key, None)
        late |= {key for key in adapter.late_shapes() if start + key in found}
    config.late_tensors = sorted(late)
    return found


def _about_base(layer: SecuraLinear, adapter: Adapter, config: SecuraConfig,
                gathered: Tensor | None, start: str) -> dict[str, Tensor]:
    """C and R, or the fingerprint, where they are not among the adapter's tensors already."""
    stored = adapter.C is not None
    if config.save_projection and stored:
        return {}
    weight = _weight(layer, gathered)
    if stored and not adapter.has_sides_of(weight):
        return {}  # those of another base: nothing else could bring them back
    if not config.save_projection:
        return {start + FINGERPRINT: fingerprint(weight)}
    C, R = adapter.untied_sides(weight)
    return {start + "C": C.contiguous(), start + "R": R.contiguous()}


def fitted(state_dict: dict[str, Tensor], model: nn.Module, config: SecuraConfig,
           adapter_name: str) -> dict[str, Tensor]:
    """A file's tensors by the model's names, after every check.

    Raises:
        ValueError: tensors that are missing, unknown, of a wrong shape or kind, indices outside W,
            or another base, with the layer's name. Nothing has been changed then.
    """
    state_dict, out, errors = dict(state_dict), {}, []
    own = PREFIX if any(n.startswith(PREFIX) for n, _ in model.named_modules()) else ""
    for name, layer, adapter in adapters_of(model, adapter_name):
        name = name.removeprefix(PREFIX)
        part = {}
        for start in (f"{PREFIX}{name}.secura_adapter.", f"{name}.secura_adapter."):
            for key in [k for k in state_dict if k.startswith(start)]:
                part[key.removeprefix(start)] = state_dict.pop(key)
        try:
            part = _checked(part, layer, adapter)
        except ValueError as error:
            errors.append(f"layer {name!r}: {error}")
            continue
        out |= {f"{own}{name}.secura_adapter.{adapter_name}.{k}": v for k, v in part.items()}
    stray = sorted(k for k in state_dict if ".secura_adapter." in k)
    if stray:
        errors.append(f"it holds tensors of layers that are not adapted here: {stray[:3]}")
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ValueError(f"the adapter's file does not fit the model: {errors[0]}{more}")
    return state_dict | out


def adapters_of(model: nn.Module,
                adapter_name: str) -> Iterator[tuple[str, SecuraLinear, Adapter]]:
    """The name, the layer and its adapter of that name, of each layer that has one."""
    for name, layer in model.named_modules():
        if isinstance(layer, SecuraLinear) and adapter_name in layer.secura_adapter:
            yield (name.removeprefix("_fsdp_wrapped_module."), layer,
                   layer.secura_adapter[adapter_name])


def _weight(layer: SecuraLinear, gathered: Tensor | None) -> Tensor:
    """W (N, K): the one of the state dict where that is whole, else the layer's."""
    base = layer.get_base_layer()
    transposed = isinstance(base, base_weight.Conv1D)
    shape = (layer.out_features, layer.in_features)
    whole = gathered is not None and gathered.is_floating_point() \
        and tuple(gathered.shape) == (shape[::-1] if transposed else shape)
    if whole and not layer.merged and layer.quantization_backend is None:
        gathered = sharding.whole(gathered)
        return gathered.T if transposed else gathered
    return layer.base_matrix()


def _checked(part: dict[str, Tensor], layer: SecuraLinear, adapter: Adapter) -> dict[str, Tensor]:
    """A layer's part of a file, checked, ready to be loaded into its adapter."""
    part = dict(part)
    saved_fingerprint = part.pop(FINGERPRINT, None)
    late = adapter.late_shapes()
    own = {k: v for k, v in adapter.state_dict().items() if k not in late}
    shapes = {k: tuple(v.shape) for k, v in own.items()} | late
    missing = sorted(set(own) - set(part))
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    for name, value in part.items():
        if name not in shapes:
            raise ValueError(f"it holds an unknown tensor {name!r}")
        if tuple(value.shape) != shapes[name]:
            raise fail(f"{name}.shape", tuple(value.shape), f"{shapes[name]} for this layer")
        if value.is_floating_point() != (name not in own or own[name].is_floating_point()):
            raise fail(f"{name}.dtype", value.dtype, "the kind of number the layer holds")
    for group in map(set, adapter.late_groups()):
        if group & set(part) and not group <= set(part):
            raise ValueError(f"it has {sorted(group & set(part))} without "
                             f"{sorted(group - set(part))}")
    check_indices("cols", part["cols"], layer.in_features)
    check_indices("rows", part["rows"], layer.out_features)
    weight = layer.base_matrix()
    if saved_fingerprint is None and "C" not in part:
        raise ValueError(f"it has neither C and R nor a {FINGERPRINT} of its base")
    if saved_fingerprint is not None and not (saved_fingerprint.is_floating_point()
                                              and same_base(saved_fingerprint, weight)):
        raise ValueError("it was trained on another base: the layer's weight has other values")
    return part
