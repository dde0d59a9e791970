// Core gradient: alpha v^T t (r, r) in float32, in parts over ROWS_PER_PART rows of v and t, which
// the caller adds in a fixed order.

#include "fragments.cuh"
#include "launch.cuh"
#include "low_rank.cuh"

namespace secura {
namespace {

template <typename T>
__global__ void __launch_bounds__(ByCore::THREADS, 1) core_gradient_kernel(CoreGradient p) {
  const int r = p.v.columns, blocks = (r + ByCore::ROWS - 1) / ByCore::ROWS;
  const int part = blockIdx.x / (blocks * blocks), block = blockIdx.x % (blocks * blocks);
  const int i0 = block / blocks * ByCore::ROWS, j0 = block % blocks * ByCore::COLUMNS;
  const int m0 = part * ROWS_PER_PART;
  Operand<float> v = operand<float>(p.v);
  Operand<T> t = operand<T>(p.t);
  v.data += m0 * v.stride_row;
  t.data += m0 * t.stride_row;
  v.rows = t.rows = min(v.rows - m0, ROWS_PER_PART);
  ByCore sum;
  multiply<float, Along::ROWS, Along::ROWS>(sum, transposed(v), i0, transposed(t), j0,
                                            shared_memory());
  for_elements<ByCore>([&](int i, int j, int e) { sum.value[i][j][e] *= p.alpha; });
  store(sum, p.part + static_cast<int64_t>(part) * r * r, i0, r, j0, r);
}

}  // namespace

void core_gradient(const CoreGradient& p, const Launch& where) {
  const int M = p.v.rows, r = p.v.columns, blocks = ceil_div(r, ByCore::ROWS);
  with_dtype(where.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(core_gradient_kernel<T>, p, int64_t{ceil_div(M, ROWS_PER_PART)} * blocks * blocks,
           ByCore::THREADS, MULTIPLY_BYTES<ByCore>, where, "core_gradient",
           {{"M", M}, {"r", r}});
  });
}

}  // namespace secura
