// The part of CUDA that the kernels use, on the CPU. The blocks of a launch run at once, one after another;
// shared memory starts as 0xFF in every byte, and an asynchronous copy leaves 0xFF behind until it is waited for.
#pragma once

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define CU_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ((void)(stream), device_shim::launch(grid, block, shared, [=] { kernel(__VA_ARGS__); }))
#define CU_DYNAMIC_SHARED(name) \
  unsigned char* name = reinterpret_cast<unsigned char*>(device_shim::current->block->shared)
#define threadIdx (device_shim::current->thread)
#define blockIdx (device_shim::current->block->index)
#define blockDim (device_shim::current->block->size)

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned n) : x(n), y(1), z(1) {}
};

namespace device_shim {

// The most that a block may ask for on the smallest of the targets; __CUDA_ARCH__ defined as 750 makes this an sm_75.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kSharedLimit = 64 * 1024;
#else
constexpr int kSharedLimit = 99 * 1024;
#endif
inline thread_local int shared_allowed = 0;
inline thread_local int last_error = cudaSuccess;

inline void free_stacks(const std::vector<char*>& stacks) {
  for (char* stack : stacks) munmap(stack, kStackBytes);
}

template <class Body>
void launch(dim3 grid, dim3 size, int shared, const Body& kernel) {
  if (grid.x == 0 || size.x == 0 || size.x > 1024 || size.x % kWarp != 0 || shared > shared_allowed) {
    last_error = cudaErrorInvalidValue;
    return;
  }
  const std::function<void()> body = kernel;
  std::vector<unsigned> order(grid.x);
  for (unsigned i = 0; i < grid.x; ++i) order[i] = i;
  std::mt19937_64 shuffle(seed);
  if (seed != 0) std::shuffle(order.begin(), order.end(), shuffle);
  const auto run = [&](unsigned index, std::vector<char*>& stacks) {
    Block block;
    block.index.x = index;
    block.size.x = size.x;
    block.grid.x = grid.x;
    block.body = &body;
    block.shared_bytes = static_cast<size_t>(shared);
    if (shared > 0 && posix_memalign(reinterpret_cast<void**>(&block.shared), 128, block.shared_bytes)) std::abort();
    std::mt19937_64 random(seed + index);
    run_block(block, stacks, random);
    std::free(block.shared);
  };
#if defined(__SANITIZE_THREAD__)
  // Each block in a thread of its own, all joined at the end, so that nothing orders one block before another.
  std::vector<std::thread> threads;
  std::atomic<unsigned> next{0};
  for (unsigned i = 0; i < grid.x; ++i) {
    threads.emplace_back([&, i] {
      while (next.load(std::memory_order_relaxed) != i) std::this_thread::yield();
      std::vector<char*> stacks;
      run(order[i], stacks);
      free_stacks(stacks);
      next.store(i + 1, std::memory_order_relaxed);
    });
  }
  for (std::thread& thread : threads) thread.join();
#else
  std::vector<char*> stacks;
  for (const unsigned index : order) run(index, stacks);
  free_stacks(stacks);
#endif
}

} // namespace device_shim

inline cudaError_t cudaFuncSetAttribute(const void*, int, int bytes) {
  if (bytes > device_shim::kSharedLimit) return cudaErrorInvalidValue;
  device_shim::shared_allowed = bytes;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return std::exchange(device_shim::last_error, cudaSuccess); }

inline void __syncthreads() { device_shim::block_barrier(); }

#include "instructions.h"
