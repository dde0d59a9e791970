// One pass of csrc/ for nvcc -ptx, its kernels of 16-bit layers and up to 64 ranks alone: they compile
// in a sixth of the time that all take [../cuda_ptx.py].
#define with_dtype with_any_dtype
#define with_rank with_any_rank
#include "launch.cuh"
#undef with_dtype
#undef with_rank

namespace secura {

template <typename Run>
void with_dtype(Dtype dtype, Run run) {
  dtype == Dtype::bfloat16 ? run(Type<bfloat16>()) : run(Type<float16>());
}

template <typename Run>
void with_rank(int, Run run) {
  run(std::integral_constant<int, 64>());
}

}  // namespace secura

#include SECURA_PASS
