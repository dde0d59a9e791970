// Epilogue: the low-rank path and S-MagNorm in one pass over a library product y, in place. Also the
// pass that finds max(rho) for ref = "max", which must come before any output.

#include "finish.cuh"
#include "launch.cuh"
#include "multiply.cuh"

namespace secura {
namespace {

using Sum = Accumulator<64, 128, 32, 32>;

template <typename T>
__global__ void __launch_bounds__(Sum::THREADS, 1) epilogue_kernel(Epilogue p) {
  const int across = (p.N + Sum::COLUMNS - 1) / Sum::COLUMNS;
  const int m0 = blockIdx.x / across * Sum::ROWS, n0 = blockIdx.x % across * Sum::COLUMNS;
  T* y = static_cast<T*>(p.y);
  Sum base, change;
  load(base, packed<T>(y, p.M, p.N), m0, n0);
  multiply<T, Along::DEPTH, Along::DEPTH>(change, packed<T>(p.h, p.M, p.padded), m0,
                                          packed<T>(p.side, p.N, p.padded), n0, shared_memory());
  add_vector(change, p.finish.adapter_bias, n0, p.N);
  if (p.find_largest) {
    raise_largest(largest_bits(base, change, p.finish.gate.eps, m0, p.M, n0, p.N), p.largest);
  } else if (p.finish.gate.on) {
    finish<T, false>(base, change, p.finish, slope_of(p.finish.gate, p.largest), y, m0, p.M, n0,
                     p.N);
  } else {
    for_elements<Sum>(
        [&](int i, int j, int e) { base.value[i][j][e] += change.value[i][j][e]; });
    store(base, y, m0, p.M, n0, p.N);
  }
}

}  // namespace

void epilogue(const Epilogue& p, const Launch& where) {
  with_dtype(where.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(epilogue_kernel<T>, p, int64_t{ceil_div(p.M, Sum::ROWS)} * ceil_div(p.N, Sum::COLUMNS),
           Sum::THREADS, MULTIPLY_BYTES<Sum>, where, "epilogue",
           {{"M", p.M}, {"N", p.N}, {"r", p.padded}});
  });
}

}  // namespace secura
