// Every launch, and the static dispatch on dtype and rank, pass here.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "passes.h"
#include "types.cuh"

namespace secura {

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The sizes a failed launch is reported with.
using Shape = std::initializer_list<std::pair<const char*, int>>;

inline void check(cudaError_t error, const char* pass, Shape shape) {
  if (error == cudaSuccess) {
    return;
  }
  (void)cudaGetLastError();  // or another's next check would report it again
  std::string message = std::string(pass) + "(";
  for (const auto& [name, size] : shape) {
    message += (message.back() == '(' ? "" : ", ") + std::string(name) + "=" + std::to_string(size);
  }
  throw std::runtime_error(message + ") failed: " + cudaGetErrorString(error));
}

// Runs `blocks` blocks of a kernel with `bytes` of dynamic shared memory each.
template <typename Parameters>
void launch(void (*kernel)(Parameters), const Parameters& parameters, int64_t blocks, int threads,
            int bytes, const Launch& where, const char* pass, Shape shape) {
  if (blocks == 0) {
    return;
  }
  if (bytes > 48 * 1024) {  // more has to be asked for
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          pass, shape);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = where.stream;
  check(cudaLaunchKernelEx(&config, kernel, parameters), pass, shape);
}

// Of the current device, on which every pass is launched.
inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice", {});
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute", {});
  return value;
}

template <typename T>
struct Type {
  using type = T;
};

// run(Type<T>) for the element type of a layer.
template <typename Run>
void with_dtype(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::float32: return run(Type<float>());
    case Dtype::bfloat16: return run(Type<bfloat16>());
    case Dtype::float16: return run(Type<float16>());
  }
}

// run(std::integral_constant<int, RANK>) for the narrowest RANK that holds `padded` ranks.
template <typename Run>
void with_rank(int padded, Run run) {
  if (padded <= 64) {
    return run(std::integral_constant<int, 64>());
  }
  if (padded <= 128) {
    return run(std::integral_constant<int, 128>());
  }
  return run(std::integral_constant<int, 256>());
}

}  // namespace secura
