// delta_W = P R tile by tile, and W beside it: what the weight-domain passes share.
#pragma once

#include "finish.cuh"
#include "multiply.cuh"

namespace secura {

// base = W, change = delta_W at rows n0... and columns k0..., both in float32.
template <typename T, class Accumulator>
__device__ __forceinline__ void weight_and_change(Accumulator& base, Accumulator& change,
                                                  const WeightChange& p, int n0, int k0,
                                                  unsigned char* memory) {
  const Operand<T> weight = operand<T>(p.weight);
  multiply<float, Along::DEPTH, Along::DEPTH>(
      change, packed<float>(p.P, weight.rows, p.padded), n0,
      packed<T>(p.side, weight.depth, p.padded), k0, memory);
  load(base, weight, n0, k0);
}

}  // namespace secura
