// SPDX-License-Identifier: Apache-2.0
// A fiber: a stack of its own and a switch to and from the scheduler, known to the sanitizers.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

// clang says in another way what it was asked to watch.
#if defined(__has_feature)
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#if __has_feature(thread_sanitizer) && !defined(__SANITIZE_THREAD__)
#define __SANITIZE_THREAD__ 1
#endif
#endif

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}
#endif

// Saves the six callee-saved registers on this stack, stores its top, and continues on the other.
extern "C" void lychee_emulator_switch(void** save, void* stack_top);
#if defined(__x86_64__)
asm(R"(
.pushsection .text.lychee_emulator_switch,"axG",@progbits,lychee_emulator_switch,comdat
.weak lychee_emulator_switch
.type lychee_emulator_switch,@function
lychee_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.popsection
)");
#else
#error "the emulator switches stacks on x86-64 only"
#endif

namespace lychee::emulator {

// The emulator's own state is not device memory: ThreadSanitizer must not look at it. Marks a whole
// function; Hidden marks a scope.
#define LYCHEE_EMULATOR_HIDDEN __attribute__((no_sanitize("thread"), noinline))

struct Hidden {
#if defined(__SANITIZE_THREAD__)
  Hidden() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Hidden() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  Hidden() {}
#endif
  Hidden(const Hidden&) = delete;
};

// What a thread did before release is visible to those that acquire the same address afterwards.
inline void release([[maybe_unused]] void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(address);
#endif
}

inline void acquire([[maybe_unused]] void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(address);
#endif
}

// One side of a switch: where it stopped, and what the sanitizers know it by.
struct Context {
  void* stack_top = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
  void* tsan_fiber = nullptr;
  void* fake_stack = nullptr;
};

// Leaves `from` for `to`; returns when something switches back. ThreadSanitizer takes no ordering
// from a switch (flag 1): only barriers order memory.
LYCHEE_EMULATOR_HIDDEN inline void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan_fiber, 1);
#endif
  lychee_emulator_switch(&from.stack_top, to.stack_top);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// A stack with a guard page below it, prepared to start in `entry`.
class Stack {
 public:
  static constexpr size_t kBytes = 256 << 10, kGuard = 4 << 10;

  explicit Stack(void (*entry)()) {
    memory_ = mmap(nullptr, kGuard + kBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, kGuard, PROT_NONE);
    context.bottom = static_cast<char*>(memory_) + kGuard;
    context.size = kBytes;
    // Six registers and the return address; at a function's entry the stack is 8 past 16 bytes.
    constexpr size_t kTop = 64;
    void** top = reinterpret_cast<void**>(static_cast<char*>(memory_) + kGuard + kBytes - kTop);
    top[6] = reinterpret_cast<void*>(entry);
    context.stack_top = top;
#if defined(__SANITIZE_THREAD__)
    context.tsan_fiber = __tsan_create_fiber(0);
#endif
  }
  ~Stack() {
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(context.tsan_fiber);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory_, kGuard + kBytes);
#endif
    munmap(memory_, kGuard + kBytes);
  }
  Stack(const Stack&) = delete;

  Context context;

 private:
  void* memory_;
};

}  // namespace lychee::emulator
