// Runs the blocks of a grid, whose threads are fibers [fibers.h].
//
// Lanes of a warp that wait at different points, and warps of a block too, end the process with a
// message: kernels have to be written so that this never happens.
//
// SECURA_HOST_SCHEDULE, read at each launch, says in which order whatever may run does run:
//
//   forward (default)  lanes, warps and blocks in ascending order, each warp up to __syncthreads,
//                      block after block; asynchronous copies are done at once
//   reversed           all of it in descending order, of two blocks in turns up to __syncthreads;
//                      copies read their source and write their target when they are waited for
//   random             the warps of three blocks take turns at each collective, lanes and blocks in
//                      any order, from the seed SECURA_HOST_SEED (0); copies as under reversed
//
// A kernel that synchronises as it should gives the same results under all of them. Shared memory
// is 0xFF before each block, and so is a copy's target until the copy is done: NaN for every type.
#pragma once

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "fibers.h"

namespace host {

using Threads = std::vector<std::unique_ptr<Thread>>;

// A block under way. Its fibers are those of another block afterwards.
struct Block {
  uint3 index;
  unsigned char* shared = nullptr;
  Threads threads;
  std::vector<int> active;  // warps that can go on
};

inline std::vector<Block> blocks;
inline std::mutex launch_mutex;

inline bool at_same_point(const Thread& a, const Thread& b) {
  if (a.state != b.state) return false;
  if (a.state == State::returned) return true;
  if (a.state == State::in_collective && a.operation != b.operation) return false;
  const char *file_a = a.where.file_name(), *file_b = b.where.file_name();
  return a.where.line() == b.where.line() && a.where.column() == b.where.column() &&
         (file_a == file_b || std::strcmp(file_a, file_b) == 0);
}

// Runs a warp's lanes until all wait, and carries out the collective they wait in, if they do.
// False: they wait for the block, or have returned.
inline bool step_warp(const Threads& threads, int first, int lanes) {
  // Lane i * stride + start, modulo 32: a permutation, as `stride` is odd.
  unsigned stride = 1, start = 0;
  if (schedule == Schedule::reversed) stride = start = 31;
  if (schedule == Schedule::random) stride = random_bits() | 1, start = random_bits();
  for (unsigned i = 0; i < WARP; ++i) {
    const int lane = (i * stride + start) % WARP;
    if (lane < lanes) resume(*threads[first + lane]);
  }

  const Thread& leader = *threads[first];
  for (int lane = 1; lane < lanes; ++lane) {
    const Thread& other = *threads[first + lane];
    if (!at_same_point(leader, other)) {
      fail("lanes of a warp diverged: " + describe(leader) + ", " + describe(other));
    }
  }
  if (leader.state != State::in_collective) return false;
  if (lanes < WARP) fail("a collective in a warp of fewer than 32 lanes: " + describe(leader));

  void* deposits[WARP];
  for (int lane = 0; lane < WARP; ++lane) {
    deposits[lane] = threads[first + lane]->deposit;
    threads[first + lane]->state = State::ready;
  }
  leader.operation(deposits);
  return true;
}

inline void start(Block& block, uint64_t number, int count) {
  const uint64_t row = number / gridDim.x;
  block.index = {static_cast<unsigned>(number % gridDim.x), static_cast<unsigned>(row % gridDim.y),
                 static_cast<unsigned>(row / gridDim.y)};
  std::memset(block.shared, 0xFF, shared_bytes);
  for (int i = 0; i < count; ++i) {
    block.threads[i]->copies.clear();
    block.threads[i]->group = 0;
    block.threads[i]->state = State::ready;
  }
  for (int i = 0; i < count; i += WARP) block.active.push_back(i / WARP);
}

// Runs one warp of a block up to where it waits. Where all warps wait for one another then, they may
// go on. Returns that, State::at_barrier, or State::returned, or State::ready: some still run.
inline State step_block(Block& block, int count) {
  const auto& threads = block.threads;
  auto& active = block.active;
  blockIdx = block.index;
  shared = block.shared;
  size_t pick = 0;
  if (schedule == Schedule::reversed) pick = active.size() - 1;
  if (schedule == Schedule::random) pick = random_bits() % active.size();
  const int first = active[pick] * WARP;
  if (!step_warp(threads, first, std::min(WARP, count - first))) {
    active.erase(active.begin() + pick);
  }
  if (!active.empty()) return State::ready;

  for (int i = WARP; i < count; i += WARP) {
    if (!at_same_point(*threads[0], *threads[i])) {
      fail("warps of a block diverged: " + describe(*threads[0]) + ", " + describe(*threads[i]));
    }
  }
  const State reached = threads[0]->state;
  if (reached == State::at_barrier) {
    for (int i = 0; i < count; ++i) threads[i]->state = State::ready;
    for (int i = 0; i < count; i += WARP) active.push_back(i / WARP);
  }
  const unsigned char* tail = shared + shared_bytes;
  if (std::any_of(tail, tail + TAIL_BYTES, [](unsigned char byte) { return byte != TAIL; })) {
    fail("a write beyond the end of shared memory");
  }
  return reached;
}

// Runs the grid's blocks in this order, as many at a time as there are `blocks`.
inline void run_blocks(const std::vector<uint64_t>& order, int count) {
  std::vector<Block*> alive;
  size_t next = 0, turn = 0;
  for (; next < std::min(blocks.size(), order.size()); ++next) {
    alive.push_back(&blocks[next]);
    start(blocks[next], order[next], count);
  }
  while (!alive.empty()) {
    const size_t pick = (schedule == Schedule::random ? random_bits() : turn) % alive.size();
    const State reached = step_block(*alive[pick], count);
    if (reached != State::ready) ++turn;
    if (reached != State::returned) continue;
    if (next < order.size()) {
      start(*alive[pick], order[next++], count);
    } else {
      alive.erase(alive.begin() + pick);
    }
  }
}

inline void read_environment() {
  const char* name = std::getenv("SECURA_HOST_SCHEDULE");
  const std::string value = name == nullptr ? "forward" : name;
  if (value == "forward") {
    schedule = Schedule::forward;
  } else if (value == "reversed") {
    schedule = Schedule::reversed;
  } else if (value == "random") {
    schedule = Schedule::random;
  } else {
    fail("SECURA_HOST_SCHEDULE is " + value + ", not forward, reversed or random");
  }
  banks_are_checked = std::getenv("SECURA_HOST_BANKS") != nullptr;
  races_are_looked_for = std::getenv("SECURA_HOST_RACES") != nullptr;
  const char* seed = std::getenv("SECURA_HOST_SEED");
  random_bits.seed(seed == nullptr ? 0 : std::strtoul(seed, nullptr, 10));
}

// Runs a whole grid. The caller holds `launch_mutex` and has checked the limits.
inline void launch(dim3 grid, dim3 block, size_t bytes, const std::function<void()>& body) {
  read_environment();
  gridDim = grid;
  blockDim = block;
  kernel = &body;
  shared_bytes = bytes;
  forget_accesses();

  std::vector<uint64_t> order(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  if (schedule == Schedule::reversed) std::reverse(order.begin(), order.end());
  if (schedule == Schedule::random) std::shuffle(order.begin(), order.end(), random_bits);

  const unsigned count = block.x * block.y * block.z;
  blocks.resize(schedule == Schedule::forward ? 1 : schedule == Schedule::reversed ? 2 : 3);
  for (Block& one : blocks) {
    while (one.threads.size() < count) one.threads.push_back(make_thread());
    for (unsigned i = 0; i < count; ++i) {
      one.threads[i]->index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    }
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, bytes + TAIL_BYTES) != 0) fail("no shared memory");
    one.shared = static_cast<unsigned char*>(memory);
    std::memset(one.shared + bytes, TAIL, TAIL_BYTES);
  }
  run_blocks(order, count);

  for (Block& one : blocks) std::free(std::exchange(one.shared, nullptr));
  shared = nullptr;
  shared_bytes = 0;
  kernel = nullptr;
  running = nullptr;
}

}  // namespace host
