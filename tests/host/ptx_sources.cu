// One pass of csrc/ for nvcc -ptx, its kernels of layers in one dtype and of up to 64 ranks alone
// [../cuda_ptx.py].
#define with_dtype with_any_dtype
#define with_rank with_any_rank
#include "launch.cuh"
#undef with_dtype
#undef with_rank

namespace secura {

template <typename Run>
void with_dtype(Dtype, Run run) {
  run(Type<SECURA_DTYPE>());
}

template <typename Run>
void with_rank(int, Run run) {
  run(std::integral_constant<int, 64>());
}

}  // namespace secura

#include SECURA_PASS
