"""Adapters over the stacked weights of a mixture of experts, ``SecuraConfig(target_parameters=)``.

transformers keeps the experts of a layer as parameters of one module: ``gate_up_proj`` (E, 2 I, H)
and ``down_proj`` (E, H, I), or transposed as in gpt-oss, with biases or without. Their classes say
so by attributes (``use_experts_implementation``), which is all that is asked of a class here.

``SecuraExperts`` takes the place of such a module and runs the experts itself, each projection with
its change; the change of W (E, N, K) is formed by merging alone. For each parameter that is adapted
it holds a ``SecuraStack``, which is what ``SecuraLinear`` is for one weight.
"""

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..checks import fail
from ..functional.experts import Routing
from ..nn.adapter import Adapter
from ..nn.experts import CURLoRAExperts, SECURAExperts, experts_linear, select_experts
from . import base_weight, sharding
from .config import SecuraConfig
from .layer import SecuraLinear, check_rank, generator_of, of_any_indices

KINDS = {"secura": SECURAExperts, "curlora": CURLoRAExperts}


class StackedWeight:
    """One parameter of an experts module, and its bias, by the names that a linear layer has.

    Attributes:
        weight: (E, N, K), or (E, K, N) where ``is_transposed``. bias: (E, N) or None.
    """

    def __init__(self, experts: nn.Module, parameter: str) -> None:
        self.experts, self.parameter = experts, parameter
        self.is_transposed = experts.is_transposed

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.experts, self.parameter)

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        setattr(self.experts, self.parameter, value)

    @property
    def bias(self) -> nn.Parameter | None:
        return getattr(self.experts, f"{self.parameter}_bias") if self.experts.has_bias else None

    @bias.setter
    def bias(self, value: nn.Parameter | None) -> None:
        if self.experts.has_bias:
            setattr(self.experts, f"{self.parameter}_bias", value)

    def to(self, *where) -> None:
        self.experts.to(*where)

    def matrix(self) -> Tensor:
        """(E, N, K) as it is now, whatever is merged into it."""
        return self.weight.mT if self.is_transposed else self.weight


class SecuraStack(SecuraLinear):
    """One stacked weight of frozen experts with named adapters, a core for each expert.

    Args:
        base_layer: the parameter. Others: as for ``SecuraLinear``.

    Raises:
        TypeError: a parameter that cannot be adapted. ValueError: settings that do not fit it.
    """

    def forward(self, x: Tensor, routing: Routing, adapter_names: object = None) -> Tensor:
        """(S, K) -> (S, N), rows sorted by expert."""
        if adapter_names is not None:
            raise ValueError(
                "adapter_names is not possible with target_parameters: experts run one adapter for "
                "the whole batch; call set_adapter() for each"
            )
        base, names = self.base_layer, self.names_in_use()
        if self.is_spread():
            raise RuntimeError(
                f"{base.parameter} of {type(base.experts).__name__} is sharded over ranks: stacked "
                "experts run whole"
            )
        if len(names) > 1:
            self._check_several(names)
        weight = base.matrix()
        if weight.requires_grad:
            raise RuntimeError(
                f"{base.parameter} of {type(base.experts).__name__} requires a gradient: experts "
                "under an adapter are frozen"
            )
        adapters = [self._ready(name) for name in names]
        return experts_linear(x.to(weight.dtype), weight, base.bias, adapters, routing)

    def names_in_use(self) -> list[str]:
        """The adapters of the next forward pass: none where they are disabled or merged."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [] if self.merged else self._present(self.active_adapters)

    @staticmethod
    def backend_of(base: StackedWeight, **_) -> None:
        check_stacked(base)

    @staticmethod
    def build(weight: Tensor, r: int, config: SecuraConfig, key: str, empty: bool) -> Adapter:
        check_rank(r, weight)
        kind = KINDS[config.variant]
        kind.check_settings(**config.adapter_settings())
        if empty:
            any_rows = torch.arange(r).expand(len(weight), r)
            return of_any_indices(kind, weight, any_rows, any_rows, config)
        cols, rows = select_experts(weight, r, config.selection, generator_of(config, key))
        return kind(weight, cols, rows, **config.adapter_settings())

    def check_merge(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        names = self._present(self.active_adapters if adapter_names is None else adapter_names)
        biased = [n for n in names if self.secura_adapter[n].adapter_bias is not None]
        if biased and self.base_layer.bias is None:
            raise ValueError(
                f"adapters {biased} cannot be merged: they have a bias (adapter_bias), and the "
                "experts have none that it could join; train with adapter_bias=False"
            )
        super().check_merge(adapter_names, safe_merge)

    def extra_repr(self) -> str:
        return f"parameter={self.base_layer.parameter!r}, shape={tuple(self.weight.shape)}"


class SecuraExperts(nn.Module):
    """Frozen experts, of which some weights are adapted: a ``SecuraStack`` of the weight's name.

    While an adapter is in use the experts are run as transformers' ``"grouped_mm"`` runs them,
    whatever ``experts_implementation`` the model has; without one they run themselves.

    Args:
        experts: the module that holds the stacked weights.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.base_layer = experts

    def stacks(self) -> list[SecuraStack]:
        return [m for m in self.children() if isinstance(m, SecuraStack)]

    def forward(self, *args, **kwargs) -> Tensor:
        """hidden (tokens, H), the chosen experts (tokens, k) and their weights (tokens, k) ->
        (tokens, H)."""
        if not any([stack.names_in_use() for stack in self.stacks()]):
            return self.base_layer(*args, **kwargs)
        if "forward" in vars(self.base_layer):
            raise RuntimeError(
                f"the forward pass of {type(self.base_layer).__name__} has been replaced, as "
                "offloading does, and experts with an adapter are not run by it: keep the experts "
                "on one device"
            )
        if kwargs:
            bound = inspect.signature(self.base_layer.forward).bind(*args, **kwargs)
            args = bound.args
        return self._run(*args)

    def _run(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        experts, routing = self.base_layer, Routing.of(chosen, self.base_layer.num_experts)
        y = self._projected(up_projection(experts), hidden[routing.tokens], routing)
        y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
        y = self._projected("down_proj", y, routing)
        if experts.has_post_expert_norm:
            y = experts.post_expert_norm(y)
        y = y * weights.reshape(-1)[routing.order][:, None]
        return routing.back(y).view(*chosen.shape, -1).sum(1).to(hidden.dtype)

    def _projected(self, parameter: str, x: Tensor, routing: Routing) -> Tensor:
        if parameter in self._modules:
            return self._modules[parameter](x, routing)
        base = StackedWeight(self.base_layer, parameter)
        weight = base.matrix()
        return experts_linear(x.to(weight.dtype), weight, base.bias, (), routing)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT puts in the place of this module again."""
        if merge:
            for stack in self.stacks():
                stack.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


def up_projection(experts: nn.Module) -> str:
    """The name of the weight that experts take their input with."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def matches(model: nn.Module, targets: list[str]) -> Iterator[tuple[str, nn.Module, str, set[str]]]:
    """Each module with a parameter that a target names: its name, it, the parameter, and which
    targets those are. A target is a parameter's name or the end of it."""
    for name, module in model.named_modules():
        plain = name.removesuffix(".base_layer")  # where an earlier adapter wraps the experts
        for parameter, _ in module.named_parameters(recurse=False):
            key = f"{plain}.{parameter}"
            found = {t for t in targets if key == t or key.endswith(f".{t}")}
            if found:
                yield plain, module, parameter, found


def inject(
    model: nn.Module, config: SecuraConfig, adapter_name: str, active: bool, empty: bool
) -> list[str]:
    """Adds an adapter to every stacked weight that ``config.target_parameters`` names.

    Args:
        active: whether the adapter is one that trains. empty: as for ``SecuraLinear``.

    Returns:
        the names of the parameters.

    Raises:
        ValueError: a target that names no parameter. Others: those of ``SecuraStack``.
    """
    targets = config.target_parameters or []
    found = list(matches(model, targets))
    unused = sorted(set(targets) - set().union(*(named for *_, named in found)))
    if unused:
        raise fail(
            "target_parameters",
            unused,
            "names of parameters of the model, or ends of names, as 'mlp.experts.gate_up_proj'",
        )
    for name, experts, parameter, _ in found:
        key = f"{name}.{parameter}"
        holder = model.get_submodule(name) if name else model
        stack = holder._modules.get(parameter) if isinstance(holder, SecuraExperts) else None
        if stack is not None:
            stack.update_layer(adapter_name, config, key, empty)
            continue
        check_experts(name, experts, parameter)
        stack = SecuraStack(StackedWeight(experts, parameter), adapter_name, config, key, empty)
        if not active:
            stack.requires_grad_(False)
        if not isinstance(holder, SecuraExperts):
            holder = SecuraExperts(experts)
            model.set_submodule(name, holder)
        holder.add_module(parameter, stack)
    return [f"{name}.{parameter}" for name, _, parameter, _ in found]


def check_experts(name: str, experts: nn.Module, parameter: str) -> None:
    """Raises TypeError for a parameter of a module whose forward pass is not known."""
    kind, shape = type(experts).__name__, tuple(getattr(experts, parameter).shape)
    if len(shape) != 3:
        raise TypeError(
            f"target_parameters matches {name}.{parameter} of shape {shape}, which is no stack of "
            "experts (E, N, K): linear layers are named in target_modules"
        )
    known = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "num_experts")
    by_interface = hasattr(type(experts).forward, "__wrapped__")
    if not by_interface or not all(hasattr(experts, attribute) for attribute in known):
        raise TypeError(
            f"target_parameters matches {name}.{parameter} of a {kind}, whose forward pass is not "
            "known here: only experts that follow transformers' use_experts_implementation can be "
            "adapted"
        )
    if parameter not in (up_projection(experts), "down_proj"):
        raise TypeError(
            f"target_parameters matches {name}.{parameter}: of a {kind} only "
            f"{up_projection(experts)} and down_proj are stacked weights"
        )
    if experts._is_expert_parallel:
        raise TypeError(
            f"target_parameters matches {name}.{parameter}, whose experts lie on several ranks: "
            "expert parallelism is not possible under an adapter"
        )


def check_stacked(base: StackedWeight) -> None:
    """Raises TypeError for a stack whose values are not at hand as one plain tensor."""
    weight = base.weight
    if sharding.is_sharded(base) or sharding.is_partitioned(base):
        raise TypeError(
            f"target_parameters matches {base.parameter}, which is sharded over ranks: stacked "
            "experts are adapted whole"
        )
    if weight.dtype not in base_weight.DTYPES or type(weight) is not nn.Parameter:
        raise TypeError(
            f"target_parameters matches {base.parameter}, a {type(weight).__name__} "
            f"{weight.dtype}: only floating-point stacks can be adapted, not quantised ones"
        )
