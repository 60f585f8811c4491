#include "activation_memory.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace resnet_fused::cpu {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kOldest = 4096; // allocations after which a block is freed

struct Block {
  void* data;
  int64_t bytes, since;
};

class Cache {
 public:
  // A block of `bytes`, up to an eighth more if it was kept.
  Block take(int64_t bytes) {
    ++clock_;
    while (!idle_.empty() && idle_.front().since + kOldest < clock_) free_oldest();
    for (auto block = idle_.rbegin(); block != idle_.rend(); ++block) { // the last one may still be in the caches
      if (block->bytes < bytes || block->bytes > bytes + bytes / 8) continue;
      const Block found = *block;
      idle_.erase(std::next(block).base());
      kept_ -= found.bytes;
      return use(found);
    }
    const int64_t most = std::max(most_, in_use_ + bytes);
    while (!idle_.empty() && in_use_ + kept_ + bytes > most) free_oldest();
    void* data = std::aligned_alloc(kLine, bytes);
    if (data == nullptr) {
      release();
      data = std::aligned_alloc(kLine, bytes);
    }
    if (data == nullptr) throw std::bad_alloc();
    return use({data, bytes, clock_});
  }

  void give_back(void* data, int64_t bytes) {
    in_use_ -= bytes;
    kept_ += bytes;
    idle_.push_back({data, bytes, clock_});
  }

  int64_t release() {
    const int64_t bytes = kept_;
    while (!idle_.empty()) free_oldest();
    most_ = in_use_;
    return bytes;
  }

  // One that was freed past the cache.
  void forget(int64_t bytes) { in_use_ -= bytes; }

  std::mutex mutex;

 private:
  Block use(const Block& block) {
    in_use_ += block.bytes;
    most_ = std::max(most_, in_use_.load());
    return block;
  }

  void free_oldest() {
    std::free(idle_.front().data);
    kept_ -= idle_.front().bytes;
    idle_.erase(idle_.begin());
  }

  std::vector<Block> idle_; // by age
  std::atomic<int64_t> in_use_{0};
  int64_t kept_ = 0, most_ = 0, clock_ = 0;
};

Cache& cache() {
  static Cache* const kept = new Cache; // tensors may be freed after everything else
  return *kept;
}

std::atomic<bool>& keeping() {
  static std::atomic<bool> on{[] {
    const char* value = std::getenv("RESNET_FUSED_KEEP_MEMORY");
    return value == nullptr || value[0] != '0' || value[1] != '\0';
  }()};
  return on;
}

bool keep_memory(bool on) { return keeping().exchange(on); }

int64_t release_memory() {
  const std::lock_guard<std::mutex> lock(cache().mutex);
  return cache().release();
}

} // namespace

bool keeps_activations() { return keeping().load(std::memory_order_relaxed); }

ActivationMemory take_activation(int64_t bytes) {
  const int64_t whole = (bytes + kLine - 1) / kLine * kLine;
  const std::unique_lock<std::mutex> lock(cache().mutex, std::try_to_lock);
  if (lock.owns_lock()) {
    const Block block = cache().take(whole);
    return {block.data, reinterpret_cast<void*>(block.bytes)};
  }
  void* data = std::aligned_alloc(kLine, whole);
  if (data == nullptr) throw std::bad_alloc();
  return {data, nullptr};
}

void give_back_activation(void* data, void* context) {
  const auto bytes = reinterpret_cast<int64_t>(context);
  if (bytes > 0) {
    const std::unique_lock<std::mutex> lock(cache().mutex, std::try_to_lock);
    if (lock.owns_lock() && keeps_activations()) return cache().give_back(data, bytes);
    cache().forget(bytes);
  }
  std::free(data);
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("release_memory", TORCH_BOX(&release_memory));
  m.impl("keep_memory", TORCH_BOX(&keep_memory));
}

} // namespace resnet_fused::cpu
