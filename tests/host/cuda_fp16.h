// float16 for a host compiler. Storage and conversions only, so that arithmetic does not compile.
#pragma once

#include <bit>
#include <cstdint>

struct __half {
  __half() = default;
  uint16_t __x;  // the bits
};
static_assert(sizeof(__half) == 2 && alignof(__half) == 2);

inline uint16_t __half_as_ushort(__half value) { return value.__x; }

inline __half __ushort_as_half(uint16_t bits) {
  __half value;
  value.__x = bits;
  return value;
}

inline float __half2float(__half value) {
  return static_cast<float>(std::bit_cast<_Float16>(value.__x));
}

// Rounded to nearest even, to infinity beyond 65504; NaN becomes CUDA's 0x7FFF.
inline __half __float2half_rn(float value) {
  if (value != value) return __ushort_as_half(0x7FFF);
  return __ushort_as_half(std::bit_cast<uint16_t>(static_cast<_Float16>(value)));
}
