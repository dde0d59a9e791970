// Gate backward: from dY and the saved gate, in one pass, everything the backward pass needs.
//
//   db = (beta - 1 + c) s dY       gradient of the base, G' once dT is added into it
//   dd = c s dY                    gradient of the change; c = 1 without importance decay
//   v  = dd C                      (M, r)
//   dT = alpha v core              added to columns I of db (identity 3), so that dX = G' W
//   dadapter_bias = column sums of dd
//
// A block owns whole rows, or with v_part one group of their columns, whose v a second launch adds
// in order: no atomics, and two runs are bitwise equal.

#include "fragments.cuh"
#include "gate.cuh"
#include "launch.cuh"
#include "low_rank.cuh"
#include "pipeline.cuh"

namespace secura {
namespace {

// A step walks over WIDTH columns of the block's rows: dY, what was saved, and those rows of C. Two
// or three steps are under way, in 64 KiB at most, which every chip has.
template <typename T, int RANK>
struct Step {
  using Saved = GateCode<T>;
  using Sum = Accumulator<ROWS_PER_PROGRAM, RANK, 32, RANK / 4>;
  static constexpr int THREADS = Sum::THREADS;
  static constexpr int WIDTH = (RANK == 256 ? 64 : 128) / sizeof(T);
  using Gradient = SharedTile<T, ROWS_PER_PROGRAM, WIDTH, Along::DEPTH>;
  using Gate = SharedTile<Saved, ROWS_PER_PROGRAM, WIDTH, Along::DEPTH>;
  using Factor = SharedTile<T, RANK, WIDTH, Along::ROWS>;
  static constexpr int BYTES = Gradient::BYTES + Gate::BYTES + Factor::BYTES;
  static constexpr int STAGES = std::min(3, 65536 / BYTES);

  Gradient gradient;
  Gate saved;
  Factor factor;

  __device__ __forceinline__ explicit Step(unsigned char* memory)
      : gradient(memory),
        saved(memory + Gradient::BYTES),
        factor(memory + Gradient::BYTES + Gate::BYTES) {}
};

// What starts a step's copies, all in whole chunks. Called for step after step.
template <typename T, int RANK>
class ChunkCopies {
  using Tiles = Step<T, RANK>;
  using Saved = typename Tiles::Saved;
  Copier<typename Tiles::Gradient, Tiles::THREADS> gradient;
  Copier<typename Tiles::Gate, Tiles::THREADS> saved;
  Copier<typename Tiles::Factor, Tiles::THREADS> factor;

 public:
  __device__ __forceinline__ ChunkCopies(const Operand<T>& dy, const Operand<Saved>& saved,
                                         const Operand<T>& factor, int m0)
      : gradient(dy, m0), saved(saved, m0), factor(factor, 0) {}

  __device__ __forceinline__ void copy(const Tiles& to, bool with_factor) {
    gradient.copy_step(to.gradient);
    saved.copy_step(to.saved);
    if (with_factor) {
      factor.copy_step(to.factor);
    }
  }
};

// The same of any operands.
template <typename T, int RANK>
class AnyCopies {
  using Tiles = Step<T, RANK>;
  using Saved = typename Tiles::Saved;
  const Operand<T>&dy, &factor;
  const Operand<Saved>& saved;
  const int m0;
  int n0 = 0;

 public:
  __device__ __forceinline__ AnyCopies(const Operand<T>& dy, const Operand<Saved>& saved,
                                       const Operand<T>& factor, int m0)
      : dy(dy), factor(factor), saved(saved), m0(m0) {}

  __device__ __forceinline__ void copy(const Tiles& to, bool with_factor) {
    constexpr int THREADS = Tiles::THREADS;
    to.gradient.template load<THREADS>(dy, m0, n0);
    to.saved.template load<THREADS>(saved, m0, n0);
    if (with_factor) {
      to.factor.template load<THREADS>(factor, 0, n0);
    }
    n0 += Tiles::WIDTH;
  }
};

// dT of a block's rows and 64 ranks, and where it is to be added.
struct Scatter {
  static constexpr int WIDTH = ByCore::COLUMNS + 1;  // odd: a column's rows lie in different banks
  float dt[ROWS_PER_PROGRAM * WIDTH];
  int column[ByCore::COLUMNS];  // of g
  int next[ByCore::COLUMNS];    // the next rank with the same column, or -1
  bool first[ByCore::COLUMNS];  // whether no earlier rank has it
};

// g[m0..., rows[j]] += dT, for rows of g that this block owns and has written. Equal indices are
// added up in float32 by the thread of the first of them.
template <typename T>
__device__ __forceinline__ void add_to_columns(const ByCore& q, const GateBackward& p, int m0,
                                               int j0, Scatter& s) {
  constexpr int THREADS = ByCore::THREADS;
  const int count = min(p.r - j0, ByCore::COLUMNS), here = threadIdx.x;
  for_elements<ByCore>([&](int i, int j, int e) {
    s.dt[ByCore::row(i, e) * Scatter::WIDTH + ByCore::column(j, e)] = p.alpha * q.value[i][j][e];
  });
  if (here < count) {
    s.column[here] = static_cast<int>(p.rows[j0 + here]);
  }
  __syncthreads();
  if (here < count) {
    const int column = s.column[here];
    bool first = true;
    for (int j = 0; j < here; ++j) {
      first = first && s.column[j] != column;
    }
    int next = here + 1;
    while (next < count && s.column[next] != column) {
      ++next;
    }
    s.first[here] = first;
    s.next[here] = next < count ? next : -1;
  }
  __syncthreads();
  T* g = static_cast<T*>(p.g);
  for (int i = here; i < ROWS_PER_PROGRAM * ByCore::COLUMNS; i += THREADS) {
    const int row = i / ByCore::COLUMNS, j = i % ByCore::COLUMNS;
    if (m0 + row < p.dy.rows && j < count && s.first[j]) {
      float sum = 0.0f;
      for (int same = j; same >= 0; same = s.next[same]) {
        sum += s.dt[row * Scatter::WIDTH + same];
      }
      T& to = g[static_cast<int64_t>(m0 + row) * p.dy.columns + s.column[j]];
      to = from_float<T>(to_float(to) + sum);
    }
  }
  __syncthreads();  // the next ranks may add to the same columns, and reuse the memory
}

// The columns from column0 on of a matrix.
template <typename T>
__device__ __forceinline__ Operand<T> from_column(Operand<T> matrix, int column0, int columns) {
  if (matrix.data != nullptr) {
    matrix.data += column0 * matrix.stride_depth;
  }
  matrix.depth = columns;
  return matrix;
}

// That an SM has registers for, at least. Of wide ranks one: v alone takes half of them.
template <int RANK, Reads READS>
constexpr int BLOCKS = READS == Reads::ANY || RANK == 256 ? 1 : (RANK == 128 ? 2 : 3);

template <typename T, int RANK, Reads READS>
__global__ void __launch_bounds__(Step<T, RANK>::THREADS, BLOCKS<RANK, READS>)
    gate_backward_kernel(GateBackward p) {
  constexpr bool IN_CHUNKS = READS == Reads::CHUNKS;
  using Copies = std::conditional_t<IN_CHUNKS, ChunkCopies<T, RANK>, AnyCopies<T, RANK>>;
  using Tiles = Step<T, RANK>;
  using Sum = typename Tiles::Sum;
  using Saved = typename Tiles::Saved;
  constexpr int THREADS = Tiles::THREADS, WIDTH = Tiles::WIDTH, PER_CHUNK = 16 / sizeof(T);
  constexpr int CHUNKS = WIDTH / PER_CHUNK, STAGES = Tiles::STAGES;
  const int M = p.dy.rows, N = p.dy.columns;
  const bool in_parts = p.v_part != nullptr && !p.sum_parts;
  const int group = in_parts ? blockIdx.x % p.parts : 0;
  const int program = in_parts ? blockIdx.x / p.parts : blockIdx.x;
  const int m0 = program * ROWS_PER_PROGRAM;
  // This block's columns: `columns` of them from `column0` on.
  const int column0 = in_parts ? first_column<WIDTH>(N, group, p.parts) : 0;
  const int columns =
      p.sum_parts ? 0 : (in_parts ? first_column<WIDTH>(N, group + 1, p.parts) : N) - column0;
  const Operand<T> dy = from_column(operand<T>(p.dy), column0, columns);
  const Operand<Saved> saved = from_column(packed<Saved>(p.saved, M, N), column0, columns);
  const Operand<T> factor =
      packed<T>(static_cast<const T*>(p.factor) + static_cast<int64_t>(column0) * p.padded, columns,
                p.padded);
  T* g = static_cast<T*>(p.g);
  const bool chunks_of_g = IN_CHUNKS || is_aligned(g, N, sizeof(T));
  // Without decay dd is db / beta: one matrix, rounded once, serves both.
  const bool proportional = p.decay == nullptr;
  unsigned char* memory = shared_memory();
  const int steps = (columns + WIDTH - 1) / WIDTH;
  const auto tiles = [&](int step) { return Tiles(memory + step % STAGES * Tiles::BYTES); };
  const Operand<T> turned = transposed(factor);
  Copies copies(dy, saved, turned, m0);
  const auto start = [&](int step) {
    if (step < steps) {
      copies.copy(tiles(step), p.v != nullptr);
    }
    commit_copies();
  };

  Sum v;
  for (int step = 0; step < STAGES - 1; ++step) {
    start(step);
  }
  for (int step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    start(step + STAGES - 1);
    const Tiles tile = tiles(step);
    const int n0 = column0 + step * WIDTH;
    // A thread's chunks lie below one another: their columns decay alike.
    static_assert(THREADS % CHUNKS == 0, "one chunk of each line");
    const int index = threadIdx.x % CHUNKS, n = n0 + index * PER_CHUNK;
    float c[PER_CHUNK];
#pragma unroll
    for (int e = 0; e < PER_CHUNK; ++e) {
      c[e] = p.decay != nullptr && (IN_CHUNKS ? n : n + e) < N ? p.decay[n + e] : 1.0f;
    }
#pragma unroll 1  // registers for more blocks an SM
    for (int row = threadIdx.x / CHUNKS; row < ROWS_PER_PROGRAM; row += THREADS / CHUNKS) {
      // Whole chunks in and out: nvcc accesses a reference to shared memory element by element.
      Chunk<T>& place = *reinterpret_cast<Chunk<T>*>(tile.gradient.chunk(row, index));
      const Chunk<T> of_y = place;
      const auto from = *reinterpret_cast<const Vector<Saved, PER_CHUNK>*>(
          &tile.saved.at(row, index * PER_CHUNK));
      Chunk<T> db, dd;
#pragma unroll
      for (int e = 0; e < PER_CHUNK; ++e) {
        const float scaled = decode(from.value[e], p.gate) * to_float(of_y.value[e]);
        db.value[e] = from_float<T>((p.gate.beta - 1.0f + c[e]) * scaled);
        dd.value[e] = proportional ? db.value[e] : from_float<T>(c[e] * scaled);
      }
      place = dd;
      if (g != nullptr && m0 + row < M && n < N) {
        T* to = g + static_cast<int64_t>(m0 + row) * N + n;
        if (IN_CHUNKS || (chunks_of_g && n + PER_CHUNK <= N)) {
          *reinterpret_cast<Chunk<T>*>(to) = db;
        } else {
          for (int e = 0; e < min(PER_CHUNK, N - n); ++e) {
            to[e] = db.value[e];
          }
        }
      }
    }
    __syncthreads();  // dd stands where dY was
    if (p.bias_part != nullptr && threadIdx.x < BIAS_PARTS * WIDTH) {
      constexpr int ROWS = ROWS_PER_PROGRAM / BIAS_PARTS;
      const int part = threadIdx.x / WIDTH, column = threadIdx.x % WIDTH;
      float sum = 0.0f;
      for (int row = part * ROWS; row < (part + 1) * ROWS; ++row) {
        sum += to_float(tile.gradient.at(row, column));
      }
      if (n0 + column < N) {
        p.bias_part[static_cast<int64_t>(program * BIAS_PARTS + part) * N + n0 + column] =
            proportional ? sum * p.gate.by_beta : sum;
      }
    }
    if (p.v != nullptr) {
      v.add(tile.gradient, tile.factor);
    }
  }
  wait_copies<0>();
  __syncthreads();

  if (p.v != nullptr) {
    if (p.sum_parts) {
      sum_of_parts<ROWS_PER_PROGRAM, THREADS>(p.v_part, p.parts, p.v, M, p.r, m0);
    } else {
      if (proportional) {
        for_elements<Sum>([&](int i, int j, int e) { v.value[i][j][e] *= p.gate.by_beta; });
      }
      if (in_parts) {
        store(v, p.v_part + static_cast<int64_t>(group) * M * p.r, m0, M, 0, p.r);
        return;
      }
      store(v, p.v, m0, M, 0, p.r);
    }
    if (g != nullptr && p.rows == nullptr) {
      project_rows(p.v, M, p.r, p.padded, p.core, p.alpha, static_cast<T*>(p.q), m0, memory);
    } else if (g != nullptr) {
      __syncthreads();  // v and g are read back by other threads than wrote them
      for (int j0 = 0; j0 < p.r; j0 += ByCore::COLUMNS) {
        const ByCore q = times_core(p.v, M, p.r, p.core, m0, j0, memory);
        add_to_columns<T>(q, p, m0, j0, *reinterpret_cast<Scatter*>(memory));
      }
    }
  }
}

template <typename T>
bool all_in_chunks(const GateBackward& p) {
  const int N = p.dy.columns;
  return in_chunks<T>(p.dy, Along::DEPTH) && is_aligned(p.saved, N, sizeof(GateCode<T>)) &&
         is_aligned(p.factor, p.padded, sizeof(T)) && is_aligned(p.g, N, sizeof(T));
}

template <typename T, int RANK>
void run(const GateBackward& p, const Launch& where) {
  using Tiles = Step<T, RANK>;
  constexpr int BYTES = std::max({Tiles::STAGES * Tiles::BYTES, MULTIPLY_BYTES<ByCore>,
                                  static_cast<int>(sizeof(Scatter))});
  auto* kernel = gate_backward_kernel<T, RANK, Reads::ANY>;
  if constexpr (sizeof(T) == 2) {
    if (all_in_chunks<T>(p)) {
      kernel = gate_backward_kernel<T, RANK, Reads::CHUNKS>;
    }
  }
  const auto run_step = [&](const GateBackward& step, int parts) {
    launch(kernel, step, int64_t{ceil_div(p.dy.rows, ROWS_PER_PROGRAM)} * parts, Tiles::THREADS,
           BYTES, where, "gate_backward", {{"M", p.dy.rows}, {"N", p.dy.columns}, {"r", p.r}});
  };
  run_step(p, p.parts);
  if (p.v_part != nullptr) {
    GateBackward sum = p;
    sum.sum_parts = true;
    run_step(sum, 1);
  }
}

}  // namespace

void gate_backward(const GateBackward& p, const Launch& where) {
  with_dtype(where.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_rank(p.padded, [&](auto rank) { run<T, decltype(rank)::value>(p, where); });
  });
}

}  // namespace secura
