// Down: p = a factor and q = alpha p core^T in one kernel, a read once.
//
// Forward: a = x, factor = R, so p = t and q = h. Backward without a gate: a = dY, factor = C, so
// p = v and q = dT = alpha v core (the core transposed by its strides).

#include "fragments.cuh"
#include "launch.cuh"
#include "low_rank.cuh"
#include "pipeline.cuh"

namespace secura {
namespace {

template <int RANK>
using Sum = Accumulator<64, RANK, 32, RANK / 4>;

// As deep as four stages in 64 KiB can be.
template <typename T, int RANK>
using Chunks = Pipeline<T, Sum<RANK>, RANK == 64 ? 64 : 32, RANK == 256 ? 3 : 4, Along::DEPTH,
                        Along::ROWS>;

// p, or the block's part of it.
template <typename T, int RANK, Reads READS>
__device__ __forceinline__ Sum<RANK> product(const Down& d, int m0, int part) {
  using Rows = Sum<RANK>;
  constexpr int STEP = 64;
  Operand<T> a = operand<T>(d.a), factor = packed<T>(d.factor, a.depth, d.padded);
  const int k0 = first_column<STEP>(a.depth, part, d.parts);
  a.depth = factor.rows = first_column<STEP>(a.depth, part + 1, d.parts) - k0;
  a.data += k0 * a.stride_depth;
  factor.data += k0 * factor.stride_row;
  Rows sum;
  if constexpr (READS == Reads::CHUNKS) {
    Chunks<T, RANK>::run(sum, a, m0, transposed(factor), 0, shared_memory());
  } else {
    multiply<T, Along::DEPTH, Along::ROWS>(sum, a, m0, transposed(factor), 0, shared_memory());
  }
  return sum;
}

template <typename T, int RANK, Reads READS>
__global__ void __launch_bounds__(Sum<RANK>::THREADS, 1) down_kernel(Down d) {
  using Rows = Sum<RANK>;
  const int M = d.a.rows;
  const bool in_parts = d.part != nullptr && !d.sum_parts;
  const int part = in_parts ? blockIdx.x % d.parts : 0;
  const int m0 = (in_parts ? blockIdx.x / d.parts : blockIdx.x) * Rows::ROWS;
  if (!d.sum_parts) {
    const Rows sum = product<T, RANK, READS>(d, m0, part);
    if (in_parts) {
      store(sum, d.part + static_cast<int64_t>(part) * M * d.r, m0, M, 0, d.r);
      return;
    }
    if (d.p_float32) {
      store(sum, static_cast<float*>(d.p), m0, M, 0, d.r);
    } else {
      store(sum, static_cast<T*>(d.p), m0, M, 0, d.r);
    }
  }
  const auto finish = [&](auto* p) {
    if (d.sum_parts) {
      sum_of_parts<Rows::ROWS, Rows::THREADS>(d.part, d.parts, p, M, d.r, m0);
    }
    T* q = static_cast<T*>(d.q);
    const T* t = static_cast<const T*>(d.t);
    float* openness = openness_of_rows(shared_memory());
    if (d.task_gate != nullptr) {
      __syncthreads();  // p is read back, and the shared memory is free
      if (t == nullptr) {
        find_openness(p, M, d.r, d.task_gate, m0, openness);
      } else {
        find_openness(t, M, d.r, d.task_gate, m0, openness);
        __syncthreads();
        multiply_rows(p, M, d.r, m0, openness);
      }
    }
    const bool opens = d.task_gate != nullptr && t == nullptr;
    project_rows(p, M, d.r, d.padded, d.core, d.alpha, q, m0, shared_memory(), opens);
    if (t != nullptr) {
      __syncthreads();  // q is read back
      add_through_gate(q, d.padded, t, M, d.r, d.task_gate, m0, openness);
    }
  };
  if (d.p_float32) {
    finish(static_cast<float*>(d.p));
  } else {
    finish(static_cast<T*>(d.p));
  }
}

}  // namespace

void down(const Down& d, const Launch& where) {
  with_dtype(where.dtype, [&](auto type) {
    with_rank(d.padded, [&](auto rank) {
      using T = typename decltype(type)::type;
      constexpr int RANK = decltype(rank)::value;
      const auto run = [&](auto* kernel, int bytes) {
        const auto run_step = [&](const Down& step, int parts) {
          launch(kernel, step, int64_t{ceil_div(d.a.rows, Sum<RANK>::ROWS)} * parts,
                 Sum<RANK>::THREADS, std::max(bytes, PROJECT_BYTES), where, "down",
                 {{"M", d.a.rows}, {"K", d.a.columns}, {"r", d.r}});
        };
        run_step(d, d.parts);
        if (d.part != nullptr) {
          Down sum = d;
          sum.sum_parts = true;
          run_step(sum, 1);
        }
      };
      if constexpr (sizeof(T) == 2) {
        if (in_chunks<T>(d.a, Along::DEPTH) && is_aligned(d.factor, d.padded, sizeof(T))) {
          return run(down_kernel<T, RANK, Reads::CHUNKS>, Chunks<T, RANK>::BYTES);
        }
      }
      run(down_kernel<T, RANK, Reads::ANY>, MULTIPLY_BYTES<Sum<RANK>>);
    });
  });
}

}  // namespace secura
