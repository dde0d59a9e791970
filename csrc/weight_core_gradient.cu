// Weight core gradient: Q = (dW_eff * ds) R (N, r), where dW_eff = dY^T X is contracted tile by tile
// and never stored. d_core = alpha C^T Q follows (`core_gradient`).

#include "launch.cuh"
#include "pipeline.cuh"
#include "weight_change.cuh"

namespace secura {
namespace {

// A tile of W, its gradient times R, and where that is multiplied: the gradient of delta_W in shared
// memory and a tile of R. In float32 half as many rows fit in 64 KiB of shared memory.
template <typename T>
struct Tiles {
  static constexpr bool WIDE = sizeof(T) == 2;
  using OfW = std::conditional_t<WIDE, Accumulator<128, COLUMNS_OF_W, 64, 32>,
                                 Accumulator<64, COLUMNS_OF_W, 32, 32>>;
  using Q = std::conditional_t<WIDE, Accumulator<128, 64, 32, 32>, Accumulator<64, 64, 32, 16>>;
  using Gradient = SharedTile<T, OfW::ROWS, COLUMNS_OF_W, Along::DEPTH>;
  using Factor = SharedTile<T, Q::COLUMNS, DEPTH<T>, Along::ROWS>;
  static constexpr int BYTES = std::max(Gradient::BYTES + Factor::BYTES, MULTIPLY_BYTES<OfW>);
};

// dY^T X at rows n0... and columns k0... of W. CHUNKS: dY and X are in 16 bits and whole chunks.
template <typename T, Reads READS, class Sum>
__device__ __forceinline__ void gradient_of_w(Sum& sum, const Operand<T>& dy, int n0,
                                              const Operand<T>& x, int k0, unsigned char* memory) {
  if constexpr (READS == Reads::CHUNKS) {
    using Chunks = Pipeline<T, Sum, DEPTH<T>, 4, Along::ROWS, Along::ROWS>;
    static_assert(Chunks::BYTES <= MULTIPLY_BYTES<Sum>, "the memory of any operands");
    Chunks::run(sum, dy, n0, x, k0, memory);
  } else {
    multiply<T, Along::ROWS, Along::ROWS>(sum, dy, n0, x, k0, memory);
  }
}

// DEPTH columns of a shared tile, as a tile of their own.
template <class Tile>
struct Part {
  using Element = typename Tile::Element;
  static constexpr int ROWS = Tile::ROWS, DEPTH = secura::DEPTH<Element>;
  static constexpr bool ALONG_DEPTH = Tile::ALONG_DEPTH;
  static_assert(ALONG_DEPTH, "columns are what a line holds");
  Tile whole;
  int k;
  __device__ __forceinline__ Element* chunk(int line, int index) const {
    return whole.chunk(line, k / Tile::PER_CHUNK + index);
  }
  __device__ __forceinline__ Element& at(int row, int depth) const {
    return whole.at(row, k + depth);
  }
};

template <typename T, Reads READS>
__global__ void __launch_bounds__(Tiles<T>::OfW::THREADS, 1)
    weight_core_gradient_kernel(WeightCoreGradient p) {
  using Sum = typename Tiles<T>::OfW;
  using Q = typename Tiles<T>::Q;
  constexpr int THREADS = Sum::THREADS;
  const Gate& gate = p.change.gate;
  const Operand<T> dy = transposed(operand<T>(p.dy)), x = transposed(operand<T>(p.x));
  const int N = dy.rows, K = x.rows, padded = p.change.padded;
  const int tiles = (K + COLUMNS_OF_W - 1) / COLUMNS_OF_W;
  const int group = blockIdx.x % p.groups, row0 = blockIdx.x / p.groups * Sum::ROWS;
  unsigned char* memory = shared_memory();
  const typename Tiles<T>::Gradient of_change(memory);
  const typename Tiles<T>::Factor factor(memory + decltype(of_change)::BYTES);
  const float slope = slope_of(gate, p.largest);

  for (int tile = group; tile < tiles; tile += p.groups) {
    // In 16 bits addresses kept from tile to tile would spill; in float32, those found anew.
    const int k0 = tile * COLUMNS_OF_W, n0 = sizeof(T) == 2 ? found_anew(row0) : row0;
    Sum base, change, gradient;
    weight_and_change<T>(base, change, p.change, n0, k0, memory);
    const auto decay = [&](int i, int e) {
      const int n = n0 + Sum::row(i, e);
      return n < N ? element(p.change.decay, n, 1.0f) : 1.0f;
    };
    for_elements<Sum>([&](int i, int j, int e) {  // c s is all that is needed: half the registers
      float& b = base.value[i][j][e];
      b = decay(i, e) * gate_value(b, change.value[i][j][e], slope, gate).s;
    });
    gradient_of_w<T, READS>(gradient, dy, n0, x, k0, memory);
    for_elements<Sum>(
        [&](int i, int j, int e) { gradient.value[i][j][e] *= base.value[i][j][e]; });
    // In 16 bits as two addends, dd rounded and what that leaves: once rounded, it would be the
    // largest error of d_core.
    for (int addend = 0; addend < (sizeof(T) == 2 ? 2 : 1); ++addend) {
      for_elements<Sum>([&](int i, int j, int e) {
        float& dd = gradient.value[i][j][e];
        const T rounded = from_float<T>(dd);
        of_change.at(Sum::row(i, e), Sum::column(j, e)) = rounded;
        dd -= to_float(rounded);
      });
      for (int r0 = 0; r0 < padded; r0 += Q::COLUMNS) {
        Q q;
        for (int k = 0; k < COLUMNS_OF_W; k += DEPTH<T>) {
          __syncthreads();  // the gradient is written, the previous part of R used
          factor.template load<THREADS>(transposed(packed<T>(p.change.factor, K, padded)), r0,
                                        k0 + k);
          commit_copies();
          wait_copies<0>();
          __syncthreads();
          q.add(Part<typename Tiles<T>::Gradient>{of_change, k}, factor);
        }
        for_elements<Q>([&](int i, int j, int e) {
          const int n = n0 + Q::row(i, e), rank = r0 + Q::column(j, e);
          if (n < N && rank < padded) {  // this block's alone, and always this thread's
            p.q[(static_cast<int64_t>(group) * N + n) * padded + rank] += q.value[i][j][e];
          }
        });
      }
      __syncthreads();  // the gradient is used
    }
  }
}

template <typename T>
void run(const WeightCoreGradient& p, const Launch& where) {
  using Of = Tiles<T>;
  const int N = p.dy.columns, K = p.x.columns;
  auto* kernel = weight_core_gradient_kernel<T, Reads::ANY>;
  if constexpr (sizeof(T) == 2) {
    if (in_chunks<T>(p.dy, Along::DEPTH) && in_chunks<T>(p.x, Along::DEPTH)) {
      kernel = weight_core_gradient_kernel<T, Reads::CHUNKS>;
    }
  }
  launch(kernel, p, int64_t{p.groups} * ceil_div(N, Of::OfW::ROWS), Of::OfW::THREADS, Of::BYTES,
         where, "weight_core_gradient",
         {{"M", p.dy.rows}, {"N", N}, {"K", K}, {"r", p.change.padded}});
}

}  // namespace

void weight_core_gradient(const WeightCoreGradient& p, const Launch& where) {
  with_dtype(where.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    run<T>(p, where);
  });
}

}  // namespace secura
