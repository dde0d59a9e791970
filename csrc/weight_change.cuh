// delta_W = P R tile by tile, and W beside it: what the weight-domain passes share.
#pragma once

#include "finish.cuh"
#include "multiply.cuh"

namespace secura {

// P R on tensor cores, for R in 16 bits: P in three bfloat16 terms, which have float32's 24 bits,
// and R in as many as hold it exactly. In float16, whose range P may leave, these are two.
template <typename T, class Accumulator>
class ChangeByTerms {
  static constexpr int DEPTH = 32, OF_P = 3, OF_R = Is<T, bfloat16> ? 1 : 2;
  using TileP = SharedTile<bfloat16, Accumulator::ROWS, DEPTH, Along::DEPTH>;
  using TileR = SharedTile<bfloat16, Accumulator::COLUMNS, DEPTH, Along::DEPTH>;
  using Eight = Vector<float, 8>;

  unsigned char* const memory;

  __device__ __forceinline__ TileP tile_p(int term) const {
    return TileP(memory + term * TileP::BYTES);
  }
  __device__ __forceinline__ TileR tile_r(int term) const {
    return TileR(memory + OF_P * TileP::BYTES + term * TileR::BYTES);
  }

  __device__ __forceinline__ static Eight eight(const float* from) {
    Eight values;
    for (int half = 0; half < 8; half += 4) {
      const auto four = *reinterpret_cast<const Chunk<float>*>(from + half);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        values.value[half + e] = four.value[e];
      }
    }
    return values;
  }
  __device__ __forceinline__ static Eight eight(const T* from) {
    const auto chunk = *reinterpret_cast<const Chunk<T>*>(from);
    Eight values;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      values.value[e] = to_float(chunk.value[e]);
    }
    return values;
  }

  // Rows row0... and depths k0... of a matrix, whose rows are whole 16 bytes, in TERMS tiles.
  template <class Tile, int TERMS, typename Global, typename Tiles>
  __device__ __forceinline__ static void split(const Operand<Global>& from, int row0, int k0,
                                               Tiles tiles) {
    static_assert(Tile::LINES * Tile::CHUNKS % Accumulator::THREADS == 0, "the same for all");
#pragma unroll
    for (int n = 0; n < Tile::LINES * Tile::CHUNKS / Accumulator::THREADS; ++n) {
      const int i = threadIdx.x + n * Accumulator::THREADS;
      const int row = i / Tile::CHUNKS, index = i % Tile::CHUNKS, k = k0 + 8 * index;
      const bool inside = row0 + row < from.rows && k < from.depth;
      const Global* source = from.data + (row0 + row) * from.stride_row + k;
      if constexpr (Is<Global, bfloat16>) {
        copy_async(tiles(0).chunk(row, index), source, inside ? 16 : 0);
        continue;
      }
      Eight left = {};
      if (inside) {
        left = eight(source);
      }
#pragma unroll
      for (int term = 0; term < TERMS; ++term) {
        Chunk<bfloat16> rounded;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          rounded.value[e] = from_float<bfloat16>(left.value[e]);
          left.value[e] -= to_float(rounded.value[e]);
        }
        *reinterpret_cast<Chunk<bfloat16>*>(tiles(term).chunk(row, index)) = rounded;
      }
    }
  }

 public:
  static constexpr int BYTES = OF_P * TileP::BYTES + OF_R * TileR::BYTES;

  __device__ __forceinline__ explicit ChangeByTerms(unsigned char* memory) : memory(memory) {}

  __device__ __forceinline__ void add_to(Accumulator& change, const Operand<float>& P, int row0,
                                         const Operand<T>& R, int column0) const {
#pragma unroll 1
    for (int k = 0; k < P.depth; k += DEPTH) {
      split<TileR, OF_R>(R, column0, k, [&](int term) { return tile_r(term); });
      commit_copies();
      split<TileP, OF_P>(P, row0, k, [&](int term) { return tile_p(term); });
      wait_copies<0>();
      __syncthreads();
      // The smallest first; those of the last terms alone are below float32's bits.
#pragma unroll
      for (int sum = OF_P - 1; sum >= 0; --sum) {
#pragma unroll
        for (int term = 0; term < min(OF_R, sum + 1); ++term) {
          change.add(tile_p(sum - term), tile_r(term));
        }
      }
      __syncthreads();
    }
  }
};

// base = W, change = delta_W at rows n0... and columns k0..., both in float32.
template <typename T, class Accumulator>
__device__ __forceinline__ void weight_and_change(Accumulator& base, Accumulator& change,
                                                  const WeightChange& p, int n0, int k0,
                                                  unsigned char* memory) {
  const Operand<T> weight = operand<T>(p.weight);
  const Operand<float> P = packed<float>(p.P, weight.rows, p.padded);
  const Operand<T> R = packed<T>(p.factor, weight.depth, p.padded);
  if constexpr (TENSOR_CORES && sizeof(T) == 2) {
    using Terms = ChangeByTerms<T, Accumulator>;
    static_assert(Terms::BYTES <= MULTIPLY_BYTES<Accumulator>, "the pipeline's memory");
    Terms(memory).add_to(change, P, n0, R, k0);
  } else {
    multiply<float, Along::DEPTH, Along::DEPTH>(change, P, n0, R, k0, memory);
  }
  load(base, weight, n0, k0);
}

}  // namespace secura
