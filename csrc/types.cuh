// Element types, their conversions, and 16-byte chunks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace secura {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

template <typename A, typename B>
constexpr bool Is = std::is_same<A, B>::value;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(float16 value) { return __half2float(value); }

// Rounded to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (Is<T, bfloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (Is<T, float16>) {
    return __float2half_rn(value);
  } else {
    return value;
  }
}

// COUNT elements that are loaded and stored in one access.
template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Vector {
  T value[COUNT];
};

// 16 bytes of T.
template <typename T>
using Chunk = Vector<T, 16 / sizeof(T)>;

// What a layer's gate is saved in [secura_kernels/backends/gate_code.py].
template <typename T>
using GateCode = std::conditional_t<Is<T, bfloat16>, uint8_t,
                                    std::conditional_t<Is<T, float16>, int16_t, float>>;

}  // namespace secura
