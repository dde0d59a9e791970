// alpha p core^T, the small product that ends three passes; and the task gate around it, whose
// formulas are in secura_kernels/backends/reference/task_gate.py. A warp takes a row, its lanes the
// ranks.
#pragma once

#include "multiply.cuh"
#include "reduce.cuh"

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

constexpr float LOG2_E = 1.4426950408889634f;

// What project_rows needs of shared memory, and after it the openness of the block's rows.
constexpr int PROJECT_BYTES =
    MULTIPLY_BYTES<ByCore> + ByCore::ROWS * static_cast<int>(sizeof(float));

__device__ __forceinline__ float* openness_of_rows(unsigned char* memory) {
  return reinterpret_cast<float*>(memory + MULTIPLY_BYTES<ByCore>);
}

// use(i, row) for the rows that a warp takes, i counted from the block's first.
template <typename Use>
__device__ __forceinline__ void for_rows_of_warp(int M, int m0, Use use) {
  for (int i = threadIdx.x / 32; i < min(M - m0, ByCore::ROWS); i += ByCore::THREADS / 32) {
    use(i, int64_t{m0} + i);
  }
}

// openness[i] = sigmoid(w . t + c) of the block's rows of t (M, r).
template <typename T>
__device__ __forceinline__ void find_openness(const T* t, int M, int r, const float* gate, int m0,
                                              float* openness) {
  for_rows_of_warp(M, m0, [&](int i, int64_t row) {
    float logit = 0.0f;
    for (int k = threadIdx.x % 32; k < r; k += 32) {
      logit += to_float(t[row * r + k]) * gate[2 * k] + gate[2 * k + 1];
    }
    logit = sum_of_warp(logit);
    if (threadIdx.x % 32 == 0) {
      openness[i] = reciprocal(1.0f + power_of_2(-LOG2_E * logit));
    }
  });
}

// p *= openness, at the block's rows.
template <typename P>
__device__ __forceinline__ void multiply_rows(P* p, int M, int r, int m0, const float* openness) {
  for_rows_of_warp(M, m0, [&](int i, int64_t row) {
    for (int k = threadIdx.x % 32; k < r; k += 32) {
      p[row * r + k] = from_float<P>(to_float(p[row * r + k]) * openness[i]);
    }
  });
}

// q, openness times the gradient of openness t, becomes that of t (M, r), at the block's rows.
template <typename T>
__device__ __forceinline__ void add_through_gate(T* q, int padded, const T* t, int M, int r,
                                                 const float* gate, int m0,
                                                 const float* openness) {
  for_rows_of_warp(M, m0, [&](int i, int64_t row) {
    float along = 0.0f;
    for (int k = threadIdx.x % 32; k < r; k += 32) {
      along += to_float(q[row * padded + k]) * to_float(t[row * r + k]);
    }
    along = sum_of_warp(along) * (1.0f - openness[i]);
    for (int k = threadIdx.x % 32; k < r; k += 32) {
      T& value = q[row * padded + k];
      value = from_float<T>(to_float(value) + along * gate[2 * k]);
    }
  });
}

// q = alpha p core^T (M, padded) at the block's rows, `opened`: times their openness; zeros beyond
// r.
template <typename P, typename Q>
__device__ __forceinline__ void project_rows(const P* p, int M, int r, int padded,
                                             const Matrix& core, float alpha, Q* q, int m0,
                                             unsigned char* memory, bool opened = false) {
  __syncthreads();  // p is read back by other threads than wrote it
  for (int j0 = 0; j0 < padded; j0 += ByCore::COLUMNS) {
    const ByCore sum = times_core(p, M, r, core, m0, j0, memory);
    for_elements<ByCore>([&](int i, int j, int e) {
      const int row = m0 + ByCore::row(i, e), column = j0 + ByCore::column(j, e);
      if (row < M && column < padded) {
        const float scale = opened ? alpha * openness_of_rows(memory)[row - m0] : alpha;
        q[static_cast<int64_t>(row) * padded + column] = from_float<Q>(scale * sum.value[i][j][e]);
      }
    });
  }
}

}  // namespace secura
