// The part of CUDA's runtime and built-ins that the kernels use, for a host compiler [grid.h].
#pragma once

#include <math.h>

#include <bit>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <tuple>
#include <type_traits>
#include <utility>

#include "grid.h"

#ifndef SECURA_HOST_ARCH
#define SECURA_HOST_ARCH 800
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

constexpr int warpSize = host::WARP;

// ---- Vector types ----

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- Arithmetic ----

inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }

inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
// Macros: the C library declares functions of these names.
#define __expf(value) expf(value)
#define __logf(value) logf(value)

// As the GPU converts: NaN becomes 0, what is too large the nearest int.
inline int __float2int_rn(float value) {
  if (std::isnan(value)) return 0;
  if (value >= 2147483648.0f) return INT_MAX;
  if (value < -2147483648.0f) return INT_MIN;
  return static_cast<int>(std::nearbyint(value));
}

#define SECURA_HOST_MIN_MAX(type)                                \
  inline type min(type a, type b) { return b < a ? b : a; }      \
  inline type max(type a, type b) { return a < b ? b : a; }
SECURA_HOST_MIN_MAX(int)
SECURA_HOST_MIN_MAX(unsigned)
SECURA_HOST_MIN_MAX(long)
SECURA_HOST_MIN_MAX(unsigned long)
SECURA_HOST_MIN_MAX(long long)
SECURA_HOST_MIN_MAX(unsigned long long)
#undef SECURA_HOST_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

// ---- Memory ----

template <typename T>
inline T __ldg(const T* address) {
  return *address;
}

namespace host {

// One fiber runs at a time, and none is interrupted here.
template <typename T, typename F>
inline T exchange(T* address, F change) {
  if (watching) watch(address, sizeof(T), Access::atomic, __builtin_return_address(0));
  const Unwatched own;
  const T old = *address;
  *address = change(old);
  return old;
}

}  // namespace host

inline int atomicAdd(int* address, int value) {
  return host::exchange(address, [=](int old) { return old + value; });
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return host::exchange(address, [=](unsigned old) { return old + value; });
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return host::exchange(address, [=](unsigned long long old) { return old + value; });
}
inline float atomicAdd(float* address, float value) {
  return host::exchange(address, [=](float old) { return old + value; });
}
inline int atomicMax(int* address, int value) {
  return host::exchange(address, [=](int old) { return max(old, value); });
}

// ---- Synchronisation and shuffles ----

inline void __syncthreads(host::Where where = host::Where::current()) {
  host::barrier("__syncthreads", where);
}

namespace host {

inline int lane() {
  const uint3& t = threadIdx;
  return (t.x + blockDim.x * (t.y + blockDim.y * t.z)) % WARP;
}

inline void need_whole_warp(unsigned mask, const Where& where) {
  if (mask != 0xFFFFFFFFu) fail("a collective's mask must name the whole warp here", where);
}

template <typename T>
struct Shuffle {
  T value, result;
  int source;
};

template <typename T>
void do_shuffle(void* const (&lanes)[WARP]) {
  for (void* lane : lanes) {
    auto* to = static_cast<Shuffle<T>*>(lane);
    to->result = static_cast<const Shuffle<T>*>(lanes[to->source])->value;
  }
}

template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source, const Where& where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  need_whole_warp(mask, where);
  Shuffle<T> deposit{value, value, source};
  collective(name, do_shuffle<T>, &deposit, where);
  return deposit.result;
}

// The last lane of this lane's group of `width`.
inline int last_of_group(int width) { return lane() | (width - 1); }

}  // namespace host

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, host::Where where = host::Where::current()) {
  host::need_whole_warp(mask, where);
  host::collective("__syncwarp", [](void* const (&)[host::WARP]) {}, nullptr, where);
}

// A lane whose source lies outside of its group of `width` keeps its value.
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                         host::Where where = host::Where::current()) {
  const int source = host::lane() ^ lane_mask;
  const bool outside = source < 0 || source > host::last_of_group(width);
  return host::shuffle("__shfl_xor_sync", mask, value, outside ? host::lane() : source, where);
}

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int from, int width = warpSize,
                     host::Where where = host::Where::current()) {
  const int source = (host::lane() & ~(width - 1)) | (from & (width - 1));
  return host::shuffle("__shfl_sync", mask, value, source, where);
}

template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                          host::Where where = host::Where::current()) {
  const int source = host::lane() + static_cast<int>(delta);
  const bool outside = source > host::last_of_group(width);
  return host::shuffle("__shfl_down_sync", mask, value, outside ? host::lane() : source, where);
}

template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                        host::Where where = host::Where::current()) {
  const int source = host::lane() - static_cast<int>(delta);
  const bool outside = source < (host::lane() & ~(width - 1));
  return host::shuffle("__shfl_up_sync", mask, value, outside ? host::lane() : source, where);
}

// ---- Runtime ----

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};

struct cudaLaunchAttribute;  // none is provided

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace host {

// An A100, or with SECURA_HOST_ARCH=750 a T4.
constexpr int SHARED_BYTES_OPT_IN = SECURA_HOST_ARCH >= 800 ? 166912 : 65536;
constexpr int SHARED_BYTES = 49152;  // without cudaFuncSetAttribute
constexpr int MULTIPROCESSORS = SECURA_HOST_ARCH >= 800 ? 108 : 40;

// The environment can make it a smaller chip, for a test of what is then reported.
inline int opt_in_bytes() {
  const char* bytes = std::getenv("SECURA_HOST_SHARED_BYTES");
  return bytes == nullptr ? SHARED_BYTES_OPT_IN : std::atoi(bytes);
}

// Or one of fewer processors, which takes larger tiles.
inline int processors() {
  const char* count = std::getenv("SECURA_HOST_PROCESSORS");
  return count == nullptr ? MULTIPROCESSORS : std::atoi(count);
}

// What runs in place of a kernel, given the bytes of its one parameter. Where there is any such
// function, a kernel that has none cannot be launched.
struct Translated {
  void (*run)(const unsigned char* parameters);
  int launches;
};
inline std::map<const void*, Translated> translated;

inline std::map<const void*, int> opted_in;  // each kernel's dynamic shared memory, at most
inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t report(bool good) {
  if (good) return cudaSuccess;
  return last_error = cudaErrorInvalidValue;
}

inline bool acceptable(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const auto most = opted_in.find(kernel);
  const size_t bytes = most == opted_in.end() ? SHARED_BYTES : max(most->second, SHARED_BYTES);
  return grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= INT_MAX && grid.y <= 65535 &&
         grid.z <= 65535 && block.x >= 1 && block.y >= 1 && block.z >= 1 && block.x <= 1024 &&
         block.y <= 1024 && block.z <= 64 && block.x * block.y * block.z <= 1024 &&
         config.dynamicSmemBytes <= bytes && config.numAttrs == 0;
}

}  // namespace host

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}

inline cudaError_t cudaPeekAtLastError() { return host::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(host::last_error, cudaSuccess); }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return host::report(false);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = host::processors();
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = SECURA_HOST_ARCH / 100;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = SECURA_HOST_ARCH / 10 % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = host::opt_in_bytes();
      break;
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  *address = &symbol;
  return cudaSuccess;
}

template <typename T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute, int value) {
  const std::lock_guard lock(host::launch_mutex);
  if (value < 0 || value > host::opt_in_bytes()) return host::report(false);
  host::opted_in[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}

// Runs the kernel to its end.
template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... arguments) {
  static_assert((sizeof(P) + ... + 0) <= 4096, "a kernel's parameters");
  static_assert((std::is_trivially_copyable_v<P> && ...), "a kernel's parameters");
  const std::lock_guard lock(host::launch_mutex);
  if (!host::acceptable(*config, reinterpret_cast<const void*>(kernel))) return host::report(false);
  const std::tuple<P...> parameters(std::forward<A>(arguments)...);
  std::function<void()> run = [&] { std::apply(kernel, parameters); };
  if constexpr (sizeof...(P) == 1) {
    const auto found = host::translated.find(reinterpret_cast<const void*>(kernel));
    if (found != host::translated.end()) {
      ++found->second.launches;
      run = [&parameters, function = found->second.run] {
        function(reinterpret_cast<const unsigned char*>(&std::get<0>(parameters)));
      };
    } else if (!host::translated.empty()) {
      return host::report(false);
    }
  }
  host::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, run);
  return cudaSuccess;
}
