// One CUDA thread, one fiber. The fibers of a block run one at a time until they wait, in order of their
// number or, with a seed, in random order; so do blocks. Built with a sanitizer, that sanitizer follows:
// under ThreadSanitizer every CUDA thread is a thread of its own, ordered by barriers only, and blocks are
// not ordered at all. x86-64 only.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void* __tsan_get_current_fiber();
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#define SHIM_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define SHIM_UNSEEN
#endif
#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
void __asan_unpoison_memory_region(const volatile void*, size_t);
}
#endif

extern "C" void device_shim_switch(void** save, void* to);
asm(R"(
.text
.weak device_shim_switch
.type device_shim_switch,@function
device_shim_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size device_shim_switch,.-device_shim_switch
)");

namespace device_shim {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kWarp = 32;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

enum State : uint8_t { kReady, kAtBarrier, kAtCollective, kFinished };

// What all 32 lanes of a warp do together: called once, with each lane's operands.
using Collective = void (*)(void* const* operands);

struct Copy {
  void* shared;
  const void* global;
  int bytes;
};

struct Block;

struct Fiber {
  Index thread;
  State state = kReady;
  Block* block = nullptr;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  unsigned barriers = 0;
  Collective collective = nullptr;
  void* operands = nullptr;
  std::vector<Copy> open;                 // copies not committed yet
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
#if defined(__SANITIZE_THREAD__)
  void* sanitizer = nullptr;
#elif defined(__SANITIZE_ADDRESS__)
  void* sanitizer = nullptr;
#endif
};

struct Block {
  Index index, size, grid;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Fiber> fibers;
  const std::function<void()>* body = nullptr;
  void* scheduler = nullptr; // its stack pointer
  char barrier[2] = {0, 0};  // addresses for ThreadSanitizer to order by
#if defined(__SANITIZE_THREAD__)
  void* sanitizer = nullptr;
#elif defined(__SANITIZE_ADDRESS__)
  void* sanitizer = nullptr;
  const void* bottom = nullptr;
  size_t stack_size = 0;
#endif
};

inline thread_local Fiber* current = nullptr;
inline uint64_t seed = 0; // 0: in order

[[noreturn]] inline void fail(const char* what) {
  const Index at = current != nullptr ? current->block->index : Index{};
  const unsigned thread = current != nullptr ? current->thread.x : 0;
  std::fprintf(stderr, "device shim: %s (block %u, thread %u)\n", what, at.x, thread);
  std::fflush(stderr);
  std::_Exit(70);
}

// From a fiber to the scheduler.
SHIM_UNSEEN inline void wait_as(State state) {
  Fiber* f = current;
  f->state = state;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(state == kFinished ? nullptr : &f->sanitizer, f->block->bottom, f->block->stack_size);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(f->block->sanitizer, 1);
#endif
  device_shim_switch(&f->stack_pointer, f->block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f->sanitizer, &f->block->bottom, &f->block->stack_size);
#endif
}

// From the scheduler to a fiber.
SHIM_UNSEEN inline void resume(Fiber* f) {
  Block& block = *f->block;
  current = f;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.sanitizer, f->stack, kStackBytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(f->sanitizer, 1);
#endif
  device_shim_switch(&block.scheduler, f->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.sanitizer, nullptr, nullptr);
#endif
}

SHIM_UNSEEN inline void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &current->block->bottom, &current->block->stack_size);
#endif
  (*current->block->body)();
  if (!current->open.empty()) fail("a thread ends with asynchronous copies that it never committed");
#if defined(__SANITIZE_THREAD__)
  __tsan_release(current->block);
#endif
  wait_as(kFinished);
  std::abort();
}

inline void block_barrier() {
  char* order = &current->block->barrier[current->barriers++ % 2];
  (void)order;
#if defined(__SANITIZE_THREAD__)
  __tsan_release(order);
#endif
  wait_as(kAtBarrier);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(order);
#endif
}

SHIM_UNSEEN inline void warp_collective(Collective function, void* operands) {
  current->collective = function;
  current->operands = operands;
  wait_as(kAtCollective);
}

SHIM_UNSEEN inline void start_fibers(Block& block, std::vector<char*>& stacks) {
  block.fibers.clear();
  block.fibers.resize(block.size.x);
  for (unsigned i = 0; i < block.size.x; ++i) {
    if (stacks.size() <= i) {
      stacks.push_back(static_cast<char*>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
    }
    Fiber& f = block.fibers[i];
    f.thread.x = i;
    f.block = &block;
    f.stack = stacks[i];
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stacks[i], kStackBytes); // what the fiber before left there, which never returned
#endif
    void** top = reinterpret_cast<void**>(f.stack + kStackBytes);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(run_fiber);
    for (int r = 0; r < 6; ++r) *--top = nullptr; // the registers that the switch pops
    f.stack_pointer = top;
#if defined(__SANITIZE_THREAD__)
    f.sanitizer = __tsan_create_fiber(0);
#endif
  }
#if defined(__SANITIZE_THREAD__)
  block.sanitizer = __tsan_get_current_fiber();
#endif
}

// Runs the collective of every warp whose lanes have all come to it; true if there was one.
SHIM_UNSEEN inline bool run_collectives(Block& block) {
  bool any = false;
  for (unsigned first = 0; first < block.size.x; first += kWarp) {
    Fiber* lanes = &block.fibers[first];
    void* operands[kWarp];
    bool all = true;
    for (unsigned l = 0; l < kWarp; ++l) {
      all = all && lanes[l].state == kAtCollective && lanes[l].collective == lanes[0].collective;
      operands[l] = lanes[l].operands;
    }
    if (!all) continue;
    lanes[0].collective(operands);
    for (unsigned l = 0; l < kWarp; ++l) lanes[l].state = kReady;
    any = true;
  }
  return any;
}

// Opens the barrier if all threads stand at it; true if they did.
SHIM_UNSEEN inline bool open_barrier(Block& block) {
  for (const Fiber& f : block.fibers) {
    if (f.state != kAtBarrier) return false;
  }
  for (Fiber& f : block.fibers) f.state = kReady;
  return true;
}

SHIM_UNSEEN inline void run_block(Block& block, std::vector<char*>& stacks, std::mt19937_64& random) {
  for (volatile char* p = block.shared; p < block.shared + block.shared_bytes; p = p + 1) *p = static_cast<char>(0xff);
  start_fibers(block, stacks);
  std::vector<unsigned> order(block.size.x);
  for (unsigned i = 0; i < block.size.x; ++i) order[i] = i;
  unsigned finished = 0;
  while (finished < block.size.x) {
    if (seed != 0) std::shuffle(order.begin(), order.end(), random);
    bool ran = false;
    for (const unsigned i : order) {
      Fiber& f = block.fibers[i];
      if (f.state != kReady) continue;
      resume(&f);
      finished += f.state == kFinished;
      ran = true;
    }
    ran = run_collectives(block) || ran;
    if (!ran && !open_barrier(block)) fail("deadlock: a barrier or a warp's instruction is not reached by all threads");
  }
  current = nullptr;
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&block);
  for (Fiber& f : block.fibers) __tsan_destroy_fiber(f.sanitizer);
#endif
}

} // namespace device_shim
