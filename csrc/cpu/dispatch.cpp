#include "dispatch.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace resnet_fused::cpu {
namespace {

// Best first.
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512) tables.push_back(&avx512::table());
  if (has_avx2) tables.push_back(&avx2::table());
#endif
  tables.push_back(&baseline::table());
  return tables;
}

const Kernels* find(const std::string& name, const std::string& source) {
  std::string known;
  for (const Kernels* table : supported()) {
    if (name == table->isa) return table;
    known += known.empty() ? "" : ", ";
    known += table->isa;
  }
  throw std::runtime_error(source + ": expected an instruction set this machine supports (" + known + "), got " + name);
}

std::atomic<const Kernels*> in_use{nullptr};

std::string cpu_isa() { return kernels().isa; }

void set_cpu_isa(std::string name) { set_isa(name); }

} // namespace

const Kernels& kernels() {
  const Kernels* table = in_use.load(std::memory_order_acquire);
  if (table == nullptr) {
    const char* name = std::getenv("RESNET_FUSED_CPU_ISA");
    table = name != nullptr && *name != '\0' ? find(name, "RESNET_FUSED_CPU_ISA") : supported().front();
    in_use.store(table, std::memory_order_release);
  }
  return *table;
}

void set_isa(const std::string& name) { in_use.store(find(name, "resnet_fused.set_cpu_isa: name")); }

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
}

} // namespace resnet_fused::cpu
