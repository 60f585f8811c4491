// Stored element types, their conversions, and the kinds of arithmetic a product may run in.
#pragma once

#include "ptx.h"

namespace resnet_fused::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Sixteen bytes: the unit of every copy between global and shared memory.
struct Chunk {
  uint32_t words[4];
};

// One access of sixteen bytes; a structure's members would be read or written one by one.
__device__ __forceinline__ Chunk load_chunk(const void* from) {
#if defined(__CUDACC__)
  const uint4 v = *static_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
#else
  return *static_cast<const Chunk*>(from);
#endif
}

__device__ __forceinline__ void store_chunk(void* to, const Chunk& chunk) {
#if defined(__CUDACC__)
  *static_cast<uint4*>(to) = make_uint4(chunk.words[0], chunk.words[1], chunk.words[2], chunk.words[3]);
#else
  *static_cast<Chunk*>(to) = chunk;
#endif
}

// The nearest bfloat16, ties to even, without an instruction for it; a NaN stays a NaN.
__device__ __forceinline__ uint16_t round_to_bfloat16(float v) {
  const uint32_t bits = float_to_bits(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(BFloat16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }
__device__ __forceinline__ float to_float(Float16 v) { return half_to_float(v.bits); }

// Rounds to nearest even; a NaN stays a NaN.
__device__ __forceinline__ void from_float(float v, float* out) { *out = v; }
__device__ __forceinline__ void from_float(float v, BFloat16* out) {
  if constexpr (kBefore80) {
    out->bits = round_to_bfloat16(v);
  } else {
    out->bits = float_to_bfloat16(v);
  }
}
__device__ __forceinline__ void from_float(float v, Float16* out) { out->bits = float_to_half(v); }

template <class Element>
__device__ __forceinline__ Element stored(float v) {
  Element e;
  from_float(v, &e);
  return e;
}

template <class Element>
__device__ __forceinline__ uint32_t pack_singly(float low, float high) {
  return static_cast<uint32_t>(stored<Element>(high).bits) << 16 | stored<Element>(low).bits;
}
__device__ __forceinline__ uint32_t pack_pair(BFloat16, float low, float high) {
  if constexpr (kBefore80) return pack_singly<BFloat16>(low, high);
  return pack_bfloat16s(low, high);
}
__device__ __forceinline__ uint32_t pack_pair(Float16, float low, float high) {
  if constexpr (kBefore80) return pack_singly<Float16>(low, high);
  return pack_halves(low, high);
}

// A chunk as floats and back.
template <class Element>
struct Packing {
  static constexpr int kElements = 2 * 4;

  static __device__ __forceinline__ void unpack(const Chunk& chunk, float* values) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = to_float(Element{static_cast<uint16_t>(chunk.words[i] & 0xffffu)});
      values[2 * i + 1] = to_float(Element{static_cast<uint16_t>(chunk.words[i] >> 16)});
    }
  }
  static __device__ __forceinline__ Chunk pack(const float* values) {
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) chunk.words[i] = pack_pair(Element{}, values[2 * i], values[2 * i + 1]);
    return chunk;
  }
};

template <>
struct Packing<float> {
  static constexpr int kElements = 4;

  static __device__ __forceinline__ void unpack(const Chunk& chunk, float* values) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = bits_to_float(chunk.words[i]);
  }
  static __device__ __forceinline__ Chunk pack(const float* values) {
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) chunk.words[i] = float_to_bits(values[i]);
    return chunk;
  }
};

// Four elements that lie beside one another within a chunk, as floats, in one access.
__device__ __forceinline__ void load_quad(const float* from, float* values) {
  Packing<float>::unpack(load_chunk(from), values);
}

template <class Half>
__device__ __forceinline__ void load_quad(const Half* from, float* values) {
#if defined(__CUDACC__)
  const uint2 v = *reinterpret_cast<const uint2*>(from);
  const uint32_t words[2] = {v.x, v.y};
#else
  uint32_t words[2];
  __builtin_memcpy(words, from, 8);
#endif
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = to_float(Half{static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)))});
}

template <class Element>
constexpr int kPerChunk = Packing<Element>::kElements;

// The four kinds of arithmetic; float32 by fused multiply-add where the tensor cores do not know the type. A slice is
// 128 bytes of the reduction: kDepth elements.
struct MathBF16 {
  using Element = BFloat16;
  static constexpr bool kTensorCores = !kBefore80;
  static __device__ __forceinline__ void mma(float* d, const uint32_t* a, const uint32_t* b) { mma_bf16(d, a, b); }
};
struct MathF16 {
  using Element = Float16;
  static constexpr bool kTensorCores = true;
  static __device__ __forceinline__ void mma(float* d, const uint32_t* a, const uint32_t* b) {
    if constexpr (kBefore80) {
      mma_f16_k8(d, a, b);
      mma_f16_k8(d, a + 2, b + 1);
    } else {
      mma_f16(d, a, b);
    }
  }
};
// float32 rounded to ten bits of mantissa as the tensor cores take it.
struct MathTF32 {
  using Element = float;
  static constexpr bool kTensorCores = !kBefore80;
  static __device__ __forceinline__ void mma(float* d, const uint32_t* a, const uint32_t* b) { mma_tf32(d, a, b); }
};
// float32 by fused multiply-add.
struct MathF32 {
  using Element = float;
  static constexpr bool kTensorCores = false;
};

template <class Math>
constexpr int kDepth = 128 / static_cast<int>(sizeof(typename Math::Element));

} // namespace resnet_fused::cuda
