// Vectors of one instruction set: loads and stores that convert, FMA, widening.
// Included by kernels.cpp only, inside the instruction set's own unnamed namespace.
//
// Arithmetic and comparisons are the compiler's vector extension; only what it has no word for is
// written with intrinsics. Contraction is off (see setup.py): an FMA is there where it is written, so
// the forward and the mask round alike.

#define ALWAYS_INLINE __attribute__((always_inline)) inline

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
using Floats = Vec<float>;
using Doubles = Vec<double>;
using Words = Vec<uint32_t>;
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class A>
constexpr DType kDTypeOf = kFloat32;
template <>
inline constexpr DType kDTypeOf<BFloat16> = kBFloat16;
template <>
inline constexpr DType kDTypeOf<Float16> = kFloat16;
template <>
inline constexpr DType kDTypeOf<double> = kFloat64;

template <class A>
struct OpmathOf {
  using type = float;
  using integer = int32_t;
};
template <>
struct OpmathOf<double> {
  using type = double;
  using integer = int64_t;
};
template <class A>
using Opmath = typename OpmathOf<A>::type;
template <class A>
using Integer = typename OpmathOf<A>::integer; // as wide as Opmath<A>: the lanes of a comparison
template <class A>
constexpr int kLanes = kVectorBytes / sizeof(Opmath<A>);

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V>
inline V load_raw(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
inline void store_raw(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

inline Floats broadcast(float s) { return s - Floats{}; }
inline Doubles broadcast(double s) { return s - Doubles{}; }

inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

inline Doubles fma(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

// value where z is positive or a NaN, else zero. Spelled out for AVX-512: of `z <= 0 ? 0 : value` GCC makes
// a comparison into a vector register and a blend, at half the speed of one masked move.
template <class V>
inline V zero_where_not_positive(V z, V value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(z[0]) == sizeof(float)) {
    return (V)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)z, _mm512_setzero_ps(), _CMP_NLE_UQ), (__m512)value);
  } else {
    return (V)_mm512_maskz_mov_pd(_mm512_cmp_pd_mask((__m512d)z, _mm512_setzero_pd(), _CMP_NLE_UQ), (__m512d)value);
  }
#else
  return z <= V{} ? V{} : value;
#endif
}

// ---- load<A>: one vector of opmath from kLanes<A> stored elements ----

inline Words widen_halfwords(HalfWords h) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, Words);
#endif
}

inline HalfWords narrow_words(Words w) {
#if defined(__AVX512F__)
  return (HalfWords)_mm512_cvtepi32_epi16((__m512i)w);
#else
  return __builtin_convertvector(w, HalfWords);
#endif
}

// ---- the two 16-bit formats: decode is exact, encode rounds to nearest even and keeps a NaN a NaN ----

inline Floats decode(BFloat16, HalfWords h) { return bit_cast<Floats>(widen_halfwords(h) << 16); }

inline HalfWords encode(BFloat16, Floats v) {
  const Words bits = bit_cast<Words>(v);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (bits >> 16) | 0x40u; // rounding could carry a NaN's mantissa over to infinity
  return narrow_words((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

inline Floats decode(Float16, HalfWords h) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)h);
#else
  // The exponent is re-biased by a multiplication, which also makes subnormals normal.
  const Words w = widen_halfwords(h);
  const Words magnitude = bit_cast<Words>(bit_cast<Floats>((w & 0x7fffu) << 13) * 0x1p112f);
  const Words special = (w & 0x7c00u) == 0x7c00u ? Words{} + 0x7f800000u : Words{};
  return bit_cast<Floats>(magnitude | special | ((w & 0x8000u) << 16));
#endif
}

inline HalfWords encode(Float16, Floats v) {
#if defined(__AVX512F__)
  return (HalfWords)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (HalfWords)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // Adding the power of two whose last bit is half's last bit at this exponent makes the FPU round
  // there; the two factors before it overflow to infinity what half cannot hold.
  const Words bits = bit_cast<Words>(v);
  const Words twice = bits + bits;
  const Floats scaled = (bit_cast<Floats>(bits & 0x7fffffffu) * 0x1p112f) * 0x1p-110f;
  const Words exponent = twice & 0xff000000u;
  const Words bias = exponent < 0x71000000u ? Words{} + 0x71000000u : exponent;
  const Words base = bit_cast<Words>(bit_cast<Floats>((bias >> 1) + 0x07800000u) + scaled);
  const Words finite = ((base >> 13) & 0x7c00u) + (base & 0x0fffu);
  return narrow_words(((bits >> 16) & 0x8000u) | (twice > 0xff000000u ? Words{} + 0x7e00u : finite));
#endif
}

// ---- one vector of opmath from, to and as kLanes<A> stored elements ----

inline Floats load_vec(const float* p) { return load_raw<Floats>(p); }
inline Doubles load_vec(const double* p) { return load_raw<Doubles>(p); }
template <class A>
inline Floats load_vec(const A* p) {
  return decode(A{}, load_raw<HalfWords>(p));
}

inline void store_vec(float* p, Floats v) { store_raw(p, v); }
inline void store_vec(double* p, Doubles v) { store_raw(p, v); }
template <class A>
inline void store_vec(A* p, Floats v) {
  store_raw(p, encode(A{}, v));
}

// The value as stored: what the next kernel will read.
template <class A, class V>
inline V as_stored(V v) {
  if constexpr (sizeof(A) == sizeof(Opmath<A>)) {
    return v;
  } else {
    return decode(A{}, encode(A{}, v));
  }
}

// A store past the caches; `p` is aligned to what is stored. `fence_streams` comes before another thread reads it.
template <class V>
ALWAYS_INLINE void stream_raw(void* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#endif
  store_raw(p, v);
}

inline void fence_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- double accumulators of a vector of opmath ----

inline void widen(Floats v, Doubles* halves) {
#if defined(__AVX512F__)
  halves[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
  halves[1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
#elif defined(__AVX2__)
  halves[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
  halves[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
#else
  for (int i = 0; i < kLanes<double>; ++i) {
    halves[0][i] = v[i];
    halves[1][i] = v[i + kLanes<double>];
  }
#endif
}
inline void widen(Doubles v, Doubles* halves) { halves[0] = v; }

// Whether a vector is whole, or its first `count` lanes are elements and the rest must not be touched.
struct AllLanes {
  template <class A>
  auto load(const A* p) const {
    return load_vec(p);
  }
  template <class A, class V>
  void store(A* p, V v) const {
    store_vec(p, v);
  }
};

struct SomeLanes {
  int64_t count;

  template <class A>
  auto load(const A* p) const {
    A whole[kLanes<A>] = {};
    __builtin_memcpy(whole, p, count * sizeof(A));
    return load_vec(whole);
  }
  template <class A, class V>
  void store(A* p, V v) const {
    A whole[kLanes<A>];
    store_vec(whole, v);
    __builtin_memcpy(p, whole, count * sizeof(A));
  }
};

// Whole vectors that are written past the caches.
struct StreamedLanes : AllLanes {
  template <class A, class V>
  void store(A* p, V v) const {
    if constexpr (sizeof(A) == sizeof(Opmath<A>)) {
      stream_raw(p, v);
    } else {
      stream_raw(p, encode(A{}, v));
    }
  }
};
