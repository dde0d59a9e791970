// Finds blocks of one grid that meet in global memory: a byte that one of them writes and another one
// reads or writes, unless both by atomics. They run in any order on a GPU, and nothing but atomics
// orders them. What is found does not depend on the order in which they run here.
//
// Accesses come from PTX that is run [ptx.h], and from C++ that is compiled with -fsanitize=thread
// and linked without it: g++ then calls the functions at the end of this file, which is itself
// compiled without it. SECURA_HOST_RACES in the environment turns the search on.
#include <dlfcn.h>

#include <array>
#include <memory>
#include <unordered_map>

#include "fibers.h"

namespace host {
namespace {

constexpr int64_t NONE = -1, SEVERAL = -2;  // else a block's number

struct Byte {
  int64_t reader = NONE, writer = NONE;
  bool by_atomics = false;  // all of the writes
};

constexpr uintptr_t PAGE = 4096;  // bytes
std::unordered_map<uintptr_t, std::unique_ptr<std::array<Byte, PAGE>>> pages;

// The page of the last access, and its number.
std::array<Byte, PAGE>* last = nullptr;
uintptr_t last_number = 0;

Byte& byte_at(uintptr_t address) {
  if (last == nullptr || last_number != address / PAGE) {
    last_number = address / PAGE;
    auto& page = pages[last_number];
    if (!page) page = std::make_unique<std::array<Byte, PAGE>>();
    last = page.get();
  }
  return (*last)[address % PAGE];
}

bool is_other(int64_t block, int64_t here) { return block != NONE && block != here; }

void note(int64_t& who, int64_t here) { who = is_other(who, here) ? SEVERAL : here; }

std::string race(const char* does, uintptr_t address, int64_t other, const char* has) {
  char byte[32];
  std::snprintf(byte, sizeof(byte), "%#zx", address);
  const std::string who = other == SEVERAL ? "more than one block" : "block " + std::to_string(other);
  return std::string(does) + " byte " + byte + ", which " + who + " has " + has;
}

// Whether it is no access of global memory: of the thread's stack, of shared memory, or of
// `watching`, since Unwatched is watched until it has set it.
bool is_elsewhere(const void* address, size_t bytes) {
  const auto stack = reinterpret_cast<uintptr_t>(running->stack);
  return reinterpret_cast<uintptr_t>(address) - stack < STACK_BYTES || address == &watching ||
         in_shared_memory(address, bytes);
}

// What is wrong with an access, or nothing.
std::string look(const void* address, size_t bytes, Access access) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const int64_t here =
      blockIdx.x + int64_t{gridDim.x} * (blockIdx.y + int64_t{gridDim.y} * blockIdx.z);
  for (uintptr_t at = begin; at < begin + bytes; ++at) {
    Byte& byte = byte_at(at);
    const bool atomic = access == Access::atomic, reads = access == Access::read;
    if (is_other(byte.writer, here) && !(atomic && byte.by_atomics)) {
      return race(reads ? "reads" : "writes", at, byte.writer, "written");
    }
    if (reads) {
      note(byte.reader, here);
      continue;
    }
    if (is_other(byte.reader, here)) return race("writes", at, byte.reader, "read");
    byte.by_atomics = atomic && (byte.by_atomics || byte.writer == NONE);
    note(byte.writer, here);
  }
  return "";
}

// Not watched itself: at -O0 it calls inline functions that another file has compiled to be.
template <typename End>
void look_unwatched(const void* address, size_t bytes, Access access, End end) {
  watching = false;
  if (!is_elsewhere(address, bytes)) {
    const std::string wrong = look(address, bytes, access);
    if (!wrong.empty()) end(wrong);
  }
  watching = true;
}

}  // namespace

void watch(const void* address, size_t bytes, Access access, const Where& where) {
  look_unwatched(address, bytes, access, [&](const std::string& wrong) { fail(wrong, where); });
}

void watch(const void* address, size_t bytes, Access access, const void* code) {
  look_unwatched(address, bytes, access, [&](const std::string& wrong) {
    Dl_info file = {};
    dladdr(code, &file);
    char place[512];
    std::snprintf(place, sizeof(place), ", at %s+%#zx", file.dli_fname ? file.dli_fname : "?",
                  static_cast<const char*>(code) - static_cast<const char*>(file.dli_fbase));
    fail("thread " + text(threadIdx) + ": " + wrong + place);
  });
}

void forget_accesses() {
  pages.clear();
  last = nullptr;
}

}  // namespace host

// ---- What -fsanitize=thread calls ----

#define SECURA_WATCH(name, bytes, access)                                                      \
  void __tsan_##name(void* address) {                                                          \
    if (host::watching) {                                                                      \
      host::watch(address, bytes, host::Access::access, __builtin_return_address(0));          \
    }                                                                                          \
  }
#define SECURA_WATCH_BOTH(size)           \
  SECURA_WATCH(read##size, size, read)    \
  SECURA_WATCH(write##size, size, write)  \
  SECURA_WATCH(unaligned_read##size, size, read)   \
  SECURA_WATCH(unaligned_write##size, size, write)

extern "C" {

SECURA_WATCH_BOTH(1)
SECURA_WATCH_BOTH(2)
SECURA_WATCH_BOTH(4)
SECURA_WATCH_BOTH(8)
SECURA_WATCH_BOTH(16)

void __tsan_read_range(void* address, size_t bytes) {
  if (host::watching) {
    host::watch(address, bytes, host::Access::read, __builtin_return_address(0));
  }
}
void __tsan_write_range(void* address, size_t bytes) {
  if (host::watching) {
    host::watch(address, bytes, host::Access::write, __builtin_return_address(0));
  }
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
