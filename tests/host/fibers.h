// Runs CUDA kernels on the CPU, block after block. Each thread of a block is a fiber, and one fiber
// runs at a time, up to the next point at which it waits for others:
//
//   a warp's collective (shuffle, ldmatrix, mma, __syncwarp): all 32 lanes, then it is carried out;
//   __syncthreads: all threads of the block;
//   the kernel's end.
//
// Lanes of a warp that wait at different points, and warps of a block too, end the process with a
// message: kernels have to be written so that this never happens.
//
// SECURA_HOST_SCHEDULE, read at each launch, says in which order whatever may run does run:
//
//   forward (default)  lanes, warps and blocks in ascending order, each warp up to __syncthreads;
//                      asynchronous copies are done at once
//   reversed           all of it in descending order; copies read their source and write their target
//                      when they are waited for
//   random             warps take turns at each collective, lanes and blocks in any order, from the
//                      seed SECURA_HOST_SEED (0); copies as under reversed
//
// A kernel that synchronises as it should gives the same results under all of them. Shared memory
// is 0xFF before each block, and so is a copy's target until the copy is done: NaN for every type.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <source_location>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#define SECURA_HOST_UCONTEXT
#endif
#ifdef SECURA_HOST_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Those of the fiber that runs. Plain variables: launch configurations have members of these names.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace host {

using Where = std::source_location;  // the kernel's line that calls

// ---- Switching stacks ----

#ifdef SECURA_HOST_UCONTEXT

using Context = ucontext_t;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

inline void make_context(Context& context, void* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#else

using Context = void*;  // the stack pointer; the registers that a call preserves lie above it

// swapcontext() without its system calls. `noipa`: the compiler must take it for a call that may
// change all memory.
[[gnu::naked, gnu::noipa]] inline void switch_context(Context& /*rdi*/, Context& /*rsi*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq (%rsi), %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}

inline void make_context(Context& context, void* stack, size_t bytes, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes);
  top[-1] = nullptr;                          // where `entry` would return to
  top[-2] = reinterpret_cast<void*>(entry);   // popped by `ret`
  std::fill(top - 8, top - 2, nullptr);       // the six registers
  context = top - 8;
}

#endif

// AddressSanitizer has to know which stack is in use.
inline void before_switch([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* stack,
                          [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#endif
}

inline void after_switch([[maybe_unused]] void* fake_stack, [[maybe_unused]] const void** stack,
                         [[maybe_unused]] size_t* bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, stack, bytes);
#endif
}

// ---- State ----

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 256 * 1024;
constexpr size_t GUARD_BYTES = 64 * 1024;  // below each stack, not accessible

// Behind shared memory, to be found unchanged. AddressSanitizer finds more without it.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t TAIL_BYTES = 0;
#else
constexpr size_t TAIL_BYTES = 4096;
#endif
constexpr unsigned char TAIL = 0xA5;

enum class Schedule { forward, reversed, random };
enum class State { ready, in_collective, at_barrier, returned };

// Carries out a collective for a warp, given what each lane has deposited.
using Operation = void (*)(void* const (&lanes)[WARP]);

// An asynchronous copy under way.
struct Copy {
  void* to;
  const void* from;
  int bytes;  // of the source; zeros behind them
  int group;

  void finish() const {
    unsigned char data[16] = {};
    if (bytes > 0) std::memcpy(data, from, bytes);
    std::memcpy(to, data, 16);
  }
};

struct Thread {
  uint3 index;
  State state = State::returned;

  // What it waits in.
  const char* name = "";
  Operation operation = nullptr;
  void* deposit = nullptr;
  Where where;

  std::deque<Copy> copies;  // oldest first
  int group = 0;            // of the copies to come: how many groups have been committed

  Context context;
  void* stack;
  void* fake_stack = nullptr;
};

inline std::vector<std::unique_ptr<Thread>> threads;  // reused from block to block
inline Thread* running = nullptr;
inline const std::function<void()>* kernel = nullptr;
inline unsigned char* shared = nullptr;  // the block's shared memory
inline size_t shared_bytes = 0;
inline Schedule schedule = Schedule::forward;
inline bool banks_are_checked = false;  // with SECURA_HOST_BANKS in the environment
inline std::mt19937 random_bits;
inline std::mutex launch_mutex;

// The stack that the scheduler runs on: its caller's.
inline Context scheduler;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_bytes = 0;

// ---- Errors ----

inline std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

inline std::string text(const Where& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line()) + " [" +
         where.function_name() + "]";
}

[[noreturn]] inline void fail(const std::string& message) {
  std::fprintf(stderr, "host shim: block %s: %s\n", text(blockIdx).c_str(), message.c_str());
  std::fflush(stderr);
  std::abort();
}

// What the running thread does wrong.
[[noreturn]] inline void fail(const std::string& message, const Where& where) {
  fail("thread " + text(threadIdx) + ": " + message + ", at " + text(where));
}

inline std::string describe(const Thread& thread) {
  const std::string who = "thread " + text(thread.index);
  if (thread.state == State::returned) return who + " has returned";
  return who + " waits in " + thread.name + " at " + text(thread.where);
}

// ---- What a thread calls ----

// Lets others run, until the scheduler makes this thread go on.
inline void yield() {
  Thread& self = *running;
  before_switch(&self.fake_stack, scheduler_stack, scheduler_stack_bytes);
  switch_context(self.context, scheduler);
  after_switch(self.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

// Deposits this lane's part and returns when `operation` has been carried out for the warp.
inline void collective(const char* name, Operation operation, void* deposit, const Where& where) {
  running->state = State::in_collective;
  running->name = name;
  running->operation = operation;
  running->deposit = deposit;
  running->where = where;
  yield();
}

inline void barrier(const char* name, const Where& where) {
  running->state = State::at_barrier;
  running->name = name;
  running->where = where;
  yield();
}

inline bool in_shared_memory(const void* address, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(shared);
  const auto at = reinterpret_cast<uintptr_t>(address);
  return at >= begin && at - begin <= shared_bytes && bytes <= shared_bytes - (at - begin);
}

// ---- The scheduler ----

// A fiber's whole life: one kernel after the other.
inline void fiber_main() noexcept {
  after_switch(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  for (;;) {
    (*kernel)();
    running->state = State::returned;
    yield();
  }
}

inline std::unique_ptr<Thread> make_thread() {
  auto thread = std::make_unique<Thread>();
  void* memory = mmap(nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for stacks");
  mprotect(memory, GUARD_BYTES, PROT_NONE);
  thread->stack = static_cast<char*>(memory) + GUARD_BYTES;
  make_context(thread->context, thread->stack, STACK_BYTES, fiber_main);
  return thread;
}

inline void resume(Thread& thread) {
  running = &thread;
  threadIdx = thread.index;
  void* fake_stack = nullptr;
  before_switch(&fake_stack, thread.stack, STACK_BYTES);
  switch_context(scheduler, thread.context);
  after_switch(fake_stack, nullptr, nullptr);
}

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
inline bool step_warp(int first, int lanes) {
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

inline void run_block(int count) {
  std::memset(shared, 0xFF, shared_bytes);
  for (int i = 0; i < count; ++i) {
    threads[i]->copies.clear();
    threads[i]->group = 0;
  }
  const int warps = (count + WARP - 1) / WARP;
  std::vector<int> active;  // warps that can go on
  do {
    for (int i = 0; i < count; ++i) threads[i]->state = State::ready;
    for (int warp = 0; warp < warps; ++warp) active.push_back(warp);
    while (!active.empty()) {
      size_t pick = 0;
      if (schedule == Schedule::reversed) pick = active.size() - 1;
      if (schedule == Schedule::random) pick = random_bits() % active.size();
      const int first = active[pick] * WARP;
      if (!step_warp(first, std::min(WARP, count - first))) active.erase(active.begin() + pick);
    }
    for (int i = WARP; i < count; i += WARP) {
      if (!at_same_point(*threads[0], *threads[i])) {
        fail("warps of a block diverged: " + describe(*threads[0]) + ", " + describe(*threads[i]));
      }
    }
  } while (threads[0]->state == State::at_barrier);

  const unsigned char* tail = shared + shared_bytes;
  if (std::any_of(tail, tail + TAIL_BYTES, [](unsigned char byte) { return byte != TAIL; })) {
    fail("a write beyond the end of shared memory");
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
  const char* seed = std::getenv("SECURA_HOST_SEED");
  random_bits.seed(seed == nullptr ? 0 : std::strtoul(seed, nullptr, 10));
}

// Runs a whole grid. The caller holds `launch_mutex` and has checked the limits.
inline void launch(dim3 grid, dim3 block, size_t bytes, const std::function<void()>& body) {
  read_environment();
  gridDim = grid;
  blockDim = block;
  kernel = &body;

  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes + TAIL_BYTES) != 0) fail("no shared memory");
  shared = static_cast<unsigned char*>(memory);
  shared_bytes = bytes;
  std::memset(shared + bytes, TAIL, TAIL_BYTES);

  const int count = block.x * block.y * block.z;
  while (static_cast<int>(threads.size()) < count) threads.push_back(make_thread());
  for (unsigned i = 0; i < static_cast<unsigned>(count); ++i) {
    threads[i]->index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  }

  std::vector<uint64_t> order(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  if (schedule == Schedule::reversed) std::reverse(order.begin(), order.end());
  if (schedule == Schedule::random) std::shuffle(order.begin(), order.end(), random_bits);
  for (const uint64_t i : order) {
    const uint64_t row = i / grid.x;
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(row % grid.y),
                static_cast<unsigned>(row / grid.y)};
    run_block(count);
  }

  std::free(memory);
  shared = nullptr;
  shared_bytes = 0;
  kernel = nullptr;
  running = nullptr;
}

}  // namespace host
