// Decode: y = x W_eff^T for few tokens, W_eff formed tile by tile in shared memory and never stored.
// At M <= 64 a layer's time is that of reading W: writing and reading W_eff would triple it.

#include "launch.cuh"
#include "weight_change.cuh"

namespace secura {
namespace {

using OfW = Accumulator<64, COLUMNS_OF_W, 32, 32>;
using Sum = Accumulator<MOST_TOKENS, OfW::ROWS, 32, 16>;
static_assert(OfW::THREADS == Sum::THREADS, "the same threads");

template <typename T>
using Tile = SharedTile<T, 64, COLUMNS_OF_W, Along::DEPTH>;  // of x, and of W_eff

template <typename T>
__global__ void __launch_bounds__(Sum::THREADS, 1) decode_kernel(Decode p) {
  const Operand<T> x = operand<T>(p.x);
  const Gate& gate = p.change.gate;
  const int N = p.change.weight.rows, tiles = (x.depth + COLUMNS_OF_W - 1) / COLUMNS_OF_W;
  const int group = blockIdx.x % p.groups, n0 = blockIdx.x / p.groups * OfW::ROWS;
  const float slope = slope_of(gate, p.largest);
  unsigned char* memory = shared_memory();
  const Tile<T> effective(memory), tokens(memory + Tile<T>::BYTES);
  Sum sum;
  for (int tile = group; tile < tiles; tile += p.groups) {
    const int k0 = tile * COLUMNS_OF_W;
    OfW base, change;
    weight_and_change<T>(base, change, p.change, n0, k0, memory);
    tokens.template load<Sum::THREADS>(x, 0, k0);
    commit_copies();
    for_elements<OfW>([&](int i, int j, int e) {
      const int row = OfW::row(i, e);
      const float decay = n0 + row < N ? element(p.change.decay, n0 + row, 1.0f) : 1.0f;
      const float b = base.value[i][j][e], d = change.value[i][j][e];
      const float s = gate_value(b, d, slope, gate).s;
      effective.at(row, OfW::column(j, e)) = from_float<T>(apply_gate(b, d, s, gate, decay));
    });
    wait_copies<0>();
    __syncthreads();  // both tiles are here
    sum.add(tokens, effective);
    __syncthreads();  // and used: the memory is the pipeline's again
  }
  store(sum, p.part + static_cast<int64_t>(group) * x.rows * N, 0, x.rows, n0, N);
}

}  // namespace

void decode(const Decode& p, const Launch& where) {
  const int N = p.change.weight.rows;
  with_dtype(where.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(decode_kernel<T>, p, int64_t{p.x.rows > 0} * p.groups * ceil_div(N, OfW::ROWS),
           Sum::THREADS, std::max(MULTIPLY_BYTES<OfW>, 2 * Tile<T>::BYTES), where, "decode",
           {{"M", p.x.rows}, {"N", N}, {"K", p.x.columns}, {"r", p.change.padded}});
  });
}

}  // namespace secura
