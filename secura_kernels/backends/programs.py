"""An op's calls by heart: the launches and the operations of PyTorch that one made, to make again.

What an implementation does on the host (plans, tiles, operands, checks) follows from the shapes,
strides, dtypes and alignment of its tensors and from its settings, and takes longer than what it
launches (benchmarks/host). So the first call with each set of these is recorded, and later ones
repeat the record with tensors of their own.
"""

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Values = list[Tensor | None]  # of a call, by number: the inputs first


class Step(NamedTuple):
    """``run(values)``; ``reads``: numbers. ``makes``: the one of a new tensor, if that is all."""

    run: Callable[[Values], None]
    reads: set[int]
    makes: int | None = None


MOST_PROGRAMS = 2**10  # of an op; beyond that many all are recorded anew
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
# The same by functions that take the host half the time.
_FASTER: dict[Callable, Callable] = {
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.permute.default: torch.permute,
    torch.ops.aten.sum.dim_IntList: torch.sum,
    torch.ops.aten.t.default: torch.t,
    torch.ops.aten.unsqueeze.default: torch.unsqueeze,
}

# Set by the backend whose launches can be repeated, once it is loaded: all that they follow from
# beside an op's arguments, of which it is given the first; None while none may be repeated.
state: Callable[[Tensor], object] | None = None
_forgetting: list[Callable[[], None]] = []
_thread = threading.local()


def forget() -> None:
    """Records every call anew: something that launches follow from has changed."""
    for empty in _forgetting:
        empty()


def note(launch: Callable[[list[Tensor]], None], tensors: list[Tensor]) -> None:
    """A backend has launched something on ``tensors``; ``launch`` does it again on others."""
    record = getattr(_thread, "record", None)
    if record is not None:
        record.launched(launch, tensors)


def by_heart(run: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """``run(*args)``, an op's implementation, which returns new tensors. Its last argument is the
    backend's name."""
    programs: dict[tuple, Callable | None] = {}
    _forgetting.append(programs.clear)

    @functools.wraps(run)
    def wrapper(*args):
        first = args[0]
        if state is None or not (first.is_cuda or args[-1] == "triton"):
            return run(*args)
        about = state(first)
        if about is None or any(isinstance(a, Tensor) and type(a) not in _PLAIN for a in args):
            return run(*args)
        tensors, key = signature(args)
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return wrapper(*args)
        key = (*key, first.device, about)
        program = programs.get(key, run)
        if program is run:  # not seen before
            if len(programs) >= MOST_PROGRAMS:
                programs.clear()
            result, programs[key] = _recorded(run, args, tensors)
            return result
        return run(*args) if program is None else program(tensors)

    return wrapper


def signature(args: Iterable) -> tuple[list[Tensor], list]:
    """The tensors among arguments, and all that the host's work follows from but the device."""
    tensors, key = [], []
    for value in args:
        if isinstance(value, Tensor):
            tensors.append(value)
            key += (value.shape, value.stride(), value.dtype, value.data_ptr() & 15 == 0)
        else:
            key.append(tuple(value) if isinstance(value, list) else value)
    numbers = list(map(id, tensors))
    if len(set(numbers)) < len(numbers):  # also which of them are one tensor
        key += map(numbers.index, numbers)
    return tensors, key


def _recorded(run: Callable, args: tuple, tensors: list[Tensor]) -> tuple[Any, Callable | None]:
    """What ``run(*args)`` returns, and the program that does so again, if there is one."""
    record = _thread.record = _Record(tensors)
    try:
        with record:
            result = run(*args)
    finally:
        _thread.record = None
    return result, record.program(result)


class _Record(TorchDispatchMode):
    """Everything that happens to tensors meanwhile, each by its number."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.inputs = len(inputs)
        self.seen: list[Tensor] = []  # alive, so that each has an id of its own
        self.numbers: dict[int, int] = {}
        self.steps: list[Step] = []
        self.launches, self.whole = 0, True
        for tensor in inputs:
            self._new(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # Only PyTorch's: another's op may be given a stream, or a pointer.
        if func.namespace == "aten" and isinstance(result, Tensor):
            self._operation(func, args, kwargs or {}, result)
        else:
            self.whole = False
        return result

    def launched(self, launch: Callable[[list[Tensor]], None], tensors: list[Tensor]) -> None:
        numbers = list(map(self._known, tensors))
        self.launches += 1
        self.steps.append(Step(lambda values: launch([values[n] for n in numbers]), set(numbers)))

    def program(self, result: tuple[Tensor, ...]) -> Callable | None:
        outputs = list(map(self._known, result))
        if not (self.whole and self.launches):
            return None
        steps, rest = self._needed(outputs), [None] * (len(self.seen) - self.inputs)

        def program(tensors: list[Tensor]) -> tuple[Tensor, ...]:
            values = [*tensors, *rest]
            for step in steps:
                step(values)
            return tuple([values[n] for n in outputs])

        return program

    def _needed(self, outputs: list[int]) -> list[Callable[[Values], None]]:
        """The steps without views that were only looked at."""
        used, found = set(outputs), []
        for step in reversed(self.steps):
            if step.makes is None or step.makes in used:
                used |= step.reads
                found.append(step.run)
        return found[::-1]

    def _new(self, tensor: Tensor) -> int:
        if id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = len(self.seen)
        self.seen.append(tensor)
        return self.numbers[id(tensor)]

    def _known(self, tensor: Tensor) -> int:
        number = self.numbers.get(id(tensor))
        self.whole &= number is not None
        return -1 if number is None else number

    def _operation(self, func, args: tuple, kwargs: dict, result: Tensor) -> None:
        """A step that fills in this call's tensors, alone or in a list, as of indices."""
        self.whole &= not any(isinstance(value, Tensor) for value in kwargs.values())
        places, constants = [], list(args)
        for i, value in enumerate(args):
            if isinstance(value, Tensor):
                places.append((i, self._known(value)))
            elif isinstance(value, list) and any(isinstance(v, Tensor) for v in value):
                places.append((i, [None if v is None else self._known(v) for v in value]))
            else:
                continue
            constants[i] = None  # not to be kept alive
        reads = {n for _, m in places for n in (m if isinstance(m, list) else [m])} - {None}
        number = self._new(result)
        makes = None if func._schema.is_mutable else number
        if func is torch.ops.aten.new_empty.default:
            func, kwargs = Tensor.new_empty, dict(dtype=result.dtype)
        func = _FASTER.get(func, func)

        def step(values: Values) -> None:
            filled = constants.copy()
            for i, n in places:
                if isinstance(n, list):
                    filled[i] = [None if m is None else values[m] for m in n]
                else:
                    filled[i] = values[n]
            values[number] = func(*filled, **kwargs)

        self.steps.append(Step(step, reads, makes))
