"""The formulas of ``tools/costs.py`` against the loads and stores of the kernels themselves."""

import numpy as np
import pytest
import torch
from devices import GPU
from triton.runtime import interpreter

from secura_kernels.backends.triton.tiles import TABLES
from secura_kernels.tools.cases import ADAPTERS, Inputs
from secura_kernels.tools.costs import Batch, Layer

pytestmark = pytest.mark.skipif(GPU, reason="counted in the interpreter")
M, N, K, r = 192, 512, 256, 24
TILE = TABLES[0]["product"][0]


class Traffic:
    """Distinct bytes that a run reads, its own results not counted, and those that it writes."""

    def __init__(self, monkeypatch) -> None:
        self.read, self.written = set(), set()
        builder = type(interpreter.interpreter_builder)
        load, store = builder.create_masked_load, builder.create_masked_store

        def counting_load(self_, ptrs, mask, *rest):
            self.read |= self.bytes(ptrs, mask) - self.written
            return load(self_, ptrs, mask, *rest)

        def counting_store(self_, ptrs, value, mask, *rest):
            self.written |= self.bytes(ptrs, mask)
            return store(self_, ptrs, value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", counting_load)
        monkeypatch.setattr(builder, "create_masked_store", counting_store)

    @staticmethod
    def bytes(ptrs, mask) -> set[int]:
        width = ptrs.get_element_ty().primitive_bitwidth // 8
        first = np.asarray(ptrs.data)[np.asarray(mask.data)]
        return {int(a) + i for a in np.unique(first) for i in range(width)}


RUNS = {
    "gather": Inputs.gather,
    "down": Inputs.down,
    "down_of_gradient": Inputs.down_of_gradient,
    "project": Inputs.project,
    "product": lambda i: i.product(TILE),
    "product_of_input_gradient": lambda i: i.product_of_input_gradient(TILE),
    "product_gate": lambda i: i.product_gate(TILE),
    "epilogue": Inputs.epilogue,
    "gate_backward": Inputs.gate_backward,
    "core_gradient": Inputs.core_gradient,
    "effective_weight": Inputs.effective_weight,
    "own_core": Inputs.own_core,
    "own_core_of_gradient": Inputs.own_core_of_gradient,
    "batched_epilogue": Inputs.batched_epilogue,
    "core_parts": Inputs.core_parts,
    "bias_parts": Inputs.bias_parts,
    "sum_of_core_parts": Inputs.sum_of_core_parts,
    "sum_of_bias_parts": Inputs.sum_of_bias_parts,
}


@pytest.mark.parametrize("name", RUNS)
def test_bytes_of_a_pass(name, monkeypatch):
    inputs = Inputs(M, N, K, r, torch.bfloat16, "cpu")
    cost = getattr(Batch(M, N, K, r, A=ADAPTERS, I=ADAPTERS), name)()
    traffic = Traffic(monkeypatch)
    RUNS[name](inputs)
    assert (len(traffic.read), len(traffic.written)) == (cost.read, cost.written)


@pytest.mark.parametrize(("gate", "one_pass"), [(True, True), (True, False), (False, True)])
def test_bytes_of_a_layer(gate, one_pass):
    """Forward and backward at 8192, 4096, 4096, r = 64. LoRAFusion measured 1.26 GiB for LoRA
    alone, and 2.01 for PEFT's."""
    layer = Layer(8192, 4096, 4096, 64)
    cost = layer.forward(gate, one_pass) + layer.backward(gate)
    assert cost.bytes <= 0.85 * 2**30
    assert layer.saved_bytes(gate) <= layer.M * layer.N * layer.e * (0.5 * gate + layer.r / layer.N)


def test_operations_match_the_op():
    """The formulas count the operations that the registered ops report."""
    from secura_kernels.ops.linear import _bwd_flops, _fwd_flops

    layer = Layer(512, 256, 384, 16)
    forward = _fwd_flops((512, 384), (256, 384), None, (16, 16))
    for gate in (True, False):
        assert layer.forward(gate, True).flops == forward
    backward = _bwd_flops(
        (512, 256), (256, 384), (16, 16), *[None] * 9, 1.0, [], True, (True, True, False)
    )
    without_gate = layer.backward(False).flops
    assert without_gate == backward
    # With a gate dT R costs nothing: it is in G' before the one product (identity 3).
    assert layer.backward(True).flops == backward - 2 * 512 * 16 * 384
