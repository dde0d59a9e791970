// The machine's own instructions, each behind a C++ function: asynchronous copies, ldmatrix, mma.
//
// A host compiler takes `host_instructions.h` instead, which the tests provide: it runs the same
// kernels on a CPU.
#pragma once

#include <cstdint>

#include "types.cuh"

namespace secura {

// The value itself. What follows from it is found where it is needed, and not kept in registers
// from one turn of a loop to the next.
__device__ __forceinline__ int found_anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

}  // namespace secura

#ifndef __CUDACC__
#include <host_instructions.h>
#else

namespace secura {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
constexpr bool TENSOR_CORES = true;  // mma on bfloat16, and asynchronous copies; device code only
#else
constexpr bool TENSOR_CORES = false;
#endif

// The block's dynamic shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// 1 / value and 2^value by the special function unit's one instruction, to float32's last bits.
// What is below 2^-126 counts as 0, on either side.
__device__ __forceinline__ float reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
__device__ __forceinline__ float power_of_2(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// Starts a copy of `bytes` (0 to 16) bytes into 16 bytes of shared memory; the rest becomes zero.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
#if __CUDA_ARCH__ >= 800
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
#else
  if (bytes == 16) {
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
    return;
  }
  for (int i = 0; i < 16; ++i) {
    static_cast<uint8_t*>(shared)[i] = i < bytes ? static_cast<const uint8_t*>(global)[i] : 0;
  }
#endif
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// ldmatrix.x4: four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of
// matrix l / 8, and receives of each matrix the elements (l / 4, 2 (l % 4)) and the next one.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
#if __CUDA_ARCH__ >= 800
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
#endif
}

// The same of the transposed matrices: elements (2 (l % 4), l / 4) and the one below.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
#if __CUDA_ARCH__ >= 800
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
#endif
}

// mma.m16n8k16: c (16 x 8, float32) += a (16 x 16) b (16 x 8). With g = lane / 4, i = 2 (lane % 4):
//   c: (g, i), (g, i + 1), (g + 8, i), (g + 8, i + 1)
//   a: pairs along k at (g, i), (g + 8, i), (g, i + 8), (g + 8, i + 8)
//   b: pairs along k at (i, g), (i + 8, g)
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (Is<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

}  // namespace secura

#endif
