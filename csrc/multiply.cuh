// A block's product: an accumulator in registers, and the pipeline of shared tiles that feeds it.
#pragma once

#include <algorithm>

#include "instructions.cuh"
#include "operand.cuh"

namespace secura {

// ROWS x COLUMNS in float32 over the block's warps, WARP_ROWS x WARP_COLUMNS each, in the fragments
// of mma.m16n8k16: value[i][j] is 16 x 8 elements of a warp, four of them this thread's: rows g and
// g + 8 (g = lane / 4), two adjacent columns.
template <int ROWS_, int COLUMNS_, int WARP_ROWS, int WARP_COLUMNS>
struct Accumulator {
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_;
  static constexpr int WARPS_ACROSS = COLUMNS / WARP_COLUMNS;
  static constexpr int THREADS = ROWS / WARP_ROWS * WARPS_ACROSS * 32;
  static constexpr int I = WARP_ROWS / 16, J = WARP_COLUMNS / 8;
  static_assert(I * 16 == WARP_ROWS && J * 8 == WARP_COLUMNS && J % 2 == 0, "whole fragments");

  float value[I][J][4] = {};

  __device__ __forceinline__ static int warp_row() {
    return threadIdx.x / 32 / WARPS_ACROSS * WARP_ROWS;
  }
  __device__ __forceinline__ static int warp_column() {
    return threadIdx.x / 32 % WARPS_ACROSS * WARP_COLUMNS;
  }
  // Position in the block of value[i][j][e].
  __device__ __forceinline__ static int row(int i, int e) {
    return warp_row() + 16 * i + threadIdx.x % 32 / 4 + 8 * (e / 2);
  }
  __device__ __forceinline__ static int column(int j, int e) {
    return warp_column() + 8 * j + 2 * (threadIdx.x % 4) + e % 2;
  }

  // += a b^T of two tiles of one depth: on tensor cores where the chip has them for the type.
  template <class A, class B>
  __device__ __forceinline__ void add(const A& a, const B& b) {
    static_assert(A::DEPTH == B::DEPTH && A::ROWS == ROWS && B::ROWS == COLUMNS, "tiles that fit");
    if constexpr (TENSOR_CORES && sizeof(typename A::Element) == 2) {
      add_on_tensor_cores(a, b);
    } else {
      add_in_float32(a, b);
    }
  }

  // += of fragments: 16 rows of a by 16 columns of b each, two adjacent value[i][j] of them.
  template <typename T>
  __device__ __forceinline__ void multiply_add_all(const uint32_t (&a)[I][4],
                                                   const uint32_t (&b)[J / 2][4]) {
#pragma unroll
    for (int j = 0; j < J; ++j) {
#pragma unroll
      for (int i = 0; i < I; ++i) {
        multiply_add<T>(value[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

 private:
  template <class A, class B>
  __device__ __forceinline__ void add_on_tensor_cores(const A& a, const B& b) {
    using T = typename A::Element;
    const int lane = threadIdx.x % 32;
    const int low = lane % 8, middle = lane / 8 % 2, high = lane / 16;
#pragma unroll
    for (int k = 0; k < A::DEPTH; k += 16) {
      uint32_t a_fragment[I][4];
#pragma unroll
      for (int i = 0; i < I; ++i) {
        const int row = warp_row() + 16 * i;
        // Matrices in the order rows 0-7, rows 8-15, and the same at k + 8.
        if constexpr (A::ALONG_DEPTH) {
          load_matrices(a_fragment[i], a.chunk(row + low + 8 * middle, k / 8 + high));
        } else {
          load_matrices_transposed(a_fragment[i], a.chunk(k + low + 8 * high, row / 8 + middle));
        }
      }
#pragma unroll
      for (int j = 0; j < J; j += 2) {
        const int column = warp_column() + 8 * j;
        uint32_t b_fragment[4];  // k and k + 8 of one fragment, then of the next
        if constexpr (B::ALONG_DEPTH) {
          load_matrices(b_fragment, b.chunk(column + low + 8 * high, k / 8 + middle));
        } else {
          load_matrices_transposed(b_fragment, b.chunk(k + low + 8 * middle, column / 8 + high));
        }
#pragma unroll
        for (int i = 0; i < I; ++i) {
          multiply_add<T>(value[i][j], a_fragment[i], b_fragment[0], b_fragment[1]);
          multiply_add<T>(value[i][j + 1], a_fragment[i], b_fragment[2], b_fragment[3]);
        }
      }
    }
  }

  template <class A, class B>
  __device__ __forceinline__ void add_in_float32(const A& a, const B& b) {
    // Unrolled further, the weight domain's core gradient spills.
#pragma unroll(sizeof(typename A::Element) == 2 ? 1 : 2)
    for (int k = 0; k < A::DEPTH; ++k) {
      float left[I][2], right[J][2];
#pragma unroll
      for (int i = 0; i < I; ++i) {
        left[i][0] = to_float(a.at(row(i, 0), k));
        left[i][1] = to_float(a.at(row(i, 2), k));
      }
#pragma unroll
      for (int j = 0; j < J; ++j) {
        right[j][0] = to_float(b.at(column(j, 0), k));
        right[j][1] = to_float(b.at(column(j, 1), k));
      }
#pragma unroll
      for (int i = 0; i < I; ++i) {
#pragma unroll
        for (int j = 0; j < J; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            value[i][j][e] += left[i][e / 2] * right[j][e % 2];
          }
        }
      }
    }
  }
};

// run(i, j, e) for each of a thread's elements value[i][j][e].
template <class Accumulator, typename Run>
__device__ __forceinline__ void for_elements(Run run) {
#pragma unroll
  for (int i = 0; i < Accumulator::I; ++i) {
#pragma unroll
    for (int j = 0; j < Accumulator::J; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        run(i, j, e);
      }
    }
  }
}

// A tile is 64 bytes deep, whatever its type. STAGES tiles of both operands are under way at once, in
// the 64 KiB that every chip has: the shared memory of `multiply`.
template <typename T>
constexpr int DEPTH = 64 / sizeof(T);
template <class Accumulator>
constexpr int STAGE_BYTES = 64 * (Accumulator::ROWS + Accumulator::COLUMNS);
template <class Accumulator>
constexpr int STAGES = std::min(4, 65536 / STAGE_BYTES<Accumulator>);
template <class Accumulator>
constexpr int MULTIPLY_BYTES = STAGES<Accumulator>* STAGE_BYTES<Accumulator>;

// sum += a b^T at rows row0... of a and column0... of b, multiplied as T. Every thread of the block
// calls it; on return the shared memory is free again.
template <typename T, Along ALONG_A, Along ALONG_B, class Accumulator, typename GlobalA,
          typename GlobalB>
__device__ __forceinline__ void multiply(Accumulator& sum, const Operand<GlobalA>& a, int row0,
                                         const Operand<GlobalB>& b, int column0,
                                         unsigned char* memory) {
  using TileA = SharedTile<T, Accumulator::ROWS, DEPTH<T>, ALONG_A>;
  using TileB = SharedTile<T, Accumulator::COLUMNS, DEPTH<T>, ALONG_B>;
  constexpr int THREADS = Accumulator::THREADS, IN_FLIGHT = STAGES<Accumulator> - 1;
  const int steps = (a.depth + DEPTH<T> - 1) / DEPTH<T>;
  const auto memory_of = [&](int step) {
    return memory + step % STAGES<Accumulator> * STAGE_BYTES<Accumulator>;
  };
  const auto tile_a = [&](int step) { return TileA(memory_of(step)); };
  const auto tile_b = [&](int step) { return TileB(memory_of(step) + TileA::BYTES); };
  const auto start = [&](int step) {
    if (step < steps) {
      tile_a(step).template load<THREADS>(a, row0, step * DEPTH<T>);
      tile_b(step).template load<THREADS>(b, column0, step * DEPTH<T>);
    }
    commit_copies();  // an empty group at the end, so that one count of groups serves every step
  };
  for (int step = 0; step < IN_FLIGHT; ++step) {
    start(step);
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_copies<IN_FLIGHT - 1>();
    __syncthreads();  // the step's tiles are here, and all have used the previous step's
    start(step + IN_FLIGHT);
    sum.add(tile_a(step), tile_b(step));
  }
  wait_copies<0>();
  __syncthreads();
}

}  // namespace secura
