// What the C++ that PTX is translated to calls [../ptx.py].
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "instructions.cuh"

namespace ptx {

using host::Where;

inline uint16_t to_f16(float value) { return __half_as_ushort(__float2half_rn(value)); }
inline uint16_t to_bf16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
inline float from_f16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
inline float from_bf16(uint16_t bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }

// Shifts by more than all bits are shifts by all bits.
template <typename T>
T shift_left(T value, uint32_t by) {
  return by >= 8 * sizeof(T) ? 0 : value << by;
}
template <typename T>
T shift_right(T value, uint32_t by) {
  return value >> std::min<uint32_t>(by, 8 * sizeof(T) - 1) >> (by >= 8 * sizeof(T) ? 1 : 0);
}

// prmt: each nibble of the selector names one of 8 bytes, or with its highest bit that byte's sign.
inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (nibble & 7) & 0xFF;
    if (nibble & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << 8 * i;
  }
  return result;
}

// bfi: the low `count` bits of a, in place of those of b from `at` on.
inline uint32_t insert(uint32_t a, uint32_t b, uint32_t at, uint32_t count) {
  at &= 0xFF;
  count &= 0xFF;
  const uint32_t ones = count >= 32 ? 0xFFFFFFFF : (1u << count) - 1;
  const uint32_t mask = at >= 32 ? 0 : ones << at;
  return (b & ~mask) | (at >= 32 ? 0 : a << at & mask);
}

template <typename T, int COUNT>
struct Vector {
  T at[COUNT];
};

inline void need_alignment(const char* what, const void* address, size_t bytes,
                           const Where& where) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    host::fail(std::string(what) + " an address not aligned to " + std::to_string(bytes) + " bytes",
               where);
  }
}

inline void need_shared(const char* what, const void* address, size_t bytes, const Where& where) {
  need_alignment(what, address, bytes, where);
  if (!host::in_shared_memory(address, bytes)) {
    host::fail(std::string(what) + " an address outside of the block's shared memory", where);
  }
}

template <typename T, int COUNT>
Vector<T, COUNT> load_param(const unsigned char* address) {
  Vector<T, COUNT> value;
  std::memcpy(&value, address, sizeof(value));
  return value;
}

template <typename T, int COUNT>
Vector<T, COUNT> load_shared(const unsigned char* address, Where where = Where::current()) {
  need_shared("ld.shared of", address, sizeof(T) * COUNT, where);
  return load_param<T, COUNT>(address);
}

template <typename T, int COUNT>
Vector<T, COUNT> load_global(const unsigned char* address, Where where = Where::current()) {
  need_alignment("ld.global of", address, sizeof(T) * COUNT, where);
  if (host::watching) host::watch(address, sizeof(T) * COUNT, host::Access::read, where);
  return load_param<T, COUNT>(address);
}

template <typename T, int COUNT>
void store_shared(unsigned char* address, Vector<T, COUNT> value, Where where = Where::current()) {
  need_shared("st.shared to", address, sizeof(value), where);
  std::memcpy(address, &value, sizeof(value));
}

template <typename T, int COUNT>
void store_global(unsigned char* address, Vector<T, COUNT> value, Where where = Where::current()) {
  need_alignment("st.global to", address, sizeof(value), where);
  if (host::watching) host::watch(address, sizeof(value), host::Access::write, where);
  std::memcpy(address, &value, sizeof(value));
}

inline uint32_t shuffle_xor(uint32_t value, uint32_t mask, uint32_t clamp, uint32_t lanes,
                            Where where = Where::current()) {
  if (clamp != 31) host::fail("shfl.sync in parts of a warp is not known", where);
  return __shfl_xor_sync(lanes, value, static_cast<int>(mask), 32, where);
}

inline void barrier(uint32_t number, Where where = Where::current()) {
  if (number != 0) host::fail("bar.sync of another barrier than 0 is not known", where);
  __syncthreads(where);
}

}  // namespace ptx
