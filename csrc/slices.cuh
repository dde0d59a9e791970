// h factor^T in slices of 16 rows of every warp: beside a whole accumulator, registers hold one
// slice.
#pragma once

#include <utility>

#include "pipeline.cuh"

namespace secura {

// The rows of fragments PART of an accumulator, which takes its place in `load`, `store` and
// `finish`.
template <class Whole, int PART>
struct Slice {
  static constexpr int I = 1, J = Whole::J;

  float value[1][J][4] = {};

  __device__ __forceinline__ static int warp_column() { return Whole::warp_column(); }
  __device__ __forceinline__ static int row(int, int e) { return Whole::row(PART, e); }
  __device__ __forceinline__ static int column(int j, int e) { return Whole::column(j, e); }
};

// h factor^T of a block, slice after slice. As many tiles as STAGES hold are copied once, for all
// slices; of higher ranks each slice copies all of them again.
template <typename T, class Whole, int DEPTH, int STAGES>
class SlicedProduct {
  using TileA = SharedTile<T, Whole::ROWS, DEPTH, Along::DEPTH>;
  using TileB = SharedTile<T, Whole::COLUMNS, DEPTH, Along::DEPTH>;
  using CopierA = Copier<TileA, Whole::THREADS>;
  using CopierB = Copier<TileB, Whole::THREADS>;

  const Operand<T>&h, &factor;
  const int row0, column0, steps;
  unsigned char* const memory;

  __device__ __forceinline__ TileA tile_a(int step) const {
    return TileA(memory + step % STAGES * (TileA::BYTES + TileB::BYTES));
  }
  __device__ __forceinline__ TileB tile_b(int step) const {
    return TileB(memory + step % STAGES * (TileA::BYTES + TileB::BYTES) + TileA::BYTES);
  }
  __device__ __forceinline__ void copy(CopierA& a, CopierB& b, int step) const {
    if (step < steps) {
      a.copy_step(tile_a(step));
      b.copy_step(tile_b(step));
    }
    commit_copies();
  }

 public:
  static constexpr int BYTES = STAGES * (TileA::BYTES + TileB::BYTES);

  // At rows row0... of h and column0... of factor.
  __device__ __forceinline__ SlicedProduct(const Operand<T>& h, int row0, const Operand<T>& factor,
                                           int column0, unsigned char* memory)
      : h(h), factor(factor), row0(row0), column0(column0),
        steps((h.depth + DEPTH - 1) / DEPTH), memory(memory) {}

  // Every thread of the block calls it, for PART = 0 first.
  template <int PART>
  __device__ __forceinline__ void add_to(Slice<Whole, PART>& sum) const {
    const bool again = steps > STAGES;
    CopierA from_a(h, row0);
    CopierB from_b(factor, column0);
    if (PART == 0 || again) {
      __syncthreads();  // the tiles of another slice are used
      for (int step = 0; step < STAGES; ++step) {
        copy(from_a, from_b, step);
      }
    }
    const Reader<TileA, 1, true> reader_a(Whole::warp_row() + 16 * PART);
    const Reader<TileB, Whole::J / 2, false> reader_b(Whole::warp_column());
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      if (PART == 0 || again) {
        again ? wait_copies<STAGES - 1>() : wait_copies<0>();
        __syncthreads();
      }
      const TileA a = tile_a(step);
      const TileB b = tile_b(step);
      if constexpr (TENSOR_CORES) {
#pragma unroll
        for (int k = 0; k < DEPTH / 16; ++k) {
          uint32_t part_a[1][4], part_b[Whole::J / 2][4];
          reader_a.read(part_a, a, k);
          reader_b.read(part_b, b, k);
#pragma unroll
          for (int j = 0; j < Whole::J; ++j) {
            multiply_add<T>(sum.value[0][j], part_a[0], part_b[j / 2][j % 2 * 2],
                            part_b[j / 2][j % 2 * 2 + 1]);
          }
        }
      } else {
#pragma unroll 1
        for (int k = 0; k < DEPTH; ++k) {
#pragma unroll
          for (int j = 0; j < Whole::J; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              sum.value[0][j][e] +=
                  to_float(a.at(sum.row(0, e), k)) * to_float(b.at(sum.column(j, e), k));
            }
          }
        }
      }
      if (again) {
        __syncthreads();
        copy(from_a, from_b, step + STAGES);
      }
    }
  }
};

// run(std::integral_constant<int, PART>) for PART = 0, 1, ... of the parts of an accumulator.
template <typename Run, int... PART>
__device__ __forceinline__ void for_each_of(std::integer_sequence<int, PART...>, Run run) {
  (run(std::integral_constant<int, PART>()), ...);
}
template <class Whole, typename Run>
__device__ __forceinline__ void for_slices(Run run) {
  for_each_of(std::make_integer_sequence<int, Whole::I>(), run);
}

}  // namespace secura
