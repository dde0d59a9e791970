// Project: p = a[:, index] and q = alpha p core^T. Forward over a library product y0: p = t, by
// identity 1. In the weight domain: a = W, index = cols, so p = C and q = P = alpha C core.

#include "launch.cuh"
#include "low_rank.cuh"

namespace secura {
namespace {

template <typename T>
__global__ void __launch_bounds__(ByCore::THREADS, 1) project_kernel(Project d) {
  const Operand<T> a = operand<T>(d.a);
  const int m0 = blockIdx.x * ByCore::ROWS, rows = min(a.rows - m0, ByCore::ROWS);
  T* p = static_cast<T*>(d.p);
  for (int i = threadIdx.x; i < rows * d.r; i += ByCore::THREADS) {
    const int row = m0 + i / d.r, k = i % d.r;
    const int64_t from = d.index == nullptr ? k : d.index[k];
    p[static_cast<int64_t>(row) * d.r + k] =
        a.data[row * a.stride_row + from * a.stride_depth];
  }
  const bool opens = d.task_gate != nullptr;
  if (opens) {
    __syncthreads();  // p is read back
    find_openness(p, a.rows, d.r, d.task_gate, m0, openness_of_rows(shared_memory()));
  }
  if (d.q_float32) {
    project_rows(p, a.rows, d.r, d.padded, d.core, d.alpha, static_cast<float*>(d.q), m0,
                 shared_memory(), opens);
  } else {
    project_rows(p, a.rows, d.r, d.padded, d.core, d.alpha, static_cast<T*>(d.q), m0,
                 shared_memory(), opens);
  }
}

}  // namespace

void project(const Project& d, const Launch& where) {
  with_dtype(where.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(project_kernel<T>, d, ceil_div(d.a.rows, ByCore::ROWS), ByCore::THREADS,
           PROJECT_BYTES, where, "project", {{"M", d.a.rows}, {"r", d.r}});
  });
}

}  // namespace secura
