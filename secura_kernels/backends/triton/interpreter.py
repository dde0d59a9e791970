"""Two repairs of Triton's interpreter, which runs the kernels on the CPU (``TRITON_INTERPRET=1``).

It keeps bfloat16 as bit patterns in uint16, but ``tl.dot`` multiplies those patterns as integers,
and a cast from float32 cuts off the low bits where the GPU rounds to nearest even (seen in Triton
3.6 to 3.9). The compiled kernels have neither fault, and no kernel is written around them.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Nearest bfloat16 as bit patterns, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


class _Repaired(interpreter.InterpreterBuilder):
    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return super().create_dot(
            _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc
        )

    def cast_impl(self, src, dst_type):
        target = dst_type.scalar
        if src.dtype.scalar == tl.float32 and target == tl.bfloat16:
            return interpreter.TensorHandle(_to_bfloat16(src.data), target)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    create_fp_trunc = cast_impl


def repair() -> None:
    """Puts the repairs in place; once is enough, twice does no harm."""
    interpreter.interpreter_builder.__class__ = _Repaired
