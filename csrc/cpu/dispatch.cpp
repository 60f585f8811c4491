#include "dispatch.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#if defined(RESNET_FUSED_BF16_ISAS) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace resnet_fused::cpu {
namespace {

Kernels with(const Kernels& table, const ConvKernels* own, const char* isa) {
  Kernels made = table;
  made.convolution = own;
  made.isa = isa;
  return made;
}

#if defined(RESNET_FUSED_BF16_ISAS)
// Linux gives a process the registers of AMX when it asks for them.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// An instruction set that something else executes for this machine: for tests.
bool is_emulated(const char* isa) {
  const char* name = std::getenv("RESNET_FUSED_EMULATED_ISA");
  return name != nullptr && std::strcmp(name, isa) == 0;
}

// The sets that extend AVX-512 by products of bfloat16.
void add_bfloat16(std::vector<const Kernels*>& tables, const Kernels& avx512) {
  static ConvKernels own[2][kDTypes];
  const auto extended = [&](const ConvKernels* bfloat16, ConvKernels* made, const char* isa) {
    std::copy(avx512.convolution, avx512.convolution + kDTypes, made);
    made[kBFloat16] = bfloat16[kBFloat16];
    return with(avx512, made, isa);
  };
  static const Kernels pairs = extended(avx512_bf16::convolutions(), own[0], "avx512_bf16");
  static const Kernels tiles = extended(amx::convolutions(), own[1], "amx");
  const bool has_pairs = __builtin_cpu_supports("avx512bf16");
  const bool has_tiles = has_pairs && __builtin_cpu_supports("amx-bf16") && may_use_tiles();
  if (has_tiles || is_emulated(tiles.isa)) tables.push_back(&tiles);
  if (has_pairs || is_emulated(pairs.isa)) tables.push_back(&pairs);
}
#endif

// Best first.
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const Kernels avx2 = with(avx2::table(), avx2::convolutions(), "avx2");
  static const Kernels avx512 = with(avx512::table(), avx512::convolutions(), "avx512");
#if defined(RESNET_FUSED_BF16_ISAS)
  if (has_avx512) add_bfloat16(tables, avx512);
#endif
  if (has_avx512) tables.push_back(&avx512);
  if (has_avx2) tables.push_back(&avx2);
#endif
  static const Kernels baseline = with(baseline::table(), baseline::convolutions(), "baseline");
  tables.push_back(&baseline);
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
