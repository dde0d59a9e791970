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

    def R(self) -> Tensor:
        return passes.rows(self.on.layer)

    def gather(self) -> None:
        passes.columns(self.on.layer)

    def down(self) -> None:
        passes.down(self.on.x, self.R(), self.on.core, 1.0, p_dtype=self.on.dtype)

    def down_of_gradient(self) -> None:
        passes.down(
            self.on.dy, self.C, self.on.core, 1.0, p_dtype=torch.float32, transpose_core=True
        )

    def project(self) -> None:
        passes.project(self.on.dy, self.on.rows, self.on.core, 1.0, q_dtype=self.on.dtype)

    def epilogue(self) -> None:
        passes.epilogue(self.on.y, self.on.h, self.C, self.on.gated)

    def gate_backward(self) -> None:
        passes.gate_backward(self.on.dy, self.on.code, self.C, self.on.layer, (True, True, False))

    def core_gradient(self) -> None:
        passes.core_gradient(self.on.v[0], self.on.t, self.on.layer)

    def effective_weight(self) -> None:
        passes.effective_weight(self.on.change._replace(R=self.R()))

    def product(self) -> None:
        passes.product(self.on.x, self.on.W, self.on.h, self.C)

    def product_of_input_gradient(self) -> None:
        passes.product(self.on.dy, self.on.W.T, self.on.h, self.R())

    def product_gate(self) -> None:
        passes.product(self.on.x, self.on.W, self.on.h, self.C, finish=self.on.gated)


# The base product alone: what cuBLAS multiplies in the frozen layer.
LIBRARY: dict[str, Callable[[Inputs], Tensor]] = {
    "product": lambda inputs: F.linear(inputs.x, inputs.W),
    "product_gate": lambda inputs: F.linear(inputs.x, inputs.W),
    "product_of_input_gradient": lambda inputs: inputs.dy @ inputs.W,
}
