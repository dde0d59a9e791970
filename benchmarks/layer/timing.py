"""Time, memory and error of one layer's rivals: one process, interleaved, inputs rotated.

On a GPU the time is the GPU's: it is kept busy while the host issues a rival's step, or what was
measured would be the host, and only of those rivals that follow a fast one. The host's own time is
a figure beside it; what a user waits for is the larger of the two. Beside both stands the step
replayed from a CUDA graph, for which the host does nothing.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rivals import Rival, rivals
from shapes import DTYPES, Case
from torch import Tensor, nn

from secura_kernels.tools.replay import FAILURES, Recorder, first_line

MODES = ("forward", "backward", "both")
WARM_UP = 3
CACHE_BYTES = {"cpu": 0, "cuda": 256 * 2**20}  # rotated inputs exceed the last cache by far
# Of the GPU: 5 ms on an H100, longer than any host takes for a step, and for a replay.
BUSY_CYCLES, BUSY_CYCLES_REPLAY = 10**7, 10**6


@dataclass
class Inputs:
    """x (M, K) and dy (M, N), several of each, so that no run finds its own in the cache."""

    pairs: list[tuple[Tensor, Tensor]]

    @classmethod
    def random(cls, case: Case, device: torch.device) -> "Inputs":
        dtype = DTYPES[case.dtype]
        generator = torch.Generator(device).manual_seed(0)

        def tensor(columns: int) -> Tensor:
            return torch.randn(case.M, columns, device=device, generator=generator).to(dtype)

        bytes_each = case.M * (case.N + case.K) * dtype.itemsize
        count = min(64, 1 + CACHE_BYTES[device.type] // bytes_each)
        return cls([(tensor(case.K), tensor(case.N)) for _ in range(count)])

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.pairs[i % len(self.pairs)]


class Clock:
    """Milliseconds between marks: events on a GPU, the process's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"

    def keep_busy(self, cycles: int = BUSY_CYCLES) -> None:
        """The GPU, while the host issues what is marked next."""
        if self.gpu:
            torch.cuda._sleep(cycles)

    def mark(self):
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, end) -> float:
        if not self.gpu:
            return 1e3 * (end - start)
        end.synchronize()
        return start.elapsed_time(end)


def trained(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


def step(layer: nn.Module, x: Tensor, dy: Tensor, clock: Clock) -> tuple[tuple, tuple[Tensor, ...]]:
    """One forward and backward: the three marks, then y, dx and the parameters' gradients."""
    x = x.detach().requires_grad_()
    start = clock.mark()
    y = layer(x)
    middle = clock.mark()
    gradients = torch.autograd.grad(y, [x, *trained(layer)], dy)
    return (start, middle, clock.mark()), (y.detach(), *gradients)


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def errors(
    found: dict[str, Rival], x: Tensor, dy: Tensor
) -> tuple[dict[str, float], dict[str, str]]:
    """Largest relative error of y, dx and dcore against the eager formula in float64, of each rival
    that computes it; the eager ones among them.

    Also those that fail, or are off by more than three times eager PyTorch plus 1e-5, and how: they
    do not compute the same, so they must not be timed beside the others.
    """
    truths, off, wrong = {}, {}, {}
    for name, rival in found.items():
        plain = rival.truth or (name if name.endswith(", eager") else None)
        try:
            if plain is not None and plain not in truths:
                exact = copy.deepcopy(found[plain].layer).double()
                truths[plain] = step(exact, x.double(), dy.double(), Clock(x.device))[1]
            results = step(rival.layer, x, dy, Clock(x.device))[1]
        except FAILURES as error:
            wrong[name] = f"{name} failed: {first_line(error)}"
            continue
        if plain is not None:
            off[name] = max(map(relative_error, results, truths[plain]))
    for name in off:
        if not off[name] <= allowed(name, found, off):
            plain = off.get(found[name].truth or name, float("nan"))
            wrong[name] = (
                f"{name} is off by {off[name]:.1e}, eager PyTorch by "
                f"{plain:.1e}: they do not compute the same"
            )
    return off, wrong


def allowed(name: str, found: dict[str, Rival], off: dict[str, float]) -> float:
    """The largest relative error of a rival that computes what eager PyTorch does."""
    plain = found[name].truth or name
    return 3 * off[plain] + 1e-5 if plain in off else 0.0


def graphs(
    found: dict[str, Rival], off: dict[str, float], x: Tensor, dy: Tensor
) -> tuple[dict[str, Callable[[], None]], list[str]]:
    """The replay of each rival's step, and why others have none: they cannot be captured, or their
    replay is not what their step is, by more than ``errors`` allows."""
    replays, wrong, unmarked = {}, [], Clock(torch.device("cpu"))
    recorder = Recorder()
    for name, rival in found.items():
        try:
            replay, results = recorder.capture(
                lambda layer=rival.layer: step(layer, x, dy, unmarked)[1]
            )
            replay()
            again = step(rival.layer, x, dy, unmarked)[1]
        except FAILURES as error:
            wrong.append(f"{name} in a CUDA graph: {first_line(error)}")
            continue
        apart = max(map(relative_error, results, (value.double() for value in again)))
        if name in off and not apart <= allowed(name, found, off):
            wrong.append(f"{name} in a CUDA graph is off by {apart:.1e} from what it is without")
            continue
        replays[name] = replay
    return replays, wrong


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x.detach().requires_grad_())
    return sum(kept.values())


def peak_bytes(layer: nn.Module, x: Tensor, dy: Tensor) -> int | None:
    """Memory that one step allocates at its peak beyond what was there; None on a CPU."""
    if x.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(layer, x, dy, Clock(x.device))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(
    case: Case,
    device: torch.device,
    rounds: int,
    *,
    compiled: bool,
    tick: Callable[[], None] = lambda: None,
) -> tuple[list[dict], list[str]]:
    """Rows, one a rival and mode, and why rivals are missing. ``tick`` is called after each round.

    The rivals take turns within a round, in an order that turns with it, so that a machine that
    slows down slows all of them.
    """
    torch.manual_seed(0)
    torch.compiler.reset()  # or the compiler gives up after some shapes and runs the rest eagerly
    linear = nn.Linear(case.K, case.N, bias=False, device=device, dtype=DTYPES[case.dtype])
    found, missing = rivals(linear, case.r, compiled=compiled)
    inputs, clock = Inputs.random(case, device), Clock(device)
    off, wrong = errors(found, *inputs[0])
    found = {n: rival for n, rival in found.items() if n not in wrong and rival.timed}
    replays, unreplayed = graphs(found, off, *inputs[0]) if clock.gpu else ({}, [])
    missing += [
        f"{reason} ({case.model} {case.layer}, M = {case.M}, r = {case.r})"
        for reason in (*wrong.values(), *unreplayed)
    ]
    times: dict[str, dict[str, list[float]]] = {n: {m: [] for m in MODES} for n in found}
    host: dict[str, list[float]] = {name: [] for name in found}
    replayed: dict[str, list[float]] = {name: [] for name in replays}
    order = list(found)
    for i in range(WARM_UP + rounds):
        marks = {}
        for name in order:
            clock.keep_busy()
            begun = time.perf_counter()
            marks[name] = step(found[name].layer, *inputs[i], clock)[0]
            if i >= WARM_UP:
                host[name].append(1e3 * (time.perf_counter() - begun))
        for name, (start, middle, end) in marks.items():
            if i >= WARM_UP:
                times[name]["forward"].append(clock.between(start, middle))
                times[name]["backward"].append(clock.between(middle, end))
                times[name]["both"].append(clock.between(start, end))
        for name in filter(replays.__contains__, order):  # none right after its own step
            clock.keep_busy(BUSY_CYCLES_REPLAY)
            start = clock.mark()
            replays[name]()
            end = clock.mark()
            if i >= WARM_UP:
                replayed[name].append(clock.between(start, end))
        order.append(order.pop(0))
        tick()
    rows = []
    for name, by_mode in times.items():
        layer = found[name].layer
        fixed = dict(
            saved_bytes=saved_bytes(layer, inputs[0][0]),
            peak_bytes=peak_bytes(layer, *inputs[0]),
            error=off.get(name),
            host_ms=statistics.median(host[name]),
            flops=case.flops,
        )
        for mode, ms in by_mode.items():
            # Round by round: what slows the machine down for a while slows both.
            ratios = [a / b for a, b in zip(ms, times["frozen"][mode], strict=True)]
            rows.append(
                case.to_dict()
                | dict(rival=name, mode=mode)
                | summary(ms)
                | fixed
                | dict(
                    ratio=statistics.median(ratios),
                    graph_ms=statistics.median(replayed[name])
                    if mode == "both" and name in replayed
                    else None,
                )
            )
    return rows, missing


def summary(ms: list[float]) -> dict:
    quartiles = statistics.quantiles(ms, n=4) if len(ms) > 1 else ms * 3
    return dict(
        median_ms=statistics.median(ms), low_ms=quartiles[0], high_ms=quartiles[2], rounds=len(ms)
    )
