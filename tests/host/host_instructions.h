// csrc/instructions.cuh for a host compiler: the same functions, with their operands checked.
#pragma once

#include <cstring>

#include "cuda_runtime.h"

namespace secura {

constexpr bool TENSOR_CORES = SECURA_HOST_ARCH >= 800;

inline unsigned char* shared_memory() { return host::shared; }

// ---- The special function unit ----

namespace host_detail {

inline float without_subnormal(float value) {
  return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value;
}

}  // namespace host_detail

inline float reciprocal(float value) {
  return host_detail::without_subnormal(1.0f / host_detail::without_subnormal(value));
}

inline float power_of_2(float value) {
  return host_detail::without_subnormal(exp2f(host_detail::without_subnormal(value)));
}

// ---- Asynchronous copies ----

inline void copy_async(void* shared, const void* global, int bytes,
                       host::Where where = host::Where::current()) {
  if (host::watching && bytes > 0) host::watch(global, bytes, host::Access::read, where);
  const host::Unwatched own;
  const auto unaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 != 0; };
  if (bytes < 0 || bytes > 16) {
    host::fail("cp.async of " + std::to_string(bytes) + " bytes", where);
  }
  if (unaligned(shared)) host::fail("cp.async to an address not aligned to 16 bytes", where);
  if (unaligned(global)) host::fail("cp.async from an address not aligned to 16 bytes", where);
  if (!host::in_shared_memory(shared, 16)) {
    host::fail("cp.async to an address outside of the block's shared memory", where);
  }

  const host::Copy copy{shared, global, bytes, host::running->group};
  if (!TENSOR_CORES || host::schedule == host::Schedule::forward) {
    copy.finish();
  } else {
    std::memset(shared, 0xFF, 16);
    host::running->copies.push_back(copy);
  }
}

inline void commit_copies() {
  const host::Unwatched own;
  ++host::running->group;
}

template <int PENDING>
inline void wait_copies() {
  static_assert(PENDING >= 0);
  const host::Unwatched own;
  auto& copies = host::running->copies;
  while (!copies.empty() && copies.front().group < host::running->group - PENDING) {
    copies.front().finish();
    copies.pop_front();
  }
}

// ---- ldmatrix ----

namespace host_detail {

inline void need_tensor_cores(const char* name, const host::Where& where) {
  if (!TENSOR_CORES) host::fail(std::string(name) + " without TENSOR_CORES", where);
}

struct LoadMatrices {
  uint32_t* out;
  const void* row;
};

// The eight rows of a matrix are read at once: from eight different groups of four banks, or in turns.
inline void check_banks(void* const (&lanes)[host::WARP]) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned groups = 0;
    for (int row = 0; row < 8; ++row) {
      const auto* deposit = static_cast<const LoadMatrices*>(lanes[8 * matrix + row]);
      const auto offset = static_cast<const unsigned char*>(deposit->row) - host::shared;
      groups |= 1u << offset / 16 % 8;
    }
    if (groups != 0xFF) host::fail("ldmatrix of rows in the same banks");
  }
}

// Row r of matrix m is given by lane 8 m + r.
template <bool TRANSPOSED>
void do_load_matrices(void* const (&lanes)[host::WARP]) {
  if (host::banks_are_checked) check_banks(lanes);
  const auto element = [&](int matrix, int row, int column) -> uint32_t {
    const auto* lane = static_cast<const LoadMatrices*>(lanes[8 * matrix + row]);
    uint16_t value;
    std::memcpy(&value, static_cast<const unsigned char*>(lane->row) + 2 * column, 2);
    return value;
  };
  for (int lane = 0; lane < host::WARP; ++lane) {
    auto* out = static_cast<const LoadMatrices*>(lanes[lane])->out;
    const int i = lane / 4, j = 2 * (lane % 4);
    for (int m = 0; m < 4; ++m) {
      out[m] = TRANSPOSED ? element(m, j, i) | element(m, j + 1, i) << 16
                          : element(m, i, j) | element(m, i, j + 1) << 16;
    }
  }
}

template <bool TRANSPOSED>
void load_matrices(uint32_t (&out)[4], const void* row, const host::Where& where) {
  constexpr const char* NAME = TRANSPOSED ? "ldmatrix.trans" : "ldmatrix";
  need_tensor_cores(NAME, where);
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    host::fail(std::string(NAME) + " of a row not aligned to 16 bytes", where);
  }
  if (!host::in_shared_memory(row, 16)) {
    host::fail(std::string(NAME) + " of a row outside of the block's shared memory", where);
  }
  LoadMatrices deposit{out, row};
  host::collective(NAME, do_load_matrices<TRANSPOSED>, &deposit, where);
}

}  // namespace host_detail

inline void load_matrices(uint32_t (&out)[4], const void* row,
                          host::Where where = host::Where::current()) {
  host_detail::load_matrices<false>(out, row, where);
}

inline void load_matrices_transposed(uint32_t (&out)[4], const void* row,
                                     host::Where where = host::Where::current()) {
  host_detail::load_matrices<true>(out, row, where);
}

// ---- mma ----

namespace host_detail {

struct MultiplyAdd {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// The two elements of a register, the one of the lower index in the lower bits.
template <typename T>
void unpack(uint32_t pair, float& low, float& high) {
  T values[2];
  std::memcpy(values, &pair, 4);
  low = to_float(values[0]);
  high = to_float(values[1]);
}

template <typename T>
void do_multiply_add(void* const (&lanes)[host::WARP]) {
  float a[16][16], b[8][16], c[16][8];  // b by columns
  for (int lane = 0; lane < host::WARP; ++lane) {
    const auto* from = static_cast<const MultiplyAdd*>(lanes[lane]);
    const int g = lane / 4, i = 2 * (lane % 4);
    for (int part = 0; part < 4; ++part) {
      const int m = g + 8 * (part % 2), k = i + 8 * (part / 2);
      unpack<T>(from->a[part], a[m][k], a[m][k + 1]);
    }
    for (int part = 0; part < 2; ++part) {
      const int k = i + 8 * part;
      unpack<T>(from->b[part], b[g][k], b[g][k + 1]);
    }
    for (int part = 0; part < 4; ++part) c[g + 8 * (part / 2)][i + part % 2] = from->c[part];
  }
  float b_rows[16][8];
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < 8; ++n) b_rows[k][n] = b[n][k];
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b_rows[k][n];
    }
  }
  for (int lane = 0; lane < host::WARP; ++lane) {
    auto* to = static_cast<MultiplyAdd*>(lanes[lane])->c;
    const int g = lane / 4, i = 2 * (lane % 4);
    for (int part = 0; part < 4; ++part) to[part] = c[g + 8 * (part / 2)][i + part % 2];
  }
}

}  // namespace host_detail

template <typename T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         host::Where where = host::Where::current()) {
  static_assert(Is<T, bfloat16> || Is<T, float16>);
  host_detail::need_tensor_cores("mma", where);
  host_detail::MultiplyAdd deposit{c, a, {b0, b1}};
  host::collective("mma", host_detail::do_multiply_add<T>, &deposit, where);
}

}  // namespace secura
