"""Measures the shipped tile configurations on the GPU at hand and keeps each shape's fastest.

``python -m secura_kernels tune`` runs it; the result lies in the user's cache
(``tune_cache.py``) and is used from then on. A stopped run is resumed: what was measured
is not measured again. Passes are timed in CUDA graphs: a launch takes the host longer than a short
pass takes the GPU.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from tqdm import tqdm

from ..backends.triton import chips, tune_cache
from ..backends.triton.dispatch import tuned_name
from ..backends.triton.tiles import Tile, rows_of
from .cases import RUNS, Inputs, run
from .replay import FAILURES, first_line, replayed_ms

# N, K of the linear layers of common models: Llama-3.1-8B, Qwen2-7B, Gemma-2-2B.
LAYERS = (
    (4096, 4096),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
    (3584, 3584),
    (512, 3584),
    (18944, 3584),
    (3584, 18944),
    (2048, 2304),
    (9216, 2304),
    (2304, 9216),
)
PASSES = (
    "down",
    "project",
    "epilogue",
    "gate_backward",
    "gate_backward_and_bias",
    "effective_weight",
    "weight_core_gradient",
)
# Choices of a product: its row of the tile table, its run, what it needs before it, and the
# library's form of the same. With a bias or a stored R *down* comes before either form.
PRODUCTS = {
    "product": ("product", Inputs.product, Inputs.down, Inputs.library),
    "product_gate": ("product_gate", Inputs.product_gate, Inputs.down, Inputs.library_gate),
    "product_after_down": ("product", Inputs.product, None, Inputs.library_after_down),
    "product_gate_after_down": (
        "product_gate",
        Inputs.product_gate,
        None,
        Inputs.library_gate_after_down,
    ),
    "product_of_input_gradient": (
        "product",
        Inputs.product_of_input_gradient,
        None,
        Inputs.library_of_input_gradient,
    ),
}


@dataclass(frozen=True)
class Job:
    """One choice to measure: a pass at a shape."""

    name: str
    M: int
    N: int
    K: int
    r: int
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """As the pass itself looks it up."""
        rows, columns = {
            "down": (self.M, self.K),
            "project": (self.M, self.r),
            "effective_weight": (self.N, self.K),
            "weight_core_gradient": (self.N, self.K),
            "product_of_input_gradient": (self.M, self.K),
        }.get(self.name, (self.M, self.N))
        name = self.name
        if name in PRODUCTS:
            dX, after_down = name.endswith("input_gradient"), name.endswith("after_down")
            name = tuned_name(PRODUCTS[name][0], self.N if dX else self.K, dX, after_down)
        return tune_cache.key(name, self.dtype, rows, columns, chips.rank_block(self.r))


def jobs(
    layers: Iterable[tuple[int, int]],
    tokens: Iterable[int],
    ranks: Iterable[int],
    dtype: torch.dtype,
) -> list[Job]:
    """Each choice once: passes that do not see a dimension share what was measured."""
    found = {}
    for (N, K), M, r in ((layer, M, r) for layer in layers for M in tokens for r in ranks):
        for name in (*PASSES, *PRODUCTS):
            if name in PRODUCTS and dtype == torch.float32:
                continue  # always the library's product
            job = Job(name, M, N, K, r, dtype)
            found.setdefault(job.key, job)
    return list(found.values())


def fastest(
    job: Job, device: torch.device, time: Callable[[Callable[[], None]], float]
) -> tuple[dict | str | None, dict[str, str]]:
    """Fields of the fastest tile of a pass, or ``tune_cache.LIBRARY`` for a product that loses, or
    None where nothing could be measured; and why candidates are left out."""
    inputs = Inputs(job.M, job.N, job.K, job.r, job.dtype, device)
    name, function, before, library = PRODUCTS.get(
        job.name, (job.name, RUNS.get(job.name, (None,))[0], None, None)
    )
    left_out: dict[str, str] = {}

    def measured(candidate: str, run_it: Callable[[], None]) -> float:
        try:
            return time(run_it)
        except FAILURES as error:
            left_out[candidate] = first_line(error)
            return math.inf

    times: dict[Tile | str, float] = {}
    first = measured("what comes before it", lambda: before(inputs)) if before else 0.0
    for tile in rows_of(name, chips.chip_of(device), job.dtype, chips.rank_block(job.r)):
        alone = measured(str(tile), lambda tile=tile: run(name, inputs, tile, function))
        times[tile] = first + alone
    if library is not None:
        times[tune_cache.LIBRARY] = measured("the library's product", lambda: library(inputs))
    best = min(times, key=times.__getitem__)
    if math.isinf(times[best]):
        return None, left_out
    return best if best == tune_cache.LIBRARY else asdict(best), left_out


def tune(
    work: list[Job],
    device: torch.device,
    file: Path,
    *,
    again: bool = False,
    time: Callable[[Callable[[], None]], float] = replayed_ms,
) -> dict[str, dict | str]:
    """Measures every job that ``file`` does not hold (for ``again``: all), saving as it goes.

    A candidate that raises is left out, said so, and stands in the file with its reason.

    Returns the entries of the file.
    """
    entries, left_out = dict(tune_cache.load(file)), tune_cache.left_out(file)
    about = dict(torch=torch.__version__, triton=triton.__version__, device=str(device))
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name(device)
    left = [job for job in work if again or job.key not in entries]
    progress = tqdm(left, desc="tuning", unit="choice", disable=not left)
    for job in progress:
        progress.set_postfix_str(job.key)
        best, reasons = fastest(job, device, time)
        for candidate, reason in reasons.items():
            progress.write(f"left out: {job.key}: {candidate}: {reason}")
        if best is not None:  # or it is tried again
            entries[job.key] = best
        left_out.pop(job.key, None)
        if reasons:
            left_out[job.key] = reasons
        tune_cache.save(file, entries, about, left_out)
    return entries
