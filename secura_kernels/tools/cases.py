"""One run of each pass by name, on inputs of any device: what ``inspect`` compiles (on "meta"
tensors, which have no memory) and ``tune`` times."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.gate_code import saved_dtype
from ..backends.host import GateNumbers, padded_rank
from ..backends.operands import CurOperands
from ..backends.passes import Finish, WeightChange
from ..backends.triton.passes import adapter_sums, factors
from ..backends.triton.passes.batched_epilogue import batched_epilogue
from ..backends.triton.passes.core_gradient import core_gradient, programs_over_rows
from ..backends.triton.passes.decode import decode
from ..backends.triton.passes.down import down
from ..backends.triton.passes.effective_weight import effective_weight
from ..backends.triton.passes.epilogue import epilogue, find_largest
from ..backends.triton.passes.gate_backward import gate_backward
from ..backends.triton.passes.own_core import own_core
from ..backends.triton.passes.product import product
from ..backends.triton.passes.project import project
from ..backends.triton.passes.weight_core_gradient import contracted
from ..backends.triton.tiles import Tile, column_parts, use
from ..settings import SMagNorm

ADAPTERS = 4  # of a batch of several


class Inputs:
    """Operands of a layer of M tokens, N outputs, K inputs, rank r; for the passes of a batch M is
    a multiple of ADAPTERS."""

    def __init__(
        self, M: int, N: int, K: int, r: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.r, self.dtype, self.device = r, dtype, device
        self.x, self.W, self.dy = self.random(M, K), self.random(N, K), self.random(M, N)
        self.y = self.random(M, N)
        self.core = self.random(r, r, dtype=torch.float32)
        self.cols = torch.arange(r, device=device)
        self.rows = torch.arange(r, device=device)
        self.task_gate = self.random(r, 2, dtype=torch.float32)
        self.t, self.v = (
            self.random(M, r),
            self.random(column_parts(M, N), M, r, dtype=torch.float32),
        )
        self.h = self.random(M, padded_rank(r))
        ranks = padded_rank(r)
        self.C = factors.Factor(self.random(N, ranks), None, ranks, 1, ranks)
        self.layer = CurOperands(
            self.W, None, self.core, self.cols, self.rows, None, None, None, None, 1.0, SMagNorm()
        )
        self.R = factors.rows(self.layer)
        self.gate = GateNumbers.of(SMagNorm(), dtype)
        self.code = torch.zeros(M, N, dtype=saved_dtype(dtype), device=device)
        self.cores = self.random(ADAPTERS, r, r, dtype=torch.float32)
        self.adapter = torch.arange(ADAPTERS, device=device)
        numbers = torch.arange(ADAPTERS + 1, device=device)
        self.order = adapter_sums.Order(self.adapter.clone(), numbers)
        self.biases = self.random(ADAPTERS, N, dtype=torch.float32)
        self.stored_C = self.W[:, :r].contiguous()
        self.gated = Finish(gate=self.gate, saved=self.code)
        P = self.random(N, ranks, dtype=torch.float32)
        self.change = WeightChange(self.layer, self.C.matrix, P, self.R, self.gate)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, dtype=dtype or self.dtype, device=self.device)

    def product(self, tile: Tile) -> None:
        self.y = product(self.x, self.W, self.h, self.C, tile)

    def product_of_input_gradient(self, tile: Tile) -> None:
        product(self.dy, self.W.T, self.h, self.R, tile)

    def product_gate(self, tile: Tile) -> None:
        self.y = product(self.x, self.W, self.h, self.C, tile, finish=self.gated)

    def library(self) -> None:
        """What ``product`` and ``down`` stand against."""
        y = F.linear(self.x, self.W)
        _, h = project(y, self.rows, self.core, 1.0, q_dtype=self.dtype)
        epilogue(y, h, self.C)

    def library_gate(self) -> None:
        """What ``product_gate`` and ``down`` stand against."""
        y = F.linear(self.x, self.W)
        _, h = project(y, self.rows, self.core, 1.0, q_dtype=self.dtype)
        epilogue(y, h, self.C, self.gated)

    def library_after_down(self) -> None:
        """What ``product`` stands against where *down* comes before either."""
        epilogue(F.linear(self.x, self.W), self.h, self.C)

    def library_gate_after_down(self) -> None:
        """The same of ``product_gate``."""
        epilogue(F.linear(self.x, self.W), self.h, self.C, self.gated)

    def library_of_input_gradient(self) -> None:
        """What ``product_of_input_gradient`` stands against."""
        epilogue(self.dy @ self.W, self.h, self.R)

    def epilogue(self) -> None:
        epilogue(self.y, self.h, self.C, self.gated)

    def largest(self) -> None:
        largest = torch.zeros(1, dtype=torch.int32, device=self.device)
        find_largest(self.y, self.h, self.C, Finish(gate=self.gate, largest=largest))

    def gather(self) -> None:
        factors.columns(self.layer).copied(self.W.shape[0], factors.READS_BEFORE_COPY + 1)

    def down(self) -> None:
        down(self.x, self.R, self.core, 1.0, p_dtype=self.dtype)

    def down_of_gradient(self) -> None:
        down(self.dy, self.C, self.core, 1.0, p_dtype=torch.float32, transpose_core=True)

    def task_gated_down(self) -> None:
        down(self.x, self.R, self.core, 1.0, p_dtype=self.dtype, task_gate=self.task_gate)

    def task_gated_down_of_gradient(self) -> None:
        down(
            self.dy,
            self.C,
            self.core,
            1.0,
            p_dtype=torch.float32,
            transpose_core=True,
            task_gate=self.task_gate,
            t=self.t,
        )

    def project(self) -> None:
        project(self.dy, self.rows, self.core, 1.0, q_dtype=self.dtype)

    def task_gated_project(self) -> None:
        project(self.dy, self.rows, self.core, 1.0, q_dtype=self.dtype, task_gate=self.task_gate)

    def project_weight(self) -> None:
        project(self.W, self.cols, self.core, 1.0, q_dtype=torch.float32, transpose_core=True)

    def gate_backward(self) -> None:
        gate_backward(
            self.dy, self.code, self.C, self.r, self.gate, decay=None, needs=(True, True, False)
        )

    def gate_backward_and_bias(self) -> None:
        gate_backward(
            self.dy, self.code, self.C, self.r, self.gate, decay=None, needs=(True, True, True)
        )

    def core_gradient(self) -> None:
        """With dT into columns of G'."""
        core_gradient(self.v, self.t, self.layer, g=self.y)

    def effective_weight(self) -> None:
        effective_weight(self.change)

    def weight_core_gradient(self) -> None:
        contracted(self.W, self.change)

    def decode(self) -> None:
        decode(self.x[:16], self.change)

    def own_core(self) -> None:
        own_core(self.t, self.cores, self.adapter, 1.0, self.dtype)

    def own_core_of_gradient(self) -> None:
        own_core(self.v[0], self.cores.mT, self.adapter, 1.0, self.dtype)

    def batched_epilogue(self) -> None:
        self._batched_epilogue(None, y=self.y, saved=self.code)

    def batched_largest(self) -> None:
        """Finds the maxima, then uses them."""
        largest = torch.zeros(len(self.adapter), dtype=torch.int32, device=self.device)
        self._batched_epilogue(largest)
        self._batched_epilogue(largest, y=self.y, saved=self.code)

    def _batched_epilogue(self, largest: Tensor | None, **outputs: Tensor) -> None:
        batched_epilogue(
            self.dy,
            self.h,
            self.adapter,
            self.stored_C,
            self.biases,
            ADAPTERS,
            self.gate,
            largest=largest,
            **outputs,
        )

    def core_parts(self) -> None:
        adapter_sums.core_parts(self.v[0], self.t, self.adapter, self.order, 1.0, ADAPTERS)

    def bias_parts(self) -> None:
        adapter_sums.bias_parts(self.dy, self.adapter, self.order, 1.0, ADAPTERS)

    def sum_of_core_parts(self) -> None:
        self._sum_of_parts(self.cores)

    def sum_of_bias_parts(self) -> None:
        self._sum_of_parts(self.biases)

    def _sum_of_parts(self, like: Tensor) -> None:
        M = len(self.y)
        parts = like.new_empty(programs_over_rows(M) + ADAPTERS - 1, *like.shape[1:])
        adapter_sums.sum_of_parts(parts, self.order, M, torch.empty_like(like))


# Row of the tile table -> the runs that use it.
RUNS: dict[str, tuple[Callable, ...]] = {
    "gather": (Inputs.gather,),
    "down": (
        Inputs.down,
        Inputs.down_of_gradient,
        Inputs.task_gated_down,
        Inputs.task_gated_down_of_gradient,
    ),
    "project": (Inputs.project, Inputs.project_weight, Inputs.task_gated_project),
    "product": (Inputs.product, Inputs.product_of_input_gradient),
    "product_gate": (Inputs.product_gate,),
    "epilogue": (Inputs.epilogue, Inputs.largest),
    "gate_backward": (Inputs.gate_backward,),
    "gate_backward_and_bias": (Inputs.gate_backward_and_bias,),
    "core_gradient": (Inputs.core_gradient,),
    "effective_weight": (Inputs.effective_weight,),
    "weight_core_gradient": (Inputs.weight_core_gradient,),
    "decode": (Inputs.decode,),
    "own_core": (Inputs.own_core, Inputs.own_core_of_gradient),
    "batched_epilogue": (Inputs.batched_epilogue, Inputs.batched_largest),
    "core_parts": (Inputs.core_parts,),
    "bias_parts": (Inputs.bias_parts,),
    "sum_of_parts": (Inputs.sum_of_core_parts, Inputs.sum_of_bias_parts),
}


def run(name: str, inputs: Inputs, tile: Tile, function: Callable) -> None:
    """Runs one of ``RUNS[name]`` with ``tile``, whatever the table would pick."""
    with use(tile):
        function(inputs, tile) if name.startswith("product") else function(inputs)
