"""A check that a user's machine computes what it should: each backend against the eager formula."""

import torch

from ..backends import reference
from ..functional.linear import cur_linear
from ..settings import SMagNorm

FORMS = {
    "no gate": None,
    "S-MagNorm on outputs": SMagNorm(),
    "S-MagNorm on outputs, full derivative": SMagNorm(detach_gate=False),
    "S-MagNorm on outputs, ref=max": SMagNorm(ref="max"),
    "S-MagNorm on the weight": SMagNorm(domain="weight"),
}
# M, N, K, r: no block divides them; on a GPU large enough for the one-pass kernel to be taken.
SHAPES = {"cpu": (67, 131, 96, 12), "cuda": (1100, 2056, 1032, 24)}


def relative_errors(
    impl: str, device: torch.device, dtype: torch.dtype, norm: SMagNorm | None, seeds: int = 4
) -> list[tuple[float, float]]:
    """Relative errors against float64 of y, dx, dcore and dadapter_bias, root mean square over
    ``seeds`` random cases: the backend's, and those of eager PyTorch in the same dtype."""
    cases = [_errors(impl, device, dtype, norm, seed) for seed in range(seeds)]
    return [
        tuple((sum(case[i][j] ** 2 for case in cases) / seeds) ** 0.5 for j in (0, 1))
        for i in range(len(cases[0]))
    ]


def _errors(impl, device, dtype, norm, seed) -> list[tuple[float, float]]:
    M, N, K, r = SHAPES[device.type]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, W, dy = (t.to(dtype) for t in (random(M, K), random(N, K) / K**0.5, random(M, N)))
    core, adapter_bias = random(r, r) * (0.3 / r), random(N) * 0.1
    cols, rows = (torch.randperm(n, generator=generator)[:r] for n in (K, N))

    def results(wide: torch.dtype | None, function) -> list[torch.Tensor]:
        """y and the gradients, with every floating argument in ``wide`` where it is given."""
        a, w, b, c, g = (
            t.to(device, wide) if wide else t.to(device) for t in (x, W, adapter_bias, core, dy)
        )
        trained = [t.requires_grad_() for t in (a, c, b)]
        y = function(a, w, c, b)
        return [y.detach(), *torch.autograd.grad(y, trained, g)]

    def eager(a, w, c, b):
        return reference.cur_linear(
            a, w, None, c, w[:, cols.to(device)], w[rows.to(device)], norm=norm, adapter_bias=b
        )

    def ours(a, w, c, b):
        return cur_linear(
            a,
            w,
            c,
            cols=cols.to(device),
            rows=rows.to(device),
            norm=norm,
            adapter_bias=b,
            impl=impl,
        )

    truth = results(torch.float64, eager)
    return [
        tuple(float((got.double() - t).norm() / t.norm()) for got in pair)
        for *pair, t in zip(results(None, ours), results(None, eager), truth, strict=True)
    ]
