// Switching between stacks: what a fiber [fibers.h] needs of the processor.
#pragma once

#include <algorithm>
#include <cstddef>

#if !defined(__x86_64__)
#define SECURA_HOST_UCONTEXT
#endif
#ifdef SECURA_HOST_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace host {

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

}  // namespace host
