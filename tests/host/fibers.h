// Threads of a CUDA kernel as fibers of the CPU. One runs at a time, up to the next point at which it
// waits for others [grid.h]:
//
//   a warp's collective (shuffle, ldmatrix, mma, __syncwarp): all 32 lanes, then it is carried out;
//   __syncthreads: all threads of the block;
//   the kernel's end.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <string>

#include "stacks.h"

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

inline Thread* running = nullptr;
inline const std::function<void()>* kernel = nullptr;
inline unsigned char* shared = nullptr;  // the shared memory of the block that runs
inline size_t shared_bytes = 0;
inline Schedule schedule = Schedule::forward;
inline bool banks_are_checked = false;  // with SECURA_HOST_BANKS in the environment
inline bool races_are_looked_for = false;  // with SECURA_HOST_RACES, where accesses are seen at all
// Then: what runs is the kernel's own code. Volatile: the compiler takes the calls that it puts at
// accesses for such as read no variable.
inline volatile bool watching = false;
inline std::mt19937 random_bits;

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

// What the shim itself reads and writes for a thread is none of the kernel's.
struct Unwatched {
  const bool before = watching;
  Unwatched() { watching = false; }
  ~Unwatched() { watching = before; }
};

// An access of the running thread, and where it makes it [global_memory.cpp].
enum class Access { read, write, atomic };
void watch(const void* address, size_t bytes, Access access, const Where& where);
void watch(const void* address, size_t bytes, Access access, const void* code);
void forget_accesses();

// Lets others run, until the scheduler makes this thread go on.
inline void yield() {
  Thread& self = *running;
  before_switch(&self.fake_stack, scheduler_stack, scheduler_stack_bytes);
  switch_context(self.context, scheduler);
  after_switch(self.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

// Deposits this lane's part and returns when `operation` has been carried out for the warp.
inline void collective(const char* name, Operation operation, void* deposit, const Where& where) {
  const Unwatched own;
  running->state = State::in_collective;
  running->name = name;
  running->operation = operation;
  running->deposit = deposit;
  running->where = where;
  yield();
}

inline void barrier(const char* name, const Where& where) {
  const Unwatched own;
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

// ---- A fiber's life ----

// One kernel after the other.
inline void fiber_main() noexcept {
  after_switch(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  for (;;) {
    watching = races_are_looked_for;
    (*kernel)();
    watching = false;
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

}  // namespace host
