// S-MagNorm element by element [secura_kernels/backends/reference/gate.py], with z in units of ln 2:
//
//   rho = |d| / (|b| + eps)          e = 2^(rho * slope - offset) = exp(z)
//   g = 1 + 1 / (1 + e)              s = 1 / g = 1 - 1 / (2 + e)
//   both from one reciprocal of (1 + e)(2 + e)
#pragma once

#include "instructions.cuh"
#include "passes.h"

namespace secura {

// At e = 2^60 the gate is 1 to float32's last bit, and (1 + e)(2 + e) does not overflow.
constexpr float LARGEST_EXPONENT = 60.0f;

__device__ __forceinline__ float relative_magnitude(float b, float d, float eps) {
  return fabsf(d) * reciprocal(fabsf(b) + eps);
}

__device__ __forceinline__ float exp_z(float rho, float slope, float offset) {
  const float z = rho * slope - offset;
  return power_of_2(z > LARGEST_EXPONENT ? LARGEST_EXPONENT : z);  // NaN stays NaN
}

struct GateValue {
  float g, s;
};

// Where d == 0: beta and 1 / beta, and the output is then b.
__device__ __forceinline__ GateValue gate_value(float b, float d, float slope, const Gate& gate) {
  const float e = exp_z(relative_magnitude(b, d, gate.eps), slope, gate.offset);
  const float upper = 2.0f + e, lower = 1.0f + e, both = reciprocal(upper * lower);
  return d == 0.0f ? GateValue{gate.beta, gate.by_beta}
                   : GateValue{1.0f + upper * both, 1.0f - lower * both};
}

// ((beta - 1 + decay) b + decay d) s, and b itself where nothing moved and decayed.
__device__ __forceinline__ float apply_gate(float b, float d, float s, const Gate& gate,
                                            float decay) {
  return d == 0.0f ? b * (1.0f + (decay - 1.0f) * gate.by_beta)
                   : ((gate.beta - 1.0f + decay) * b + decay * d) * s;
}

// Floats from here on, up to twice as large, are integers apart: their low bits are the code.
constexpr float INTEGERS = 12582912.0f;

// What is saved: s itself in float32, else the linear code of g [gate_code.py], added to INTEGERS.
template <typename Code>
__device__ __forceinline__ float encode(GateValue value, const Gate& gate) {
  if constexpr (Is<Code, float>) {
    return value.s;
  } else {
    constexpr float LAST = Is<Code, uint8_t> ? 255.0f : 65535.0f;
    // Adding 1.5 * 2^23 rounds to an integer. NaN has no code; any will do, the output it belongs
    // to is NaN already.
    const float steps = (gate.top - value.g) * gate.code_steps;
    return __fadd_rn(fminf(fmaxf(steps, 0.0f), LAST) + gate.code_low, INTEGERS);
  }
}

// s from what `encode` saved.
template <typename Code>
__device__ __forceinline__ float decode(Code saved, const Gate& gate) {
  if constexpr (Is<Code, float>) {
    return saved;
  } else {
    const float steps = static_cast<float>(saved) - gate.code_low;
    return reciprocal(gate.top - steps * gate.by_steps);
  }
}

// Bits that order as the values of rho do, NaN above all.
__device__ __forceinline__ int bits_of(float rho) { return __float_as_int(fabsf(rho)); }

// slope / max(rho) for ref = "max"; slope itself where there is no such pointer. Not > 0: nothing
// moved, or a NaN, which is its own token's affair. Never so small that the quotient overflows.
__device__ __forceinline__ float slope_of(const Gate& gate, const int* largest) {
  if (largest == nullptr) {
    return gate.slope;
  }
  const float value = __int_as_float(*largest);
  return gate.slope / (value > 0.0f ? fmaxf(value, 0x1p-100f) : 1.0f);
}

}  // namespace secura
