"""The passes of ``tools/cases.py`` on the CUDA kernels, under the same names and on the same
inputs, and the library's products that they stand beside.

The CUDA kernels read R from a gathered copy, the Triton kernels from W itself: a pass that takes R
gathers it here each time, as the layer does.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from secura_kernels.backends.cuda import passes
from secura_kernels.tools.cases import Inputs


class CudaPasses:
    def __init__(self, inputs: Inputs) -> None:
        self.on = inputs
        self.C = inputs.C.matrix
        self.gated = passes.Finish(gate=inputs.gate, saved=inputs.code)

    def R(self) -> Tensor:
        return passes.rows(self.on.layer)

    def gather(self) -> None:
        passes.columns(self.on.layer)

    def down(self) -> None:
        passes.down(self.on.x, self.R(), self.on.core, 1.0, p_dtype=self.on.dtype)

    def down_of_gradient(self) -> None:
        passes.down(self.on.dy, self.C, self.on.core.T, 1.0, p_dtype=torch.float32)

    def project(self) -> None:
        passes.project(self.on.dy, self.on.rows, self.on.core, 1.0, q_dtype=self.on.dtype)

    def epilogue(self) -> None:
        passes.epilogue(self.on.y, self.on.h, self.C, self.gated)

    def gate_backward(self) -> None:
        passes.gate_backward(
            self.on.dy,
            self.on.code,
            self.C,
            self.on.rows,
            self.on.core,
            1.0,
            self.on.gate,
            decay=None,
            needs=(True, True, False),
        )

    def core_gradient(self) -> None:
        passes.core_gradient(self.on.v[0], self.on.t, 1.0)

    def effective_weight(self) -> None:
        passes.effective_weight(
            passes.WeightChange(self.on.W, self.on.P, self.R(), None, self.on.gate), None
        )

    def product(self) -> None:
        passes.product(self.on.x, self.on.W, self.on.h, self.C, None, passes.Finish())

    def product_of_input_gradient(self) -> None:
        passes.product(self.on.dy, self.on.W.T, self.on.h, self.R(), None, passes.Finish())

    def product_gate(self) -> None:
        passes.product(self.on.x, self.on.W, self.on.h, self.C, None, self.gated)


# The base product alone: what cuBLAS multiplies in the frozen layer.
LIBRARY: dict[str, Callable[[Inputs], Tensor]] = {
    "product": lambda inputs: F.linear(inputs.x, inputs.W),
    "product_gate": lambda inputs: F.linear(inputs.x, inputs.W),
    "product_of_input_gradient": lambda inputs: inputs.dy @ inputs.W,
}
