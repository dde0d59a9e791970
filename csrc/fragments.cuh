// Accumulators to and from matrices in global memory, whose rows are contiguous.
//
// A thread holds two adjacent columns of each 8-column fragment. Four lanes exchange theirs, so that
// each holds 8 columns of one fragment: 16 bytes in one access.
#pragma once

#include "multiply.cuh"

namespace secura {

// Transposes over the four lanes of a quad: lane t gives v[i], and receives lane i's v[t].
__device__ __forceinline__ void exchange(uint32_t (&v)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int mask = 1; mask <= 2; mask *= 2) {
    const bool upper = lane & mask;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & mask) == 0) {
        uint32_t& low = v[i];
        uint32_t& high = v[i | mask];
        const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? low : high, mask);
        if (upper) {
          low = received;
        } else {
          high = received;
        }
      }
    }
  }
}

// Elements of at most 16 bits, two to a word.
template <typename T>
union Pair {
  uint32_t word;
  Vector<T, 2> of;
};

// Integers are the low bits of the float that `encode` gives.
template <typename T>
__device__ __forceinline__ T stored(float value) {
  if constexpr (std::is_integral<T>::value) {
    return static_cast<T>(__float_as_int(value));
  } else {
    return from_float<T>(value);
  }
}

// Whether 8 columns at a multiple of 8 can be accessed at once.
template <typename T>
__host__ __device__ __forceinline__ bool by_eights(const T* matrix, int columns) {
  return columns % 8 == 0 && reinterpret_cast<uintptr_t>(matrix) % (8 * sizeof(T)) == 0;
}

// matrix (rows, columns)[row0..., column0...] = sum, converted to T. EIGHTS: `by_eights` is known,
// and the code of the other case left out.
template <typename T, bool EIGHTS = false, class Accumulator>
__device__ __forceinline__ void store(const Accumulator& sum, T* matrix, int row0, int rows,
                                      int column0, int columns) {
  constexpr bool EXCHANGED = sizeof(T) <= 2 && Accumulator::J % 4 == 0;
  const bool eights = EXCHANGED && (EIGHTS || by_eights(matrix, columns));
#pragma unroll
  for (int i = 0; i < Accumulator::I; ++i) {
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
      const int row = row0 + Accumulator::row(i, half);
      T* line = matrix + static_cast<int64_t>(row) * columns;
      if constexpr (EXCHANGED) {
        if (eights) {
#pragma unroll
          for (int j = 0; j < Accumulator::J; j += 4) {
            uint32_t words[4];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              Pair<T> pair = {0};
              pair.of = {stored<T>(sum.value[i][j + n][half]),
                         stored<T>(sum.value[i][j + n][half + 1])};
              words[n] = pair.word;
            }
            exchange(words);
            Vector<T, 8> eight;
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              Pair<T> pair = {words[n]};
              eight.value[2 * n] = pair.of.value[0];
              eight.value[2 * n + 1] = pair.of.value[1];
            }
            const int column =
                column0 + Accumulator::warp_column() + 8 * (j + threadIdx.x % 4);
            if (row < rows && column < columns) {
              *reinterpret_cast<Vector<T, 8>*>(line + column) = eight;
            }
          }
          continue;
        }
      }
#pragma unroll
      for (int j = 0; j < Accumulator::J; ++j) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int column = column0 + Accumulator::column(j, odd);
          if (row < rows && column < columns) {
            line[column] = stored<T>(sum.value[i][j][half + odd]);
          }
        }
      }
    }
  }
}

// sum = matrix[row0..., column0...], rows `stride_row` apart; zeros outside. EIGHTS: as in `store`.
template <typename T, bool EIGHTS = false, class Accumulator>
__device__ __forceinline__ void load(Accumulator& sum, const Operand<T>& matrix, int row0,
                                     int column0) {
  constexpr bool EXCHANGED = sizeof(T) == 2 && Accumulator::J % 4 == 0;
  const bool eights =
      EXCHANGED && (EIGHTS || (matrix.stride_depth == 1 && matrix.depth % 8 == 0 &&
                               is_aligned(matrix.data, matrix.stride_row, sizeof(T))));
#pragma unroll
  for (int i = 0; i < Accumulator::I; ++i) {
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
      const int row = row0 + Accumulator::row(i, half);
      const T* line = matrix.data + row * matrix.stride_row;
      if constexpr (EXCHANGED) {
        if (eights) {
#pragma unroll
          for (int j = 0; j < Accumulator::J; j += 4) {
            const int column =
                column0 + Accumulator::warp_column() + 8 * (j + threadIdx.x % 4);
            Chunk<T> eight = {};
            if (row < matrix.rows && column < matrix.depth) {
              eight = *reinterpret_cast<const Chunk<T>*>(line + column);
            }
            uint32_t words[4];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              Pair<T> pair = {0};
              pair.of = {eight.value[2 * n], eight.value[2 * n + 1]};
              words[n] = pair.word;
            }
            exchange(words);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              Pair<T> pair = {words[n]};
              sum.value[i][j + n][half] = to_float(pair.of.value[0]);
              sum.value[i][j + n][half + 1] = to_float(pair.of.value[1]);
            }
          }
          continue;
        }
      }
#pragma unroll
      for (int j = 0; j < Accumulator::J; ++j) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int column = column0 + Accumulator::column(j, odd);
          const bool inside = row < matrix.rows && column < matrix.depth;
          sum.value[i][j][half + odd] =
              inside ? to_float(line[column * matrix.stride_depth]) : 0.0f;
        }
      }
    }
  }
}

}  // namespace secura
