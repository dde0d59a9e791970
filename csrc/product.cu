// One pass: y = a b^T + h factor^T, biases and S-MagNorm, in one kernel.
//
// The loop over K is an ordinary tiled product; without a gate its accumulator starts as h factor^T
// and nothing but the biases is left to do. Forward: a = x, b = W, factor = C. Input gradient without
// a gate: a = dY, b = W^T, h = dT, factor = R^T.

#include "finish.cuh"
#include "launch.cuh"
#include "slices.cuh"

namespace secura {
namespace {

// A block's tile of y. Operands in whole chunks: warps of 64 x 64, which read half as much shared
// memory for a product as 64 x 32. With a gate and on small outputs two blocks share an SM: one's
// epilogue runs beside the other's products. They need 48 KiB each; the wide tile needs 144 KiB.
template <Reads READS, int COLUMNS>
using Sum = std::conditional_t<READS == Reads::ANY, Accumulator<128, COLUMNS, 64, 32>,
                               Accumulator<128, COLUMNS, 64, 64>>;
constexpr int ROWS = 128, NARROW = 128, WIDE = 256;
template <Reads READS, int COLUMNS>
constexpr int BLOCKS = READS == Reads::CHUNKS && COLUMNS == NARROW ? 2 : 1;
template <int COLUMNS>
constexpr int DEPTH_OF_CHUNKS = COLUMNS == WIDE ? 64 : 32;

template <typename T, int COLUMNS, Along ALONG_B>
using Chunks = Pipeline<T, Sum<Reads::CHUNKS, COLUMNS>, DEPTH_OF_CHUNKS<COLUMNS>, 3, Along::DEPTH,
                        ALONG_B>;
template <typename T>
using Change = SlicedProduct<T, Sum<Reads::CHUNKS, NARROW>, DEPTH_OF_CHUNKS<NARROW>, 3>;

struct Position {
  int row, column;
};

// Tiles in groups of 8 rows of tiles, column by column, so that both operands stay in the L2.
__device__ __forceinline__ Position tile_position(int tile, int rows, int columns) {
  constexpr int GROUP = 8;
  const int first = tile / (GROUP * columns) * GROUP;
  const int height = min(rows - first, GROUP), inside = tile % (GROUP * columns);
  return {first + inside % height, inside / height};
}

// sum += a b^T.
template <typename T, Along ALONG_B, Reads READS, int COLUMNS>
__device__ __forceinline__ void add(Sum<READS, COLUMNS>& sum, const Operand<T>& a, int m0,
                                    const Operand<T>& b, int n0, unsigned char* memory) {
  if constexpr (READS == Reads::CHUNKS) {
    Chunks<T, COLUMNS, ALONG_B>::run(sum, a, m0, b, n0, memory);
  } else {
    multiply<T, Along::DEPTH, ALONG_B>(sum, a, m0, b, n0, memory);
  }
}

template <typename T, bool GATE, Along ALONG_B, Reads READS, int COLUMNS>
__global__ void __launch_bounds__(Sum<READS, COLUMNS>::THREADS, BLOCKS<READS, COLUMNS>)
    product_kernel(Product p) {
  using Sum = Sum<READS, COLUMNS>;
  const Operand<T> a = operand<T>(p.a), b = operand<T>(p.b);
  const int M = a.rows, N = b.rows;
  const Operand<T> h = packed<T>(p.h, M, p.padded), factor = packed<T>(p.factor, N, p.padded);
  // Found before each part: what follows from a position, kept through a loop, would spill.
  const auto position = [&] {
    const Position tile = tile_position(found_anew(blockIdx.x), (M + Sum::ROWS - 1) / Sum::ROWS,
                                        (N + Sum::COLUMNS - 1) / Sum::COLUMNS);
    return Position{tile.row * Sum::ROWS, tile.column * Sum::COLUMNS};
  };
  T* y = static_cast<T*>(p.y);
  const T* bias = static_cast<const T*>(p.bias);
  unsigned char* memory = shared_memory();
  Sum sum;
  if constexpr (!GATE) {
    const Position at = position();
    add<T, Along::DEPTH, READS, COLUMNS>(sum, h, at.row, factor, at.column, memory);
  }
  const Position before = position();
  add<T, ALONG_B, READS, COLUMNS>(sum, a, before.row, b, before.column, memory);
  const Position after = position();
  const int m0 = after.row, n0 = after.column;
  add_vector(sum, bias, n0, N);
  if constexpr (!GATE) {
    add_vector(sum, p.finish.adapter_bias, n0, N);
    store<T, READS == Reads::CHUNKS>(sum, y, m0, M, n0, N);
  } else if constexpr (READS == Reads::CHUNKS) {
    const Change<T> product(h, m0, factor, n0, memory);
    int count = 0;
    for_slices<Sum>([&](auto part) {
      constexpr int PART = decltype(part)::value;
      Slice<Sum, PART> base, change;
      product.add_to(change);
      add_vector(change, p.finish.adapter_bias, n0, N);
#pragma unroll
      for (int j = 0; j < Sum::J; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          base.value[0][j][e] = sum.value[PART][j][e];
        }
      }
      count += finish<T, false, true>(base, change, p.finish, p.finish.gate.slope, y, m0, M, n0, N);
    });
    add_count(count, p.finish.moved);
  } else {
    Sum change;
    add<T, Along::DEPTH, READS, COLUMNS>(change, h, m0, factor, n0, memory);
    add_vector(change, p.finish.adapter_bias, n0, N);
    add_count(finish<T, false>(sum, change, p.finish, p.finish.gate.slope, y, m0, M, n0, N),
              p.finish.moved);
  }
}

// How the kernel reads b.
Along along_b(const Product& p) {
  return !p.finish.gate.on && p.b.stride_row == 1 ? Along::ROWS : Along::DEPTH;
}

template <typename T, Reads READS, int COLUMNS>
void launch_tiles(const Product& p, const Launch& where, int bytes) {
  const int M = p.a.rows, N = p.b.rows;
  auto* kernel = along_b(p) == Along::ROWS
                     ? product_kernel<T, false, Along::ROWS, READS, COLUMNS>
                     : product_kernel<T, false, Along::DEPTH, READS, COLUMNS>;
  if constexpr (COLUMNS == NARROW) {
    kernel = p.finish.gate.on ? product_kernel<T, true, Along::DEPTH, READS, COLUMNS> : kernel;
  }
  launch(kernel, p, int64_t{ceil_div(M, ROWS)} * ceil_div(N, COLUMNS),
         Sum<READS, COLUMNS>::THREADS, bytes, where, "product",
         {{"M", M}, {"N", N}, {"K", p.a.columns}, {"r", p.padded}});
}

template <typename T>
bool all_in_chunks(const Product& p) {
  return in_chunks<T>(p.a, Along::DEPTH) && in_chunks<T>(p.b, along_b(p)) &&
         is_aligned(p.h, p.padded, sizeof(T)) && is_aligned(p.factor, p.padded, sizeof(T)) &&
         by_eights(static_cast<const T*>(p.y), p.finish, p.b.rows);
}

}  // namespace

void product(const Product& p, const Launch& where) {
  with_dtype(where.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      if (all_in_chunks<T>(p)) {
        using Narrow = Chunks<T, NARROW, Along::DEPTH>;
        using Wide = Chunks<T, WIDE, Along::DEPTH>;
        const int64_t wide = int64_t{ceil_div(p.a.rows, ROWS)} * ceil_div(p.b.rows, WIDE);
        if (!p.finish.gate.on && wide >= attribute(cudaDevAttrMultiProcessorCount) &&
            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= Wide::BYTES) {
          launch_tiles<T, Reads::CHUNKS, WIDE>(p, where, Wide::BYTES);
        } else {
          static_assert(Narrow::BYTES == Change<T>::BYTES, "one memory for both");
          launch_tiles<T, Reads::CHUNKS, NARROW>(p, where, Narrow::BYTES);
        }
        return;
      }
    }
    launch_tiles<T, Reads::ANY, NARROW>(p, where, MULTIPLY_BYTES<Sum<Reads::ANY, NARROW>>);
  });
}

}  // namespace secura
