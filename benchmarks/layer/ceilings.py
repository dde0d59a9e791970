"""What the device itself reaches, measured in the run it is compared with."""

import statistics

import torch
from timing import Clock


def measure(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """``bandwidth``: bytes/s of a copy, read plus written; ``flops``: FLOP/s of a product."""
    elements, size = (2**28, 8192) if device.type == "cuda" else (2**25, 1536)
    source = torch.randn(elements, device=device).to(dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    copied = _median_seconds(lambda: target.copy_(source), device)
    multiplied = _median_seconds(lambda: torch.mm(a, b, out=out), device)
    return dict(bandwidth=2 * source.nbytes / copied, flops=2 * size**3 / multiplied)


def _median_seconds(function, device: torch.device) -> float:
    clock, times = Clock(device), []
    for i in range(13):
        start = clock.mark()
        function()
        end = clock.mark()
        if i >= 3:
            times.append(clock.between(start, end) / 1e3)
    return statistics.median(times)
