// One pass: y = a b^T + h side^T, biases and S-MagNorm, in one kernel.
//
// The loop over K is an ordinary tiled product; without a gate its accumulator starts as h side^T
// and nothing but the biases is left to do. Forward: a = x, b = W, side = C. Input gradient without
// a gate: a = dY, b = W^T, h = dT, side = R^T.

#include "finish.cuh"
#include "launch.cuh"
#include "multiply.cuh"

namespace secura {
namespace {

using Sum = Accumulator<128, 128, 64, 32>;

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

template <typename T, bool GATE, Along ALONG_B>
__global__ void __launch_bounds__(Sum::THREADS, 1) product_kernel(Product p) {
  const Operand<T> a = operand<T>(p.a), b = operand<T>(p.b);
  const int M = a.rows, N = b.rows;
  const Operand<T> h = packed<T>(p.h, M, p.padded), side = packed<T>(p.side, N, p.padded);
  const Position tile = tile_position(blockIdx.x, (M + Sum::ROWS - 1) / Sum::ROWS,
                                      (N + Sum::COLUMNS - 1) / Sum::COLUMNS);
  const int m0 = tile.row * Sum::ROWS, n0 = tile.column * Sum::COLUMNS;
  T* y = static_cast<T*>(p.y);
  const T* bias = static_cast<const T*>(p.bias);
  unsigned char* memory = shared_memory();
  Sum sum;
  if constexpr (!GATE) {
    multiply<T, Along::DEPTH, Along::DEPTH>(sum, h, m0, side, n0, memory);
  }
  multiply<T, Along::DEPTH, ALONG_B>(sum, a, m0, b, n0, memory);
  add_vector(sum, bias, n0, N);
  if constexpr (GATE) {
    Sum change;
    multiply<T, Along::DEPTH, Along::DEPTH>(change, h, m0, side, n0, memory);
    add_vector(change, p.finish.adapter_bias, n0, N);
    finish<T, false>(sum, change, p.finish, p.finish.gate.slope, y, m0, M, n0, N);
  } else {
    add_vector(sum, p.finish.adapter_bias, n0, N);
    store(sum, y, m0, M, n0, N);
  }
}

}  // namespace

void product(const Product& p, const Launch& where) {
  const int M = p.a.rows, N = p.b.rows;
  with_dtype(where.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    auto* kernel = p.b.stride_row == 1 ? product_kernel<T, false, Along::ROWS>
                                       : product_kernel<T, false, Along::DEPTH>;
    if (p.finish.gate.on) {
      kernel = product_kernel<T, true, Along::DEPTH>;
    }
    launch(kernel, p, int64_t{ceil_div(M, Sum::ROWS)} * ceil_div(N, Sum::COLUMNS), Sum::THREADS,
           MULTIPLY_BYTES<Sum>, where, "product",
           {{"M", M}, {"N", N}, {"K", p.a.columns}, {"r", p.padded}});
  });
}

}  // namespace secura
