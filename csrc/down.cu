// Down: p = a side and q = alpha p core^T in one kernel, a read once.
//
// Forward: a = x, side = R, so p = t and q = h. Backward without a gate: a = dY, side = C, so p = v
// and q = dT = alpha v core (the core transposed by its strides).

#include "fragments.cuh"
#include "launch.cuh"
#include "low_rank.cuh"

namespace secura {
namespace {

template <int RANK>
using Sum = Accumulator<64, RANK, 32, RANK / 4>;

template <typename T, int RANK, typename P>
__device__ __forceinline__ void down_rows(const Down& d) {
  const Operand<T> a = operand<T>(d.a);
  const int m0 = blockIdx.x * Sum<RANK>::ROWS;
  P* p = static_cast<P*>(d.p);
  Sum<RANK> sum;
  multiply<T, Along::DEPTH, Along::ROWS>(
      sum, a, m0, transposed(packed<T>(d.side, a.depth, d.padded)), 0, shared_memory());
  store(sum, p, m0, a.rows, 0, d.r);
  project_rows(p, a.rows, d.r, d.padded, d.core, d.alpha, static_cast<T*>(d.q), m0,
               shared_memory());
}

template <typename T, int RANK>
__global__ void __launch_bounds__(Sum<RANK>::THREADS, 1) down_kernel(Down d) {
  if (d.p_float32) {
    down_rows<T, RANK, float>(d);
  } else {
    down_rows<T, RANK, T>(d);
  }
}

}  // namespace

void down(const Down& d, const Launch& where) {
  const int M = d.a.rows;
  with_dtype(where.dtype, [&](auto type) {
    with_rank(d.padded, [&](auto rank) {
      using T = typename decltype(type)::type;
      using Rows = Sum<decltype(rank)::value>;
      launch(down_kernel<T, decltype(rank)::value>, d, ceil_div(M, Rows::ROWS), Rows::THREADS,
             std::max(MULTIPLY_BYTES<Rows>, MULTIPLY_BYTES<ByCore>), where, "down",
             {{"M", M}, {"K", d.a.columns}, {"r", d.r}});
    });
  });
}

}  // namespace secura
