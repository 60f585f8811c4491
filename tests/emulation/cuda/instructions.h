// Twins of the instructions in csrc/cuda/ptx.h. Sums of a tensor-core instruction are made in float32, one
// product after another; a GPU's differ in the last bits.
#pragma once

#include "fibers.h"

namespace device_shim {

inline float bits_to_float(uint32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, 4);
  return v;
}

inline uint32_t float_to_bits(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  return bits;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The exponent is re-biased by a multiplication, which also makes subnormals normal.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

inline uint16_t float_to_half(float v) {
  const uint32_t bits = float_to_bits(v), magnitude = bits & 0x7fffffffu;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return 0x7fffu;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u; // 65520 and above
  if (magnitude < 0x38800000u) {                       // below the smallest normal: let the sum round
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(float_to_bits(shifted) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

inline uint16_t float_to_bfloat16(float v) {
  const uint32_t bits = float_to_bits(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline uint32_t pack_halves(float low, float high) {
  return static_cast<uint32_t>(float_to_half(high)) << 16 | float_to_half(low);
}

inline uint32_t pack_bfloat16s(float low, float high) {
  return static_cast<uint32_t>(float_to_bfloat16(high)) << 16 | float_to_bfloat16(low);
}

inline uint32_t round_to_tf32(uint32_t bits) {
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u; // ties away from zero
}

inline void store_shared_8(void* shared, float first, float second) {
  if (reinterpret_cast<uintptr_t>(shared) % 8 != 0) fail("st.shared.v2: misaligned address");
  const float values[2] = {first, second};
  std::memcpy(shared, values, 8);
}

inline void store_shared_16(void* shared, const uint32_t* words) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) fail("st.shared.v4: misaligned address");
  std::memcpy(shared, words, 16);
}

inline void cp_async(void* shared, const void* global, int bytes, bool present) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0) fail("cp.async: misaligned shared address");
  if (present && reinterpret_cast<uintptr_t>(global) % bytes != 0) fail("cp.async: misaligned global address");
  std::memset(shared, 0xff, bytes);
  current->open.push_back({shared, present ? global : nullptr, bytes});
}
inline void cp_async_16(void* shared, const void* global, bool present) { cp_async(shared, global, 16, present); }
inline void cp_async_4(void* shared, const void* global, bool present) { cp_async(shared, global, 4, present); }

inline void cp_async_commit() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

template <int kPending>
void cp_async_wait() {
  auto& groups = current->groups;
  while (groups.size() > kPending) {
    for (const Copy& copy : groups.front()) {
      if (copy.global != nullptr) {
        std::memcpy(copy.shared, copy.global, copy.bytes);
      } else {
        std::memset(copy.shared, 0, copy.bytes);
      }
    }
    groups.erase(groups.begin());
  }
}

// A lane reads its own row, so that sanitizers see who reads; the warp then deals the elements out.
struct MatrixRows {
  uint16_t row[8];
  uint32_t* registers;
};

template <bool kTransposed>
SHIM_UNSEEN void deal_matrices(void* const* operands) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    for (unsigned m = 0; m < 4; ++m) {
      uint32_t pair = 0;
      for (unsigned j = 0; j < 2; ++j) {
        const unsigned long_way = lane % 4 * 2 + j, short_way = lane / 4;
        const unsigned row = kTransposed ? long_way : short_way, column = kTransposed ? short_way : long_way;
        pair |= static_cast<uint32_t>(static_cast<const MatrixRows*>(operands[8 * m + row])->row[column]) << (16 * j);
      }
      static_cast<MatrixRows*>(operands[lane])->registers[m] = pair;
    }
  }
}

template <bool kTransposed>
void load_matrices(uint32_t* registers, const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix: misaligned row");
  MatrixRows rows;
  std::memcpy(rows.row, row, 16);
  rows.registers = registers;
  warp_collective(deal_matrices<kTransposed>, &rows);
}
inline void ldmatrix(uint32_t* r, const void* row) { load_matrices<false>(r, row); }
inline void ldmatrix_transposed(uint32_t* r, const void* row) { load_matrices<true>(r, row); }

struct MultiplyOperands {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

struct DecodeBF16 {
  static constexpr int kPerRegister = 2;
  static float at(uint32_t word, int i) { return bits_to_float(i ? word & 0xffff0000u : word << 16); }
};
struct DecodeF16 {
  static constexpr int kPerRegister = 2;
  static float at(uint32_t word, int i) { return half_to_float(static_cast<uint16_t>(word >> (16 * i))); }
};
struct DecodeTF32 {
  static constexpr int kPerRegister = 1;
  static float at(uint32_t word, int) { return bits_to_float(word & 0xffffe000u); }
};

// d (16x8) += a (16 x 4 kHalves registers' worth) * b, fragments as PTX lays them out.
template <class Decode, int kHalves>
SHIM_UNSEEN void multiply_matrices(void* const* operands) {
  constexpr int kPer = Decode::kPerRegister, kDepth = 4 * kHalves * kPer;
  float a[16][kDepth], b[kDepth][8];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const auto* own = static_cast<const MultiplyOperands*>(operands[lane]);
    const unsigned group = lane / 4, within = lane % 4;
    for (unsigned i = 0; i < kPer; ++i) {
      for (unsigned r = 0; r < 2 * kHalves; ++r) {
        a[group + 8 * (r % 2)][within * kPer + i + 4 * kPer * (r / 2)] = Decode::at(own->a[r], i);
      }
      for (unsigned r = 0; r < kHalves; ++r) b[within * kPer + i + 4 * kPer * r][group] = Decode::at(own->b[r], i);
    }
  }
  for (unsigned row = 0; row < 16; ++row) {
    float sum[8] = {};
    for (int k = 0; k < kDepth; ++k) {
      for (unsigned column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
    }
    for (unsigned column = 0; column < 8; ++column) {
      auto* owner = static_cast<MultiplyOperands*>(operands[row % 8 * 4 + column / 2]);
      owner->d[row / 8 * 2 + column % 2] += sum[column];
    }
  }
}

template <class Decode, int kHalves = 2>
void multiply(float* d, const uint32_t* a, const uint32_t* b) {
  MultiplyOperands operands{d, a, b};
  warp_collective(multiply_matrices<Decode, kHalves>, &operands);
}
inline void mma_bf16(float* d, const uint32_t* a, const uint32_t* b) { multiply<DecodeBF16>(d, a, b); }
inline void mma_f16(float* d, const uint32_t* a, const uint32_t* b) { multiply<DecodeF16>(d, a, b); }
inline void mma_f16_k8(float* d, const uint32_t* a, const uint32_t* b) { multiply<DecodeF16, 1>(d, a, b); }
inline void mma_tf32(float* d, const uint32_t* a, const uint32_t* b) { multiply<DecodeTF32>(d, a, b); }

} // namespace device_shim
