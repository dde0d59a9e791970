// alpha p core^T, the small product that ends three passes.
#pragma once

#include "multiply.cuh"

namespace secura {

// A block's rows and 64 of its ranks, in float32 whatever p is: the core is trained in float32, and
// M r^2 operations are few.
using ByCore = Accumulator<64, 64, 32, 16>;

// p core^T at rows m0... and ranks j0..., p being in global memory, written by this block.
template <typename P>
__device__ __forceinline__ ByCore times_core(const P* p, int M, int r, const Matrix& core, int m0,
                                             int j0, unsigned char* memory) {
  ByCore q;
  multiply<float, Along::DEPTH, Along::DEPTH>(q, packed<P>(p, M, r), m0, operand<float>(core), j0,
                                              memory);
  return q;
}

// q = alpha p core^T (M, padded) at the block's rows; zeros beyond r.
template <typename P, typename Q>
__device__ __forceinline__ void project_rows(const P* p, int M, int r, int padded,
                                             const Matrix& core, float alpha, Q* q, int m0,
                                             unsigned char* memory) {
  __syncthreads();  // p is read back by other threads than wrote it
  for (int j0 = 0; j0 < padded; j0 += ByCore::COLUMNS) {
    const ByCore sum = times_core(p, M, r, core, m0, j0, memory);
    for_elements<ByCore>([&](int i, int j, int e) {
      const int row = m0 + ByCore::row(i, e), column = j0 + ByCore::column(j, e);
      if (row < M && column < padded) {
        q[static_cast<int64_t>(row) * padded + column] = from_float<Q>(alpha * sum.value[i][j][e]);
      }
    });
  }
}

}  // namespace secura
