// Gather: C or R as (long, padded), zeros beyond r, so that every row starts on 16 bytes.

#include "launch.cuh"
#include "operand.cuh"

namespace secura {
namespace {

constexpr int THREADS = 256, LONG = 16;  // 16 neighbours: a sector of a row of W, when R is gathered

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) gather_kernel(Gather p) {
  const Operand<T> from = operand<T>(p.matrix);
  T* factor = static_cast<T*>(p.factor);
  const int first = blockIdx.x * LONG, count = min(from.rows - first, LONG);
  for (int i = threadIdx.x; i < count * p.padded; i += THREADS) {
    const int row = first + i / p.padded, k = i % p.padded;
    T value = {};
    if (k < p.r) {
      const int64_t column = p.index == nullptr ? k : p.index[k];
      value = from.data[row * from.stride_row + column * from.stride_depth];
    }
    factor[static_cast<int64_t>(row) * p.padded + k] = value;
  }
}

}  // namespace

void gather(const Gather& p, const Launch& where) {
  with_dtype(where.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(gather_kernel<T>, p, ceil_div(p.matrix.rows, LONG), THREADS, 0, where, "gather",
           {{"long", p.matrix.rows}, {"r", p.r}});
  });
}

}  // namespace secura
