"""How ``adapter_names`` reach the layers: by hooks for the length of one forward pass, and again
where gradient checkpointing computes a part of it once more in the backward pass."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .by_token import AdaptersByToken
from .layer import SecuraLinear

Names = list[str] | AdaptersByToken


@contextmanager
def adapter_names(tuner: nn.Module, names: Names, copies: int) -> Iterator[None]:
    """Every adapted layer of ``tuner`` is called with the names. ``copies``: rows that ``generate``
    makes of each sample; an encoder sees each sample once."""
    if isinstance(names, AdaptersByToken):
        repeated, once = names, set()
    else:
        names = list(names)
        repeated = [name for name in names for _ in range(copies)]
        once = _encoder(tuner) if copies > 1 else set()

    def of(module: nn.Module) -> Names:
        return names if module in once else repeated

    computed_again = {
        module: module._gradient_checkpointing_func
        for module in tuner.modules()
        if "_gradient_checkpointing_func" in vars(module)
    }
    with _hooks(tuner.modules(), of):
        for module, run in computed_again.items():
            module._gradient_checkpointing_func = partial(_keeping_names, module, of, run)
        try:
            yield
        finally:
            for module, run in computed_again.items():
                module._gradient_checkpointing_func = run


def _encoder(tuner: nn.Module) -> set[nn.Module]:
    model = tuner.model
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return set()
    return set(model.get_encoder().modules())


@contextmanager
def _hooks(modules: Iterable[nn.Module], of: Callable[[nn.Module], Names]) -> Iterator[None]:
    hooks = [
        module.register_forward_pre_hook(partial(_give_names, of(module)), with_kwargs=True)
        for module in modules
        if isinstance(module, SecuraLinear | AuxiliaryTrainingWrapper)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _give_names(names: Names, module: nn.Module, args: tuple, kwargs: dict):
    return args, kwargs | dict(adapter_names=names)


def _keeping_names(module: nn.Module, of: Callable, run: Callable, function: Callable, *args, **kw):
    """transformers' checkpointing of a function of ``module``, which is called again after the
    hooks of the forward pass are gone."""

    def named(*args, **kwargs):
        with _hooks(module.modules(), of):
            return function(*args, **kwargs)

    return run(named, *args, **kw)


def copies(
    num_beams: int | None = None,
    num_return_sequences: int | None = None,
    generation_config: object = None,
    **_,
) -> int:
    """How many rows ``generate`` makes of each sample: beams or returned sequences."""
    return max(
        num_beams or getattr(generation_config, "num_beams", None) or 1,
        num_return_sequences or getattr(generation_config, "num_return_sequences", None) or 1,
    )
