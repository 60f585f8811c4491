// Memory of activations, kept from one step of a training to the next.
//
// A large tensor's memory goes back to the operating system when it is freed, and its pages are cleared and mapped again
// when the next step asks for them: of a CIFAR ResNet-20's step at batch 128 that was a tenth. What is kept and what is
// in use are together never more than what was in use at once at the most, so that the process does not grow, and what
// was not asked for in a few thousand allocations is freed. Any thread may allocate and free; one that finds another at
// it takes the way past the cache.
#pragma once

#include <cstdint>

namespace resnet_fused::cpu {

// Whether memory is kept: not with RESNET_FUSED_KEEP_MEMORY=0, nor after keep_memory(False). Then torch allocates it, and
// its profiler sees it.
bool keeps_activations();

// Tensors of fewer bytes come from the heap, which keeps its pages.
constexpr int64_t kLeastKept = 1 << 20;

// `bytes` of memory, aligned to a cache line, and what give_back needs with it. Throws std::bad_alloc.
struct ActivationMemory {
  void* data;
  void* context;
};
ActivationMemory take_activation(int64_t bytes);
void give_back_activation(void* data, void* context);

} // namespace resnet_fused::cpu
