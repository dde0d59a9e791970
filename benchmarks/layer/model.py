"""The layer's time on a GPU, predicted from bytes and operations; nothing here is measured.

    python benchmarks/layer/model.py

A pass takes the longest of its bytes over the copy bandwidth, its operations over the matrix rate
and its instructions over what the schedulers issue, and a launch; a layer takes the sum of its
passes. An H100 took 5 % longer without a gate and 15 % with it (benchmarks/results, M, N, K = 8192,
4096, 4096, r = 64). The bytes and operations are those of ``secura_kernels/tools/costs.py``, the
instructions those that ``make codegen`` allows. Left out: what tiles lose at the edges of a shape,
float32 products with the core (several times slower than the matrix rate), and the 32-byte sectors
that a column of W or y0 is read by.
"""

import argparse
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from secura_kernels.backends.triton.dispatch import GATE_IN_SPECIAL, assumed_loss
from secura_kernels.backends.triton.tiles import INSTRUCTIONS
from secura_kernels.tools.costs import Cost, Layer

# Seconds that a kernel takes beyond its bytes and operations: start, ramp and tail. Assumed.
LAUNCH = 3e-6

GPUS_PER_NODE = 8
MOST_GPUS = 1024
NETWORK = 50e9  # bytes/s per GPU between nodes, one direction: 400 Gb/s. Assumed.
MODES = ("ddp", "tp", "fsdp")
TOLERANCE = 1.25

SHAPES = ((8192, 4096, 4096), (16384, 8192, 8192), (2048, 4096, 4096))  # M, N, K
RANKS = (16, 64, 150, 256)
WIDTH = 100  # columns of what is printed


@dataclass(frozen=True)
class Ceilings:
    """What a chip sustains.

    ``flops``: dense bfloat16 FLOP/s of a large product. ``bandwidth``: bytes/s of a copy, read and
    written. ``link``: bytes/s per GPU of the interconnect within a node, one direction.
    ``special``: special functions (reciprocal, exp2) a second: SMs x 16 a cycle x clock.
    ``bulk``: whether our product without a gate is that of bulk copies.
    """

    name: str
    flops: float
    bandwidth: float
    link: float
    special: float
    bulk: bool = False


# ASSUMED SUSTAINED values, none measured by this project: H100 ``flops`` and ``bandwidth`` are the
# planning figures behind backends/triton/README.md, the others are guesses by the same rule, what a
# large product and a large copy usually reach below the data sheet. ``link`` is half of the data
# sheet's NVLink figure (both directions); SMs and boost clocks are the data sheets'.
CEILINGS = {
    "A100": Ceilings("A100 80GB SXM", 250e12, 1.75e12, 300e9, 108 * 16 * 1.41e9),
    "H100": Ceilings("H100 SXM", 790e12, 3.0e12, 450e9, 132 * 16 * 1.755e9, bulk=True),
    "H200": Ceilings("H200 SXM", 790e12, 4.0e12, 450e9, 132 * 16 * 1.755e9, bulk=True),
    "B200": Ceilings("B200", 1.6e15, 6.5e12, 900e9, 148 * 16 * 1.85e9),
}


def _seconds(
    cost: Cost, ceilings: Ceilings, *, loss: float = 0.0, instructions: int = 0, exposed: int = 0
) -> float:
    """Of one kernel. ``loss``: how much longer its operations take than the library's.
    ``instructions``: of all lanes. ``exposed``: special functions that run after the rest."""
    return (
        LAUNCH
        + exposed / ceilings.special
        + max(
            cost.bytes / ceilings.bandwidth,
            cost.flops * (1 + loss) / ceilings.flops,
            instructions / (8 * ceilings.special),  # 128 lanes a cycle and processor
        )
    )


def _loss(layer: Layer, gate: bool, ceilings: Ceilings) -> float:
    """Of our product."""
    return assumed_loss(gate, layer.r, ceilings.bulk)


def _total(times: dict[str, float]) -> float:
    return sum(times.values())


def forward_times(layer: Layer, gate: bool, ceilings: Ceilings) -> dict[str, float]:
    """Seconds of each forward pass, of whichever form is predicted faster."""
    instructions = INSTRUCTIONS["epilogue"] * layer.M * layer.N * gate
    gather = {"forward gather": _seconds(layer.gather(), ceilings)}
    product = layer.product_gate() if gate else layer.product()
    one_pass = gather | {
        "forward down": _seconds(layer.down(), ceilings),
        "forward one pass": _seconds(
            product,
            ceilings,
            loss=_loss(layer, gate, ceilings),
            exposed=GATE_IN_SPECIAL * layer.M * layer.N * gate,
        ),
    }
    epilogue = (layer if gate else replace(layer, g=0)).epilogue()
    library = gather | {
        "forward library": _seconds(layer.library(layer.M, layer.N, layer.K), ceilings),
        "forward project": _seconds(layer.project(), ceilings),
        "forward epilogue": _seconds(epilogue, ceilings, instructions=instructions),
    }
    return min(one_pass, library, key=_total)


def backward_times(layer: Layer, gate: bool, ceilings: Ceilings) -> dict[str, float]:
    """Seconds of each backward pass, of whichever form is predicted faster; with a gate there is
    one form only."""
    library = {"backward library": _seconds(layer.library(layer.M, layer.K, layer.N), ceilings)}
    core = {
        "backward core gradient": _seconds(layer.core_gradient(spread=gate), ceilings),
        "backward sum of parts": _seconds(layer.sum_of_parts(), ceilings),
    }
    times = {"backward gather": _seconds(layer.gather(), ceilings)} | core
    if gate:
        instructions = INSTRUCTIONS["gate_backward"] * layer.M * layer.N
        return (
            times
            | library
            | {
                "backward gate": _seconds(
                    layer.gate_backward(), ceilings, instructions=instructions
                )
            }
        )
    times["backward down"] = _seconds(layer.down_of_gradient(), ceilings)
    one_pass = times | {
        "backward one pass": _seconds(
            layer.product_of_input_gradient(), ceilings, loss=_loss(layer, False, ceilings)
        )
    }
    # dX has K columns: the epilogue of a layer with inputs and outputs exchanged.
    exchanged = replace(layer, N=layer.K, K=layer.N, g=0)
    library["backward epilogue"] = _seconds(exchanged.epilogue(), ceilings)
    return min(one_pass, times | library, key=_total)


def pass_times(layer: Layer, gate: bool, ceilings: Ceilings) -> dict[str, float]:
    """Seconds of each pass of forward and backward, of the forms predicted faster.

    Our one-pass product is slower than the library's by ``dispatch.assumed_loss``, and the gate's
    special functions come after it. The choice is this model's: ``dispatch.plan`` counts neither
    launches nor the pass that *project* saves, and may choose otherwise.
    """
    return forward_times(layer, gate, ceilings) | backward_times(layer, gate, ceilings)


def frozen(layer: Layer, ceilings: Ceilings) -> float:
    """Seconds of a frozen ``nn.Linear``: forward and input gradient, one library product each."""
    M, N, K = layer.M, layer.N, layer.K
    return _seconds(layer.library(M, N, K), ceilings) + _seconds(layer.library(M, K, N), ceilings)


def ratio(layer: Layer, gate: bool, ceilings: Ceilings) -> float:
    """The layer's forward and backward over those of the frozen linear."""
    return _total(pass_times(layer, gate, ceilings)) / frozen(layer, ceilings)


def lora(layer: Layer, ceilings: Ceilings) -> float:
    """Seconds of PEFT's eager LoRA of the same rank: forward, gradients of x, A and B.

    Adapters in bfloat16 (float32 ones, PEFT's default outside autocast, cost more), no dropout,
    every result to memory and back. ``result + B(A(x)) * scaling`` and its gradient are 12 kernels:

    - forward: x Wᵀ, t = x Aᵀ, d = t Bᵀ, scaled d (reads and writes M N), result + d (reads 2 M N,
      writes M N);
    - backward: dY W, dd = scaled dY (reads and writes M N), dt = dd B, dB = ddᵀ t, dA = dtᵀ x,
      dt A, its sum with dY W (reads 2 M K, writes M K).
    """
    M, N, K, r, e = layer.M, layer.N, layer.K, layer.r, layer.e
    scaled = Cost(M * N * e, M * N * e, 0)
    forward = [
        layer.library(M, N, K),
        layer.library(M, r, K),
        layer.library(M, N, r),
        scaled,
        Cost(2 * M * N * e, M * N * e, 0),
    ]
    backward = [
        layer.library(M, K, N),
        scaled,
        layer.library(M, r, N),
        layer.library(N, r, M),
        layer.library(r, K, M),
        layer.library(M, K, r),
        Cost(2 * M * K * e, M * K * e, 0),
    ]
    return sum(_seconds(cost, ceilings) for cost in forward + backward)


@dataclass(frozen=True)
class Scaling:
    """``seconds`` of a layer's step on each GPU. ``efficiency``: t(1) / t(g) where the tokens per
    GPU are fixed (ddp, fsdp), t(1) / (g t(g)) where the layer is split (tp)."""

    seconds: float
    efficiency: float


def scaling(layer: Layer, gate: bool, ceilings: Ceilings, gpus: int, mode: str) -> Scaling:
    """The layer on several GPUs. Collectives are rings bound by bandwidth: no latency.

    Args:
        layer: what one GPU computes in "ddp" and "fsdp"; the whole layer in "tp".
        gpus: 1 to 1,024; above 8 the slowest link is the network, ``NETWORK``. "tp": 1 to 8.
        mode: "ddp": after the backward pass the float32 (r, r) gradient is all-reduced (of CABR's
            factors: that of the core they make), not overlapped. "tp": each GPU holds
            N / gpus rows of W, and all-reduces v (M, r) in float32 and dX (M, K), not overlapped;
            R is kept by every GPU, or *project*'s t gathered, r / 2K of dX's bytes and left out.
            "fsdp": W (N, K) is gathered beside the forward pass and again beside the backward
            pass, where the (r, r) gradient is reduce-scattered too; each takes the longer of
            computing and communicating.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: must be one of {', '.join(map(repr, MODES))}")
    _check_gpus(gpus, GPUS_PER_NODE if mode == "tp" else MOST_GPUS, mode)
    core = layer.r**2 * 4
    forward = _total(forward_times(layer, gate, ceilings))
    backward = _total(backward_times(layer, gate, ceilings))
    alone = forward + backward
    if mode == "ddp":
        seconds = alone + 2 * _ring(core, ceilings, gpus)
        return Scaling(seconds, alone / seconds)
    if mode == "tp":
        part = replace(layer, N=-(-layer.N // gpus))
        reduced = layer.M * layer.K * layer.e + layer.M * layer.r * 4
        seconds = _total(pass_times(part, gate, ceilings)) + 2 * _ring(reduced, ceilings, gpus)
        return Scaling(seconds, alone / (gpus * seconds))
    weight = layer.N * layer.K * layer.e
    seconds = max(forward, _ring(weight, ceilings, gpus)) + max(
        backward, _ring(weight + core, ceilings, gpus)
    )
    return Scaling(seconds, alone / seconds)


def full_fine_tuning(layer: Layer, ceilings: Ceilings, gpus: int) -> Scaling:
    """What "ddp" is compared with: a linear layer that trains W. Three library products, then the
    all-reduce of the dense (N, K) gradient in the layer's dtype, not overlapped."""
    _check_gpus(gpus, MOST_GPUS, "ddp")
    alone = frozen(layer, ceilings) + _seconds(layer.library(layer.N, layer.K, layer.M), ceilings)
    seconds = alone + 2 * _ring(layer.N * layer.K * layer.e, ceilings, gpus)
    return Scaling(seconds, alone / seconds)


def _check_gpus(gpus: int, most: int, mode: str) -> None:
    if not 1 <= gpus <= most:
        raise ValueError(f"gpus={gpus}: must be 1 to {most:,} for mode={mode!r}")


def _ring(size: int, ceilings: Ceilings, gpus: int) -> float:
    """Seconds of a ring all-gather or reduce-scatter of ``size`` bytes; an all-reduce is both."""
    link = ceilings.link if gpus <= GPUS_PER_NODE else NETWORK
    return (gpus - 1) / gpus * size / link


def flag(predicted: float, measured: float) -> bool:
    """Whether a measured time is more than 1.25 x off the prediction, either way; NaN is."""
    return not predicted / TOLERANCE <= measured <= predicted * TOLERANCE


def _ratio_table(ceilings: Ceilings) -> Table:
    table = Table(
        "M, N, K",
        "r",
        "S-MagNorm",
        "no gate",
        "LoRA (PEFT)",
        title="predicted, not measured: forward + backward ÷ frozen linear, bfloat16, "
        f"{ceilings.name}",
        min_width=WIDTH,
    )
    for M, N, K in SHAPES:
        for r in RANKS:
            layer = Layer(M, N, K, r)
            ratios = (
                ratio(layer, True, ceilings),
                ratio(layer, False, ceilings),
                lora(layer, ceilings) / frozen(layer, ceilings),
            )
            table.add_row(
                f"{M}, {N}, {K}",
                str(r),
                *(f"{value:.3f}" for value in ratios),
                end_section=r == RANKS[-1],
            )
    return table


def _scaling_table(layer: Layer, ceilings: Ceilings) -> Table:
    table = Table(
        "GPUs",
        "ddp",
        "ddp, full fine-tuning",
        "fsdp",
        "tp",
        title="predicted, not measured: efficiency with S-MagNorm, M, N, K = "
        f"{layer.M}, {layer.N}, {layer.K}, r = {layer.r}, {ceilings.name}",
        caption="ddp, fsdp: M tokens on every GPU; tp: the layer split",
        min_width=WIDTH,
    )
    gpus = GPUS_PER_NODE
    while gpus <= MOST_GPUS:
        found = [
            scaling(layer, True, ceilings, gpus, "ddp"),
            full_fine_tuning(layer, ceilings, gpus),
            scaling(layer, True, ceilings, gpus, "fsdp"),
        ]
        if gpus <= GPUS_PER_NODE:
            found.append(scaling(layer, True, ceilings, gpus, "tp"))
        table.add_row(f"{gpus:,}", *(f"{one.efficiency:.4f}" for one in found))
        gpus *= 2
    return table


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    console = Console(width=WIDTH)
    for ceilings in CEILINGS.values():
        console.print(_ratio_table(ceilings))
    M, N, K = SHAPES[0]
    console.print(_scaling_table(Layer(M, N, K, 64), CEILINGS["H100"]))


if __name__ == "__main__":
    main()
