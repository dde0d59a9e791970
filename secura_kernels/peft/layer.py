"""The PEFT layer: one frozen base, and a ``CURLoRAAdapter`` or ``SECURAAdapter`` per name."""

import zlib

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import quantization_extra_repr
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..checks import fail
from ..nn.adapter import Adapter
from ..nn.cores import CURLoRAAdapter, SECURAAdapter
from ..nn.projections import Part, Projection
from ..nn.stages import Stages
from ..nn.state import fingerprint
from ..ops import resolve
from ..selection import select, select_none
from . import base_weight, batched, places, sharding
from .config import SecuraConfig
from .merge import Mergeable

KINDS = {"secura": SECURAAdapter, "curlora": CURLoRAAdapter}


class SecuraLinear(Projection, nn.Module, Mergeable, Stages, BaseTunerLayer):
    """A frozen linear layer with named adapters; the fused layer where one is active.

    Args:
        base_layer: ``nn.Linear``, ``Conv1D``, or a quantised linear layer.
        adapter_name, config: of the first adapter. key: the layer's name in the model.
        empty: build the adapter without choosing columns and rows: a state will be loaded.

    Raises:
        TypeError: a base that cannot be adapted. ValueError: settings that do not fit the base.
    """

    adapter_layer_names = ("secura_adapter",)
    other_param_names = ("impl",)
    backend_of = staticmethod(base_weight.backend_of)
    _named = False  # whether the last forward pass was given adapter_names

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SecuraConfig,
        key: str,
        empty: bool = False,
        **quantization,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = self.backend_of(self.get_base_layer(), **quantization)
        self.secura_adapter = nn.ModuleDict()
        self.impl: dict[str, str] = {}
        self.merged_adapters = []
        self._unmerged: base_weight.Kept | None = None
        self.requantisation_error: float | None = None
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.register_load_state_dict_post_hook(_after_loading)
        self.update_layer(adapter_name, config, key, empty)
        first = self.secura_adapter[adapter_name]
        self.out_features, self.in_features = first.out_features, first.in_features

    def update_layer(
        self, adapter_name: str, config: SecuraConfig, key: str, empty: bool = False
    ) -> None:
        """Adds an adapter, or replaces the one of that name."""
        weight = self.base_matrix()
        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, key), config.r)
        resolve(config.impl, weight.device, weight.dtype, r)
        try:
            adapter = self.build(weight, r, config, key, empty)
        except (ValueError, TypeError) as error:
            raise type(error)(f"layer {key!r}: {error}") from error
        if self._keeps_C_and_R() and not adapter.awaits_C_and_R():
            adapter.untie(weight)
        self._fingerprint = fingerprint(weight)
        adapter.reserve(config.optional_tensors, weight)
        places.reserve(adapter, config, self._fingerprint)
        self.impl[adapter_name] = config.impl
        self.secura_adapter[adapter_name] = adapter.train(self.training)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @staticmethod
    def build(weight: Tensor, r: int, config: SecuraConfig, key: str, empty: bool) -> Adapter:
        """An adapter of W (N, K). ``empty``: of any columns and rows."""
        # A file of the svd basis says in the settings that it has C and R: no SVD is for nothing.
        if empty or (config.basis == "svd" and "C" in config.optional_tensors):
            check_rank(r, weight)
            cols = rows = torch.arange(r)
            return of_any_indices(KINDS[config.variant], weight, cols, rows, config)
        if config.basis == "svd":
            cols, rows = select_none(weight, r)
            return KINDS[config.variant](weight, cols, rows, **config.adapter_settings())
        generator = generator_of(config, key)
        # With replacement as published, where duplicates do no harm.
        replace = (
            config.variant == "curlora" and config.selection == "inverted" and config.basis == "raw"
        )
        cols, rows = select(weight, r, config.selection, replace=replace, generator=generator)
        return KINDS[config.variant](weight, cols, rows, **config.adapter_settings())

    def base_matrix(self) -> Tensor:
        """W (N, K); dequantised where the base is quantised. Of a merged layer the W from before: C
        and R are its columns and rows."""
        return base_weight.matrix(self.get_base_layer(), self.quantization_backend, self._unmerged)

    @property
    def weight(self) -> Tensor:
        """What holds W: (N, K) as the base keeps it, or packed bits."""
        return base_weight.holder(self.get_base_layer())

    def is_spread(self) -> bool:
        """Whether W lies on several ranks, so that only all of them together can read it."""
        base = self.get_base_layer()
        return sharding.is_sharded(base) or sharding.is_partitioned(base)

    def fingerprint(self) -> Tensor:
        """Some values of W; those from when an adapter was last added where W is on several
        ranks."""
        return self._fingerprint if self.is_spread() else fingerprint(self.base_matrix())

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(..., K) -> (..., N). ``adapter_names``: the adapter of each sample, or an
        ``AdaptersByToken``."""
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            self._named = True
            return batched.forward(self, x, adapter_names, *args, **kwargs)
        if self._named:
            batched.check_recomputation()
            self._named = False
        names = [] if self.merged else self._present(self.active_adapters)
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if len(names) > 1:
            self._check_several(names)
        y = self._first(x, names[0], *args, **kwargs)
        for name in names[1:]:
            y = self._over(y, x, name)
        return y

    def _first(self, x: Tensor, name: str, *args, **kwargs) -> Tensor:
        """The base and one adapter: the fused layer, where the base allows it."""
        adapter, impl, base = self._ready(name), self.impl[name], self.get_base_layer()
        gate, long_core = adapter.norm, adapter.long_core()
        in_weight_domain = gate is not None and gate.domain == "weight"
        if in_weight_domain:
            weight, first = self.base_matrix(), None
            if long_core is not None:
                weight, first = adapter.stage_matrix(weight), weight
            bias = None if base.bias is None else base.bias.to(weight.dtype)
            y = adapter.linear(x.to(weight.dtype), weight, bias, impl, first=first)
            return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)
        if self._is_fused(adapter):
            W, core = self.base_matrix(), adapter.stage_core()
            y = adapter.linear(x, W, base.bias, impl, core, ticket=self.ticket(x))
            return adapter.add_past(y, x)
        return self._over(self.base_layer(x, *args, **kwargs), x, name)

    def _is_fused(self, adapter: Adapter) -> bool:
        """Whether the fused layer takes the place of the base, with a gate on outputs or none."""
        base, norm = self.get_base_layer(), adapter.norm
        by_outputs = norm is None or (norm.domain == "output" and adapter.long_core() is None)
        return by_outputs and base_weight.is_plain(base) and base is self.base_layer

    def part(self) -> Part | None:
        names, base = self._present(self.active_adapters), self.base_layer
        if len(names) != 1 or self.merged or self.disable_adapters:
            return None
        adapter = self._ready(names[0])
        fits = self._is_fused(adapter) and not base_weight.is_transposed(base)
        return Part(self.weight, adapter) if fits else None

    def _over(self, y0: Tensor, x: Tensor, name: str) -> Tensor:
        """An adapter over a base output y0 (..., N) that has been computed already."""
        adapter, impl = self._ready(name), self.impl[name]
        if sharding.is_sharded(self.get_base_layer()):
            return sharding.over(self.get_base_layer(), adapter, y0, x, impl)
        C, R = self.C_and_R(adapter)
        t, C, long_core = F.linear(x, R.to(x.dtype)), C.to(y0.dtype), adapter.long_core()
        if long_core is not None and adapter.norm is not None:
            y0 = adapter.without_gate(y0, t, C, long_core, impl)
        return adapter.add_past(adapter.epilogue(y0, t, C, impl, adapter.stage_core()), x)

    def C_and_R(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """An adapter's C (N, r) and R (r, K); W is asked only where they are its slices."""
        return adapter.C_and_R(None if adapter.C is not None else self.base_matrix())

    def _ready(self, name: str) -> Adapter:
        """The adapter, what derives from W computed anew where it has been moved or loaded."""
        adapter = self.secura_adapter[name]
        if adapter.stale:
            self._settle(adapter)
        if self.is_spread():
            sharding.prepare(self, adapter)
        if adapter.C is None and (
            adapter.basis == "svd" or self._keeps_C_and_R() or self.is_spread()
        ):
            adapter.untie(self.base_matrix())
        return adapter

    def _settle(self, adapter: Adapter) -> None:
        """After a state was loaded or moved: C and R that are slices of W again, and what derives
        from them."""
        if places.present(adapter):
            places.settle(adapter, self.fingerprint())
        weight, kept = self.base_matrix(), self._keeps_C_and_R()
        if adapter.C is not None and not kept and adapter.has_C_and_R_of(weight):
            adapter.C = adapter.R = None
        adapter.derive(weight)
        if kept or adapter.basis == "svd":
            adapter.untie(weight)

    def _keeps_C_and_R(self) -> bool:
        """Whether C and R are kept, rather than sliced from W in each forward pass."""
        return self.quantization_backend is not None or sharding.is_partitioned(
            self.get_base_layer()
        )

    def _apply(self, fn, recurse: bool = True) -> "SecuraLinear":
        super()._apply(fn, recurse)
        if not self.weight.is_meta:  # here rather than in a forward pass that is compiled
            for name, adapter in self.secura_adapter.items():
                if adapter.stale:
                    self._ready(name)
        return self

    def _present(self, names: list[str]) -> list[str]:
        return [n for n in names if n in self.secura_adapter]

    def _check_several(self, names: list[str]) -> None:
        gated = [n for n in names if self.secura_adapter[n].norm is not None]
        if gated:
            raise ValueError(
                f"active adapters {names}: {gated} have a gate (norm), and a gated change is not "
                "one that others can be added to; activate one of them, or adapters with norm=None"
            )

    # What else is asked of every layer of this package.

    def change_factors(self, adapter_name: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """C (N, r), core (r, r), R (r, K) with delta_W = C core R, M stages included; detached.

        Args:
            adapter_name: None: the one active adapter.
        """
        names = self._present(self.active_adapters) if adapter_name is None else [adapter_name]
        if len(names) != 1:
            raise fail("adapter_name", adapter_name, f"a name, as {names} are active")
        return self._ready(names[0]).factors(self.base_matrix())

    def active_adapter_modules(self) -> list[Adapter]:
        return [self.secura_adapter[name] for name in self._present(self.active_adapters)]

    # PEFT's housekeeping.

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        """To the base's device, in the adapter's own dtypes; then what derives from W."""
        if adapter_name not in self.secura_adapter:
            return
        adapter = self.secura_adapter[adapter_name]
        if any(p.is_meta for p in adapter.parameters()):
            return  # a state is yet to be loaded
        adapter.to(self.base_matrix().device if device is None else device)
        if not adapter.awaits_C_and_R():  # an SVD may still be for nothing
            self._settle(adapter)

    def __repr__(self) -> str:
        return "secura." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def check_rank(r: int, weight: Tensor) -> None:
    if r > min(weight.shape[-2:]):
        allowed = f"at most {min(weight.shape[-2:])} for a weight {tuple(weight.shape)}"
        raise fail("r", r, allowed)


def of_any_indices(
    kind: type[Adapter], weight: Tensor, cols: Tensor, rows: Tensor, config: SecuraConfig
) -> Adapter:
    """An adapter that a state will be loaded into, which brings its own columns and rows."""
    settings = config.adapter_settings()
    if config.basis in ("orthonormal", "svd"):  # of whatever the state brings
        settings["basis"] = "raw"
    adapter = kind(weight, cols, rows, **settings)
    adapter.basis = config.basis
    return adapter


def generator_of(config: SecuraConfig, key: str) -> torch.Generator:
    """Of the choice of a layer's columns and rows."""
    return torch.Generator().manual_seed(zlib.crc32(f"{config.seed}:{key}".encode()))


def _after_loading(layer: SecuraLinear, _) -> None:
    for name, adapter in layer.secura_adapter.items():
        if adapter.stale:
            layer._move_adapter_to_device_of_base_layer(name)
