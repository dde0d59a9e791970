"""What an adapter's file holds for each layer, and every check before one is loaded.

The adapter's own tensors: ``cols``, ``rows``, the trained ones, stages, importance. Beside them

- with ``save_projection``, ``C`` and ``R`` (the orthonormal ones for that basis), so that delta_W
  is the same on a base that has been quantised;
- ``fingerprint``, 256 values of W that the base must have; to quantising where C and R are there;
- ``checksum``, of the indices and cores, which are noise without one another.

transformers' own ``load_adapter`` (and its ``from_pretrained`` of an adapter's folder) does not ask
a PEFT method how to read its file: it copies what it finds a place for, and reports the rest as
unexpected. The configuration therefore says which optional tensors there are; see ``places.py``.
"""

from collections.abc import Iterator

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..nn.adapter import Adapter
from ..nn.state import (
    CHECKSUM,
    FINGERPRINT,
    check_finite,
    check_sum,
    check_tensors,
    checksum,
    fingerprint,
)
from . import base_weight, places, sharding
from .config import SecuraConfig
from .layer import SecuraLinear

PREFIX = "base_model.model."
FSDP1 = "_fsdp_wrapped_module."  # in the names of modules, not of tensors


def completed(
    found: dict[str, Tensor],
    model: nn.Module,
    config: SecuraConfig,
    adapter_name: str,
    state_dict: dict[str, Tensor],
) -> dict[str, Tensor]:
    """An adapter's tensors as its file holds them, by the model's names.

    Args:
        found: the adapter's own part of ``state_dict``, the model's. Where that holds sharded
            tensors they are gathered, for which every rank must be here.
    """
    found = {k: sharding.whole(v) for k, v in found.items()}
    optional = set()
    for name, layer, adapter in adapters_of(model, adapter_name):
        start = f"{name}.secura_adapter.{adapter_name}."
        # PEFT (0.21) looks for the names of modules, which FSDP1 changes.
        found |= {
            k: sharding.whole(v)
            for k, v in state_dict.items()
            if k.startswith(start) and k not in found
        }
        if not any(k.startswith(start) for k in found):
            continue  # not a part of what is to be saved
        for key, value in adapter.state_dict().items():
            if key in model.peft_config:  # PEFT has taken it for the adapter of that name
                found.setdefault(start + key, value)
        weight = _weight(layer, state_dict.get(f"{name}.base_layer.weight"))
        for key, value in _sides(adapter, config, weight).items():
            found.pop(start + key, None)
            if value is not None:
                found[start + key] = value
        found[start + FINGERPRINT] = layer.fingerprint() if weight is None else fingerprint(weight)
        found[start + CHECKSUM] = checksum(_part(found, start))
        optional |= {
            adapter.optional_name(key)
            for key in (*adapter.optional_shapes(), *places.NAMES)
            if start + key in found
        }
    config.optional_tensors = sorted(optional)
    return found


def _part(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def _sides(
    adapter: Adapter, config: SecuraConfig, weight: Tensor | None
) -> dict[str, Tensor | None]:
    """C and R as the file is to have them, None where it is not, or {} where what the adapter has
    stored is what it is to have.

    Args:
        weight: W, None where no rank has it whole: C and R are stored there.
    """
    if adapter.C is not None:
        # Those of another base stay: nothing else could bring them back.
        if config.save_projection or weight is None or not adapter.has_C_and_R_of(weight):
            return {}
        return dict(C=None, R=None)
    if not config.save_projection or adapter.stack:  # no stack of experts is quantised
        return {}
    C, R = adapter.untied_C_and_R(weight)
    return dict(C=C.contiguous(), R=R.contiguous())


def fitted(
    state_dict: dict[str, Tensor], model: nn.Module, config: SecuraConfig, adapter_name: str
) -> dict[str, Tensor]:
    """A file's tensors by the model's names, after every check.

    Raises:
        ValueError: tensors that are missing, unknown, of a wrong shape or kind, with NaN, indices
            outside W or of another core, or another base, with the layer's name. Nothing has been
            changed then.
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
            part = _checked(part, layer, adapter, config.force)
        except ValueError as error:
            errors.append(f"layer {name!r}: {error}")
            continue
        out |= {f"{own}{name}.secura_adapter.{adapter_name}.{k}": v for k, v in part.items()}
    stray = sorted(set(state_dict) - _beside_adapters(state_dict, model, adapter_name))
    if stray:
        errors.append(f"it holds tensors of layers that are not adapted here: {stray[:3]}")
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ValueError(f"the adapter's file does not fit the model: {errors[0]}{more}")
    for _, _, adapter in adapters_of(model, adapter_name):
        places.give_up(adapter)  # what they are for has been checked
    return state_dict | out


def _beside_adapters(
    state_dict: dict[str, Tensor], model: nn.Module, adapter_name: str
) -> set[str]:
    """Names of tensors that PEFT itself puts beside an adapter's: those of ``modules_to_save``, and
    embeddings whose vocabulary has grown."""
    modules = dict(model.named_modules())
    names = {
        f"{name}.{key}"
        for name, module in modules.items()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key in module.adapter_state_dict_load_map(adapter_name).values()
    }
    embeddings = [
        getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")
    ]
    starts = tuple(
        f"{name}." for name, module in modules.items() if any(module is e for e in embeddings)
    )
    plain = {name.replace(FSDP1, "") for name in names}
    return {k for k in state_dict if k in names | plain or k.startswith(starts)}


def adapters_of(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, SecuraLinear, Adapter]]:
    """The name, the layer and its adapter of that name, of each layer that has one."""
    for name, layer in model.named_modules():
        if isinstance(layer, SecuraLinear) and adapter_name in layer.secura_adapter:
            yield (name.replace(FSDP1, ""), layer, layer.secura_adapter[adapter_name])


def _weight(layer: SecuraLinear, gathered: Tensor | None) -> Tensor | None:
    """W (N, K): the one of the state dict where that is whole, else the layer's; None where it lies
    on several ranks, of which this may be the only one here."""
    base = layer.get_base_layer()
    transposed = isinstance(base, base_weight.Conv1D)
    shape = (layer.out_features, layer.in_features)
    whole = (
        gathered is not None
        and gathered.is_floating_point()
        and tuple(gathered.shape) == (shape[::-1] if transposed else shape)
    )
    if whole and not layer.merged and layer.quantization_backend is None:
        gathered = sharding.whole(gathered)
        return gathered.T if transposed else gathered
    return None if layer.is_spread() else layer.base_matrix()


def _checked(
    part: dict[str, Tensor], layer: SecuraLinear, adapter: Adapter, force: bool
) -> dict[str, Tensor]:
    """A layer's part of a file, checked, ready to be loaded into its adapter."""
    part, whole = dict(part), part
    about = {name: part.pop(name) for name in places.NAMES if name in part}
    optional = adapter.optional_shapes()
    own = {k: v for k, v in adapter.state_dict().items() if k not in places.NAMES}
    unknown = sorted(set(part) - set(own) - set(optional))
    if unknown:
        raise ValueError(f"it holds an unknown tensor {unknown[0]!r}")
    check_tensors(adapter, own, part)
    check_finite(part)
    if "C" not in part and FINGERPRINT not in about:
        raise ValueError(f"it has neither C and R nor a {FINGERPRINT} of its base")
    if FINGERPRINT in about and not force:
        places.check_base(about[FINGERPRINT], layer.fingerprint(), stored="C" in part)
    check_sum(whole)
    return part
