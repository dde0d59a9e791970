// Epilogue: the low-rank path and S-MagNorm in one pass over a library product y, in place. Also the
// pass that finds max(rho) for ref = "max", which must come before any output.

#include "finish.cuh"
#include "launch.cuh"
#include "pipeline.cuh"

namespace secura {
namespace {

using Sum = Accumulator<64, 128, 32, 32>;
template <typename T>
using Chunks = Pipeline<T, Sum, 32, 3, Along::DEPTH, Along::DEPTH>;

// CHUNKS: h, factor, y and what is saved, all in 16 bits and all in whole chunks.
template <typename T, Reads READS>
__global__ void __launch_bounds__(Sum::THREADS, READS == Reads::CHUNKS ? 2 : 1)
    epilogue_kernel(Epilogue p) {
  constexpr bool CHUNKS = READS == Reads::CHUNKS;
  const int across = (p.N + Sum::COLUMNS - 1) / Sum::COLUMNS;
  const int m0 = blockIdx.x / across * Sum::ROWS, n0 = blockIdx.x % across * Sum::COLUMNS;
  T* y = static_cast<T*>(p.y);
  Sum base, change;
  const Operand<T> h = packed<T>(p.h, p.M, p.padded), factor = packed<T>(p.factor, p.N, p.padded);
  load<T, CHUNKS>(base, packed<T>(y, p.M, p.N), m0, n0);
  if constexpr (CHUNKS) {
    Chunks<T>::run(change, h, m0, factor, n0, shared_memory());
  } else {
    multiply<T, Along::DEPTH, Along::DEPTH>(change, h, m0, factor, n0, shared_memory());
  }
  add_vector(change, p.finish.adapter_bias, n0, p.N);
  if (p.find_largest) {
    raise_largest(largest_bits(base, change, p.finish.gate.eps, m0, p.M, n0, p.N), p.largest);
  } else if (p.finish.gate.on) {
    const float slope = slope_of(p.finish.gate, p.largest);
    const int count =
        finish<T, false, CHUNKS>(base, change, p.finish, slope, y, m0, p.M, n0, p.N);
    add_count(count, p.finish.moved);
  } else {
    for_elements<Sum>(
        [&](int i, int j, int e) { base.value[i][j][e] += change.value[i][j][e]; });
    store<T, CHUNKS>(base, y, m0, p.M, n0, p.N);
  }
}

}  // namespace

void epilogue(const Epilogue& p, const Launch& where) {
  with_dtype(where.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto* kernel, int bytes) {
      launch(kernel, p, int64_t{ceil_div(p.M, Sum::ROWS)} * ceil_div(p.N, Sum::COLUMNS),
             Sum::THREADS, bytes, where, "epilogue", {{"M", p.M}, {"N", p.N}, {"r", p.padded}});
    };
    if constexpr (sizeof(T) == 2) {
      if (is_aligned(p.h, p.padded, sizeof(T)) && is_aligned(p.factor, p.padded, sizeof(T)) &&
          by_eights(static_cast<const T*>(p.y), p.finish, p.N)) {
        return run(epilogue_kernel<T, Reads::CHUNKS>, Chunks<T>::BYTES);
      }
    }
    run(epilogue_kernel<T, Reads::ANY>, MULTIPLY_BYTES<Sum>);
  });
}

}  // namespace secura
