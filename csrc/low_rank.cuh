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

// The columns of a row, of `columns`, that the `part`-th of `parts` blocks takes: whole steps of
// STEP.
template <int STEP>
__device__ __forceinline__ int first_column(int columns, int part, int parts) {
  const int steps = (columns + STEP - 1) / STEP, each = (steps + parts - 1) / parts;
  return min(part * each * STEP, columns);
}

// p = the sum of `parts` matrices (M, r), one after another, at the block's rows, in order.
template <int ROWS, int THREADS, typename P>
__device__ __forceinline__ void sum_of_parts(const float* part, int parts, P* p, int M, int r,
                                             int m0) {
  const int64_t count = int64_t{min(M - m0, ROWS)} * r, first = int64_t{m0} * r;
  for (int64_t i = first + threadIdx.x; i < first + count; i += THREADS) {
    float sum = 0.0f;
    for (int n = 0; n < parts; ++n) {
      sum += part[n * int64_t{M} * r + i];
    }
    p[i] = from_float<P>(sum);
  }
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
