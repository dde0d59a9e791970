// Tests of the host shim: `test_shim CASE` [../test_host_shim.py].
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "instructions.cuh"

using namespace secura;

namespace {

#define CHECK(condition)                                                     \
  do {                                                                       \
    if (!(condition)) {                                                      \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);   \
      std::exit(1);                                                          \
    }                                                                        \
  } while (false)

template <typename... P, typename... A>
cudaError_t try_launch(dim3 grid, dim3 block, size_t bytes, void (*kernel)(P...), A... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = bytes;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename... P, typename... A>
void launch(dim3 grid, dim3 block, size_t bytes, void (*kernel)(P...), A... arguments) {
  CHECK(try_launch(grid, block, bytes, kernel, arguments...) == cudaSuccess);
}

// ---- Conversions ----

void conversions() {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto to_bf16 = [](float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); };
  const auto to_half = [](float x) { return __half_as_ushort(__float2half_rn(x)); };
  const auto from_bf16 = [](int x) { return __bfloat162float(__ushort_as_bfloat16(x)); };
  const auto from_half = [](int x) { return __half2float(__ushort_as_half(x)); };

  CHECK(to_bf16(1.0f) == 0x3F80 && to_bf16(-2.0f) == 0xC000 && to_bf16(-0.0f) == 0x8000);
  CHECK(to_bf16(1.0f + 0x1p-8f) == 0x3F80);             // a tie, down to even
  CHECK(to_bf16(1.0f + 0x3p-8f) == 0x3F82);             // a tie, up to even
  CHECK(to_bf16(1.0f + 0x1p-8f + 0x1p-20f) == 0x3F81);  // above a tie
  CHECK(to_bf16(inf) == 0x7F80 && to_bf16(-inf) == 0xFF80);
  CHECK(to_bf16(std::numeric_limits<float>::max()) == 0x7F80);
  CHECK(to_bf16(nan) == 0x7FFF && to_bf16(__int_as_float(0x7F800001)) == 0x7FFF);
  CHECK(to_bf16(0x1p-133f) == 1 && to_bf16(0x1p-134f) == 0);  // the smallest subnormal
  CHECK(from_bf16(0x3F80) == 1.0f && from_bf16(1) == 0x1p-133f && from_bf16(0x7F80) == inf);

  CHECK(to_half(1.0f) == 0x3C00 && to_half(-2.0f) == 0xC000 && to_half(-0.0f) == 0x8000);
  CHECK(to_half(1.0f + 0x1p-11f) == 0x3C00 && to_half(1.0f + 0x3p-11f) == 0x3C02);
  CHECK(to_half(1.0f + 0x1p-11f + 0x1p-20f) == 0x3C01);
  CHECK(to_half(65504.0f) == 0x7BFF && to_half(65519.0f) == 0x7BFF);
  CHECK(to_half(65520.0f) == 0x7C00 && to_half(1e30f) == 0x7C00 && to_half(-inf) == 0xFC00);
  CHECK(to_half(nan) == 0x7FFF);
  CHECK(to_half(0x1p-24f) == 1 && to_half(0x3p-24f) == 3 && to_half(0x1.8p-24f) == 2);
  CHECK(to_half(0x1p-25f) == 0 && to_half(0x1.01p-25f) == 1 && to_half(0x1p-26f) == 0);
  CHECK(from_half(0x3C00) == 1.0f && from_half(1) == 0x1p-24f && from_half(0x7C00) == inf);

  for (int bits = 0; bits < 0x10000; ++bits) {
    const float half = from_half(bits), bf16 = from_bf16(bits);
    CHECK(half != half ? to_half(half) == 0x7FFF : to_half(half) == bits);
    CHECK(bf16 != bf16 ? to_bf16(bf16) == 0x7FFF : to_bf16(bf16) == bits);
  }
  CHECK(__float2int_rn(2.5f) == 2 && __float2int_rn(3e9f) == INT_MAX && __float2int_rn(nan) == 0);
}

// ---- ldmatrix ----

// Four matrices one after the other, each row of 8 in 16 bytes.
__global__ void load_kernel(uint32_t* out) {
  auto* elements = reinterpret_cast<uint16_t*>(shared_memory());
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) elements[i] = i;
  __syncwarp();
  uint32_t plain[4], transposed[4];
  load_matrices(plain, elements + 8 * lane);
  load_matrices_transposed(transposed, elements + 8 * lane);
  for (int m = 0; m < 4; ++m) {
    out[8 * lane + m] = plain[m];
    out[8 * lane + 4 + m] = transposed[m];
  }
}

void load_layout() {
  std::vector<uint32_t> out(32 * 8);
  launch(1, 32, 512, load_kernel, out.data());
  for (unsigned lane = 0; lane < 32; ++lane) {
    for (unsigned m = 0; m < 4; ++m) {
      const unsigned first = 64 * m + 8 * (lane / 4) + 2 * (lane % 4);
      CHECK(out[8 * lane + m] == (first | (first + 1) << 16));
      const unsigned top = 64 * m + 8 * (2 * (lane % 4)) + lane / 4;
      CHECK(out[8 * lane + 4 + m] == (top | (top + 8) << 16));
    }
  }
}

// ---- mma ----

constexpr int PITCH = 24;  // elements from row to row of shared memory

// c (16 x 16) += a (16 x 16) b (16 x 16). Stored transposed, a is (k, m) and b (k, n); else a is
// (m, k) and b (n, k).
template <typename T, bool TRANSPOSED>
__global__ void multiply_kernel(const T* a, const T* b, float* c) {
  T* shared_a = reinterpret_cast<T*>(shared_memory());
  T* shared_b = shared_a + 16 * PITCH;
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) {
    shared_a[i / 16 * PITCH + i % 16] = a[i];
    shared_b[i / 16 * PITCH + i % 16] = b[i];
  }
  __syncwarp();
  // Matrices of 8 x 8 in the order (0, 0), (8, 0), (0, 8), (8, 8), and in that of the transposed.
  const int down = lane % 16, right = lane / 16 * 8;
  const int down_t = lane % 8 + lane / 16 * 8, right_t = lane / 8 % 2 * 8;
  uint32_t fragment_a[4], fragment_b[4];
  if constexpr (TRANSPOSED) {
    load_matrices_transposed(fragment_a, shared_a + down_t * PITCH + right_t);
    load_matrices_transposed(fragment_b, shared_b + down * PITCH + right);
  } else {
    load_matrices(fragment_a, shared_a + down * PITCH + right);
    load_matrices(fragment_b, shared_b + down_t * PITCH + right_t);
  }
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4, column = 8 * half + 2 * (lane % 4);
    float part[4];
    for (int i = 0; i < 4; ++i) part[i] = c[(row + i / 2 * 8) * 16 + column + i % 2];
    multiply_add<T>(part, fragment_a, fragment_b[2 * half], fragment_b[2 * half + 1]);
    for (int i = 0; i < 4; ++i) c[(row + i / 2 * 8) * 16 + column + i % 2] = part[i];
  }
}

// The same with the fragments taken straight from memory, by the layouts as documented.
template <typename T>
__global__ void multiply_direct_kernel(const T* a, const T* b, float* c) {
  const int g = threadIdx.x / 4, i = 2 * (threadIdx.x % 4);
  const auto pair = [](const T* at) { return *reinterpret_cast<const uint32_t*>(at); };
  const uint32_t fragment[4] = {pair(a + g * 16 + i), pair(a + (g + 8) * 16 + i),
                                pair(a + g * 16 + i + 8), pair(a + (g + 8) * 16 + i + 8)};
  for (int n = 0; n < 16; n += 8) {
    float* const to[4] = {c + g * 16 + n + i, c + g * 16 + n + i + 1, c + (g + 8) * 16 + n + i,
                          c + (g + 8) * 16 + n + i + 1};
    float part[4] = {*to[0], *to[1], *to[2], *to[3]};
    multiply_add<T>(part, fragment, pair(b + (n + g) * 16 + i), pair(b + (n + g) * 16 + i + 8));
    for (int j = 0; j < 4; ++j) *to[j] = part[j];
  }
}

template <typename T>
void multiply_of() {
  std::mt19937 bits(1);
  const auto integer = [&] { return static_cast<int>(bits() % 33) - 16; };
  for (int variant = 0; variant < 3; ++variant) {
    double a[16][16], b[16][16];  // a (m, k), b (n, k)
    alignas(16) T stored_a[256], stored_b[256];
    float c[256];
    for (int i = 0; i < 256; ++i) {
      const int row = i / 16, column = i % 16;
      const double x = integer(), y = integer();
      (variant == 1 ? a[column][row] : a[row][column]) = x;
      (variant == 1 ? b[column][row] : b[row][column]) = y;
      stored_a[i] = from_float<T>(x);
      stored_b[i] = from_float<T>(y);
      c[i] = i;
    }
    const auto kernel = variant == 0   ? multiply_kernel<T, false>
                        : variant == 1 ? multiply_kernel<T, true>
                                       : multiply_direct_kernel<T>;
    launch(1, 32, 2 * 16 * PITCH * sizeof(T), kernel, stored_a, stored_b, c);
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        double sum = 16 * m + n;
        for (int k = 0; k < 16; ++k) sum += a[m][k] * b[n][k];
        CHECK(c[16 * m + n] == sum);
      }
    }
  }
}

void multiply() {
  multiply_of<bfloat16>();
  multiply_of<float16>();
}

// ---- Shuffles, atomics, indices ----

__global__ void shuffle_kernel(int* wrong) {
  const int lane = threadIdx.x % 32;
  const float value = 100.0f * (threadIdx.x / 32) + lane;
  const float base = value - lane;
  const auto expect = [&](float got, int source) { atomicAdd(wrong, got != base + source); };
  for (int m = 1; m < 32; ++m) expect(__shfl_xor_sync(0xFFFFFFFF, value, m), lane ^ m);
  expect(__shfl_xor_sync(0xFFFFFFFF, value, 4, 4), (lane ^ 4) > (lane | 3) ? lane : lane ^ 4);
  expect(__shfl_sync(0xFFFFFFFF, value, 7), 7);
  expect(__shfl_sync(0xFFFFFFFF, value, 3 * lane), 3 * lane % 32);
  expect(__shfl_sync(0xFFFFFFFF, value, 9, 8), lane / 8 * 8 + 1);
  expect(__shfl_down_sync(0xFFFFFFFF, value, 5), lane < 27 ? lane + 5 : lane);
  expect(__shfl_down_sync(0xFFFFFFFF, value, 5, 8), lane % 8 < 3 ? lane + 5 : lane);
  expect(__shfl_up_sync(0xFFFFFFFF, value, 5), lane >= 5 ? lane - 5 : lane);

  unsigned long long sum = 1ull << 40 | lane;  // 8 bytes
  for (int m = 16; m > 0; m /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, m);
  atomicAdd(wrong, sum != (32ull << 40) + 31 * 16);
}

__global__ void index_kernel(int* seen, int* largest, unsigned long long* count) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
  ++seen[i];
  atomicMax(largest, i);
  atomicAdd(count, 1ull);
}

void shuffles() {
  int wrong = 0;
  launch(3, 96, 0, shuffle_kernel, &wrong);
  CHECK(wrong == 0);

  const int threads = 2 * 3 * 4 * 5 * 6 * 3;
  std::vector<int> seen(threads);
  int largest = -1;
  unsigned long long count = 0;
  launch(dim3(2, 3, 4), dim3(5, 6, 3), 0, index_kernel, seen.data(), &largest, &count);
  for (const int times : seen) CHECK(times == 1);
  CHECK(largest == threads - 1 && count == threads);
}

// ---- Asynchronous copies ----

// Thread i copies chunk i of each of three tiles, a group each, and reads it after a wait.
__global__ void copy_kernel(const uint4* from, uint4* out) {
  auto* tiles = reinterpret_cast<uint4*>(shared_memory());
  const int i = threadIdx.x, n = blockDim.x;
  for (int tile = 0; tile < 3; ++tile) {
    copy_async(tiles + tile * n + i, from + tile * n + i, 16);
    commit_copies();
  }
  commit_copies();  // an empty group
  wait_copies<2>();
  out[i] = tiles[i];
  out[n + i] = tiles[n + i];
  wait_copies<1>();
  out[2 * n + i] = tiles[2 * n + i];

  copy_async(tiles + i, from, 0);
  copy_async(tiles + n + i, from, 6);
  wait_copies<0>();  // neither is in a group yet
  out[3 * n + i] = tiles[i];
  commit_copies();
  wait_copies<0>();
  out[4 * n + i] = tiles[i];
  out[5 * n + i] = tiles[n + i];
}

// Tile 1 is read when only tile 0's group has been waited for.
__global__ void early_kernel(uint4* from, uint4* out) {
  auto* tiles = reinterpret_cast<uint4*>(shared_memory());
  for (int tile = 0; tile < 2; ++tile) {
    copy_async(tiles + tile, from + tile, 16);
    commit_copies();
  }
  wait_copies<1>();
  out[0] = tiles[0];
  out[1] = tiles[1];
  wait_copies<0>();
}

// Tile 1's source is overwritten when only tile 0's group has been waited for.
__global__ void late_kernel(uint4* from, uint4* out) {
  auto* tile = reinterpret_cast<uint4*>(shared_memory());
  for (int i = 0; i < 2; ++i) {
    copy_async(tile + i, from + i, 16);
    commit_copies();
  }
  wait_copies<1>();
  from[0] = from[1] = {7, 7, 7, 7};
  wait_copies<0>();
  out[0] = tile[0];
  out[1] = tile[1];
}

bool same(uint4 a, uint4 b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

void copies() {
  const unsigned n = 64;
  std::vector<uint4> from(3 * n), out(6 * n);
  for (unsigned i = 0; i < 3 * n; ++i) from[i] = {i << 16 | 1, i << 16 | 2, i << 16 | 3, i};
  launch(2, n, 3 * n * 16, copy_kernel, from.data(), out.data());
  const bool deferred = TENSOR_CORES && host::schedule != host::Schedule::forward;
  const unsigned none = 0xFFFFFFFF;
  for (unsigned i = 0; i < n; ++i) {
    for (unsigned tile = 0; tile < 3; ++tile) CHECK(same(out[tile * n + i], from[tile * n + i]));
    CHECK(same(out[3 * n + i], deferred ? uint4{none, none, none, none} : uint4{0, 0, 0, 0}));
    CHECK(same(out[4 * n + i], {0, 0, 0, 0}));
    CHECK(same(out[5 * n + i], {from[0].x, from[0].y & 0xFFFF, 0, 0}));
  }
}

// Prints what was read.
void two_copies(void (*kernel)(uint4*, uint4*)) {
  std::vector<uint4> from = {{1, 1, 1, 1}, {2, 2, 2, 2}}, out(2);
  launch(1, 1, 32, kernel, from.data(), out.data());
  std::printf("%u %u\n", out[0].x, out[1].x);
}

// ---- What a missing barrier does ----

template <bool BARRIER>
__global__ void neighbour_kernel(int* out) {
  auto* values = reinterpret_cast<int*>(shared_memory());
  const int i = threadIdx.x, n = blockDim.x;
  values[i] = i;
  if constexpr (BARRIER) __syncthreads();
  out[i] = values[i == 0 ? 0 : i - 1];
  if constexpr (BARRIER) __syncthreads();
  values[n - 1 - i] = 2 * i;
  if constexpr (BARRIER) __syncthreads();
  out[n + i] = values[i];
}

// One warp hands a value to the next, so that only the order of warps matters.
__global__ void warps_kernel(int* out) {
  auto* values = reinterpret_cast<int*>(shared_memory());
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) values[warp] = warp;
  __syncwarp();
  if (threadIdx.x % 32 == 1) out[warp] = values[warp == 0 ? 0 : warp - 1];
}

// Prints how many results are not what a kernel with barriers gives.
void barriers() {
  const int n = 256;
  std::vector<int> with(2 * n), without(2 * n), warps(n / 32);
  launch(1, n, n * sizeof(int), neighbour_kernel<true>, with.data());
  launch(1, n, n * sizeof(int), neighbour_kernel<false>, without.data());
  launch(1, n, n * sizeof(int), warps_kernel, warps.data());
  int wrong = 0, wrong_warps = 0;
  for (int i = 0; i < n; ++i) {
    CHECK(with[i] == (i == 0 ? 0 : i - 1));
    CHECK(with[n + i] == 2 * (n - 1 - i));
    wrong += without[i] != with[i];
  }
  for (int warp = 1; warp < n / 32; ++warp) wrong_warps += warps[warp] != warp - 1;
  std::printf("%d %d\n", wrong, wrong_warps);
}

__global__ void unset_kernel(float* out) {
  auto* values = reinterpret_cast<float*>(shared_memory());
  out[blockIdx.x] = values[0];
  values[0] = 1.0f;
}

void unset() {
  float out[3] = {};
  launch(3, 1, 4, unset_kernel, out);
  for (const float value : out) CHECK(value != value);
}

__global__ void order_kernel(int* order, int* next) {
  if (threadIdx.x == 0) order[(*next)++] = blockIdx.x;
}

// Prints the order of 8 blocks.
void block_order() {
  int order[8], next = 0;
  launch(8, 32, 0, order_kernel, order, &next);
  for (const int block : order) std::printf("%d ", block);
  std::printf("\n");
}

__global__ void turns_kernel(int* order, int* next) {
  auto* mine = reinterpret_cast<int*>(shared_memory());
  if (threadIdx.x == 0) order[atomicAdd(next, 1)] = *mine = blockIdx.x;
  __syncthreads();
  if (threadIdx.x == 0) order[atomicAdd(next, 1)] = *mine;
}

// Prints the order of 4 blocks, from before and after a barrier.
void turns() {
  int order[8], next = 0;
  launch(4, 64, 4, turns_kernel, order, &next);
  for (const int block : order) std::printf("%d ", block);
  std::printf("\n");
}

// ---- Blocks that meet in global memory ----

enum class Meeting { apart, both_write, reads_neighbour, copies_neighbour, reads_counter };

template <Meeting MEETING>
__global__ void meeting_kernel(uint4* values, int* count) {
  const int thread = threadIdx.x, next = (blockIdx.x + 1) % gridDim.x;
  auto* bytes = reinterpret_cast<unsigned char*>(values);
  if (thread == 0) atomicAdd(count, 1);
  if (thread == 0) values[1 + blockIdx.x].x = values[9].x;  // which all read
  bytes[blockIdx.x] = thread;                               // one byte of a word that others write
  if (MEETING == Meeting::both_write) bytes[3 * next] = 1;
  __syncthreads();
  if (MEETING == Meeting::reads_neighbour && thread == 0) values[1 + blockIdx.x].y = values[1 + next].x;
  if (MEETING == Meeting::copies_neighbour) {
    copy_async(shared_memory() + 16 * thread, values + 1 + next, 16);
  }
  if (MEETING == Meeting::reads_counter && *count == 4) values[1 + blockIdx.x].y = 1;
}

template <Meeting MEETING>
void meeting() {
  std::vector<uint4> values(10);
  int count = 0;
  launch(4, 64, 1024, meeting_kernel<MEETING>, values.data(), &count);
  CHECK(count == 4);
}

// ---- What must end the process ----

enum class Fault {
  lane_returns,
  lane_skips,
  different_places,
  different_kinds,
  barrier_by_some_lanes,
  barrier_by_some_warps,
  mask,
  copy_unaligned,
  copy_from_unaligned,
  copy_outside,
  copy_too_long,
  load_unaligned,
  load_outside,
  write_outside,
  misaligned_vector,
};

__global__ void fault_kernel(Fault fault, uint4* data) {
  unsigned char* shared = shared_memory();
  const int thread = threadIdx.x, lane = thread % 32;
  uint32_t out[4];
  float sum = lane;
  switch (fault) {
    case Fault::lane_returns:
      if (lane == 5) return;
      __syncwarp();
      break;
    case Fault::lane_skips:
      if (lane != 5) sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
      __syncthreads();
      break;
    case Fault::different_places:
      if (lane < 16) {
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
      } else {
        sum -= __shfl_xor_sync(0xFFFFFFFF, sum, 1);
      }
      break;
    case Fault::different_kinds:
      if (lane < 16) {
        __syncwarp();
      } else {
        load_matrices(out, shared + 16 * lane);
      }
      break;
    case Fault::barrier_by_some_lanes:
      if (lane != 7) __syncthreads();
      break;
    case Fault::barrier_by_some_warps:
      if (thread < 32) __syncthreads();
      break;
    case Fault::mask:
      __shfl_xor_sync(0x0000FFFF, sum, 1);
      break;
    case Fault::copy_unaligned:
      copy_async(shared + 8, data, 16);
      break;
    case Fault::copy_from_unaligned:
      copy_async(shared, reinterpret_cast<char*>(data) + 8, 16);
      break;
    case Fault::copy_outside:
      copy_async(shared + 1024, data, 16);
      break;
    case Fault::copy_too_long:
      copy_async(shared, data, 17);
      break;
    case Fault::load_unaligned:
      load_matrices(out, shared + 2 * lane);
      break;
    case Fault::load_outside:
      load_matrices_transposed(out, shared + 16 * (lane + 33));
      break;
    case Fault::write_outside:
      shared[1023 + thread] = 0;
      break;
    case Fault::misaligned_vector:
      *reinterpret_cast<uint4*>(shared + 4) = data[0];
      break;
  }
  if (thread == 0) data[0].x = static_cast<unsigned>(sum);
}

void fault(const std::string& name) {
  std::vector<uint4> data(4);
  const std::pair<const char*, Fault> faults[] = {
      {"lane_returns", Fault::lane_returns},
      {"lane_skips", Fault::lane_skips},
      {"different_places", Fault::different_places},
      {"different_kinds", Fault::different_kinds},
      {"barrier_by_some_lanes", Fault::barrier_by_some_lanes},
      {"barrier_by_some_warps", Fault::barrier_by_some_warps},
      {"mask", Fault::mask},
      {"copy_unaligned", Fault::copy_unaligned},
      {"copy_from_unaligned", Fault::copy_from_unaligned},
      {"copy_outside", Fault::copy_outside},
      {"copy_too_long", Fault::copy_too_long},
      {"load_unaligned", Fault::load_unaligned},
      {"load_outside", Fault::load_outside},
      {"write_outside", Fault::write_outside},
      {"misaligned_vector", Fault::misaligned_vector},
  };
  for (const auto& [known, which] : faults) {
    if (name == known) {
      launch(1, 64, 1024, fault_kernel, which, data.data());
      std::printf("not found\n");
      return;
    }
  }
  CHECK(!"a known case");
}

__global__ void partial_kernel() { __syncwarp(); }

// ---- Limits ----

__global__ void small_kernel(int* count) { atomicAdd(count, 1); }
__global__ void large_kernel(int* count) { atomicAdd(count, 1); }

void limits() {
  int device = -1, major, minor, shared, processors;
  CHECK(cudaGetDevice(&device) == cudaSuccess && device == 0);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (TENSOR_CORES) {
    CHECK(major == 8 && minor == 0 && shared == 166912 && processors == 108);
  } else {
    CHECK(major == 7 && minor == 5 && shared == 65536 && processors == 40);
  }

  int count = 0;
  const auto large = cudaFuncAttributeMaxDynamicSharedMemorySize;
  CHECK(try_launch(1, 1, 49152, small_kernel, &count) == cudaSuccess);
  CHECK(try_launch(1, 1, 49153, small_kernel, &count) == cudaErrorInvalidValue);
  CHECK(cudaGetLastError() == cudaErrorInvalidValue && cudaGetLastError() == cudaSuccess);
  CHECK(cudaFuncSetAttribute(large_kernel, large, 60000) == cudaSuccess);
  CHECK(try_launch(1, 1, 60000, large_kernel, &count) == cudaSuccess);
  CHECK(try_launch(1, 1, 60001, large_kernel, &count) == cudaErrorInvalidValue);
  CHECK(cudaFuncSetAttribute(large_kernel, large, shared + 1) == cudaErrorInvalidValue);
  CHECK(try_launch(1, 1025, 0, small_kernel, &count) == cudaErrorInvalidValue);
  CHECK(try_launch(1, dim3(32, 33), 0, small_kernel, &count) == cudaErrorInvalidValue);
  CHECK(try_launch(dim3(1, 65536), 1, 0, small_kernel, &count) == cudaErrorInvalidValue);
  CHECK(try_launch(dim3(1, 1, 65536), 1, 0, small_kernel, &count) == cudaErrorInvalidValue);
  CHECK(try_launch(0, 1, 0, small_kernel, &count) == cudaErrorInvalidValue);
  CHECK(count == 2);
  CHECK(try_launch(1, 1024, 0, small_kernel, &count) == cudaSuccess && count == 1026);
}

// Launches from several CPU threads, also of fibers that another one has run before.
void cpu_threads() {
  const auto work = [] {
    for (int i = 0; i < 20; ++i) {
      shuffles();
      multiply_of<bfloat16>();
    }
  };
  std::thread first(work), second(work);
  work();
  first.join();
  second.join();
}

// ---- Speed ----

// A tile of 128 x 128 x 64 as a kernel computes it: 8 warps of 64 x 32 each.
__global__ void tile_kernel(const bfloat16* a, const bfloat16* b, float* c) {
  auto* shared_a = reinterpret_cast<bfloat16*>(shared_memory());
  auto* shared_b = shared_a + 128 * 72;
  for (int i = threadIdx.x; i < 128 * 8; i += blockDim.x) {
    copy_async(shared_a + i / 8 * 72 + i % 8 * 8, a + 8 * i, 16);
    copy_async(shared_b + i / 8 * 72 + i % 8 * 8, b + 8 * i, 16);
  }
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / 4 * 64, column = warp % 4 * 32;
  float sum[4][4][4] = {};
  for (int k = 0; k < 64; k += 16) {
    uint32_t fragment_b[2][4];
    for (int j = 0; j < 2; ++j) {
      const int n = column + 16 * j + lane % 8 + lane / 16 * 8;
      load_matrices(fragment_b[j], shared_b + n * 72 + k + lane / 8 % 2 * 8);
    }
    for (int i = 0; i < 4; ++i) {
      uint32_t fragment_a[4];
      load_matrices(fragment_a, shared_a + (row + 16 * i + lane % 16) * 72 + k + lane / 16 * 8);
      for (int j = 0; j < 4; ++j) {
        multiply_add<bfloat16>(sum[i][j], fragment_a, fragment_b[j / 2][j % 2 * 2],
                               fragment_b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
  for (int i = 0; i < 64; ++i) {
    const int part = i % 4;
    const int m = row + i / 16 * 16 + lane / 4 + part / 2 * 8;
    const int n = column + i / 4 % 4 * 8 + 2 * (lane % 4) + part % 2;
    c[m * 128 + n] = sum[i / 16][i / 4 % 4][part];
  }
}

// Prints milliseconds per tile.
void tile() {
  std::vector<Chunk<bfloat16>> chunks_a(1024), chunks_b(1024);
  auto* a = reinterpret_cast<bfloat16*>(chunks_a.data());
  auto* b = reinterpret_cast<bfloat16*>(chunks_b.data());
  for (int i = 0; i < 8192; ++i) {
    a[i] = from_float<bfloat16>(i % 13 - 6);
    b[i] = from_float<bfloat16>(i % 11 - 5);
  }
  std::vector<float> c(128 * 128);
  const int blocks = 20;
  const auto start = std::chrono::steady_clock::now();
  launch(blocks, 256, 2 * 128 * 72 * 2, tile_kernel, a, b, c.data());
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  for (int m = 0; m < 128; ++m) {
    for (int n = 0; n < 128; ++n) {
      float sum = 0;
      for (int k = 0; k < 64; ++k) sum += to_float(a[m * 64 + k]) * to_float(b[n * 64 + k]);
      CHECK(c[m * 128 + n] == sum);
    }
  }
  std::printf("%.3f\n", 1000 * seconds.count() / blocks);
}

}  // namespace

int main(int count, char** arguments) {
  CHECK(count == 2);
  const std::string name = arguments[1];
  const std::pair<const char*, void (*)()> cases[] = {
      {"conversions", conversions},
      {"load_layout", load_layout},
      {"multiply", multiply},
      {"shuffles", shuffles},
      {"copies", copies},
      {"early_read", [] { two_copies(early_kernel); }},
      {"late_source", [] { two_copies(late_kernel); }},
      {"barriers", barriers},
      {"unset", unset},
      {"block_order", block_order},
      {"turns", turns},
      {"apart", meeting<Meeting::apart>},
      {"both_write", meeting<Meeting::both_write>},
      {"reads_neighbour", meeting<Meeting::reads_neighbour>},
      {"copies_neighbour", meeting<Meeting::copies_neighbour>},
      {"reads_counter", meeting<Meeting::reads_counter>},
      {"limits", limits},
      {"cpu_threads", cpu_threads},
      {"tile", tile},
      {"partial_warp", [] { launch(1, 48, 0, partial_kernel); }},
  };
  for (const auto& [known, run] : cases) {
    if (name == known) {
      run();
      return 0;
    }
  }
  fault(name);
}
