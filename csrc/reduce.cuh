// Sums over a warp, in one order; and of integers, in any, sums and maxima over a block.
#pragma once

#include "types.cuh"

namespace secura {

template <typename T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, mask);
  }
  return value;
}

// Raises *to, unless it is null, by the block's sum, warp by warp: integers, so the order does not
// matter.
__device__ __forceinline__ void add_count(int count, unsigned long long* to) {
  if (to == nullptr) {
    return;
  }
  count = sum_of_warp(count);
  if (threadIdx.x % 32 == 0 && count > 0) {
    atomicAdd(to, static_cast<unsigned long long>(count));
  }
}

// *largest = max(*largest, the warps' largest bits).
__device__ __forceinline__ void raise_largest(int bits, int* largest) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, mask));
  }
  if (threadIdx.x % 32 == 0) {
    atomicMax(largest, bits);
  }
}

}  // namespace secura
