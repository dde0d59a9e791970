// bfloat16 for a host compiler. Storage and conversions only, so that arithmetic does not compile.
#pragma once

#include <bit>
#include <cstdint>

struct __nv_bfloat16 {
  __nv_bfloat16() = default;
  uint16_t __x;  // the bits
};
static_assert(sizeof(__nv_bfloat16) == 2 && alignof(__nv_bfloat16) == 2);

inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.__x; }

inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) {
  __nv_bfloat16 value;
  value.__x = bits;
  return value;
}

inline float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.__x) << 16);
}

// Rounded to nearest even; NaN becomes CUDA's 0x7FFF.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (value != value) return __ushort_as_bfloat16(0x7FFF);
  const auto bits = std::bit_cast<uint32_t>(value);
  return __ushort_as_bfloat16(static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16));
}
