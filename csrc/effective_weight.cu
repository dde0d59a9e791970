// Effective weight: W_eff = S-MagNorm(W, delta_W), in one pass over W; delta_W is never stored. Also
// the pass that finds max(rho).

#include "launch.cuh"
#include "weight_change.cuh"

namespace secura {
namespace {

using Sum = Accumulator<64, 128, 32, 32>;

template <typename T>
__global__ void __launch_bounds__(Sum::THREADS, 1) effective_weight_kernel(EffectiveWeight p) {
  const int N = p.change.weight.rows, K = p.change.weight.columns;
  const int across = (K + Sum::COLUMNS - 1) / Sum::COLUMNS;
  const int n0 = blockIdx.x / across * Sum::ROWS, k0 = blockIdx.x % across * Sum::COLUMNS;
  const Gate& gate = p.change.gate;
  Sum base, change;
  weight_and_change<T>(base, change, p.change, n0, k0, shared_memory());
  if (p.find_largest) {
    raise_largest(largest_bits(base, change, gate.eps, n0, N, k0, K), p.largest);
  } else {
    const Finish end = {nullptr, p.change.decay, gate, nullptr, p.moved, p.edge};
    const int count = finish<T, true>(base, change, end, slope_of(gate, p.largest),
                                      static_cast<T*>(p.out), n0, N, k0, K);
    add_count(count, p.moved);
  }
}

}  // namespace

void effective_weight(const EffectiveWeight& p, const Launch& where) {
  const int N = p.change.weight.rows, K = p.change.weight.columns;
  with_dtype(where.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(effective_weight_kernel<T>, p,
           int64_t{ceil_div(N, Sum::ROWS)} * ceil_div(K, Sum::COLUMNS), Sum::THREADS,
           MULTIPLY_BYTES<Sum>, where, "effective_weight",
           {{"N", N}, {"K", K}, {"r", p.change.padded}});
  });
}

}  // namespace secura
