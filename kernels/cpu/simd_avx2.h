// 8 lanes of AVX2 (with FMA and F16C), with or without AVX-VNNI.

#include <immintrin.h>

namespace {

template <bool VNNI>
struct Avx2 {
  using Int = __m256i;
  using Float = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kVectors = 2;
  static constexpr int kRegisters = 16;
  static constexpr int kRowParts = 4;
  static constexpr int kAhead = 1024;

  static Int load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static Float load_float(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static Float zero() { return _mm256_setzero_ps(); }
  static Int broadcast(int32_t v) { return _mm256_set1_epi32(v); }
  static Float broadcast(float v) { return _mm256_set1_ps(v); }
  static Int widen(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static Int multiply(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  template <int N>
  static Int shift_left(Int v) {
    return _mm256_slli_epi32(v, N);
  }
  static Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

  template <int BITS, int AT>
  static Int field(Int v) {
    if constexpr (AT > 0) v = _mm256_srli_epi32(v, AT);
    return _mm256_and_si256(v, _mm256_set1_epi8((1 << BITS) - 1));
  }

  template <int AT, int HIGH>
  static Int join(Int low, Int high) {
    if constexpr (HIGH < 2) high = _mm256_slli_epi32(high, 2 - HIGH);
    if constexpr (HIGH > 2) high = _mm256_srli_epi32(high, HIGH - 2);
    return _mm256_or_si256(field<2, AT>(low), _mm256_and_si256(high, _mm256_set1_epi8(4)));
  }

  template <int BITS>
  static Int dot(Int sum, Int codes, Int x) {
    if constexpr (VNNI) {
      return _mm256_dpbusd_avx_epi32(sum, codes, x);
    } else if constexpr (BITS < 8) {
      const Int pairs = _mm256_maddubs_epi16(codes, x);
      return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    } else {
      const Int low = _mm256_maddubs_epi16(field<4, 0>(codes), x);
      const Int high = _mm256_maddubs_epi16(field<4, 4>(codes), x);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
      return _mm256_add_epi32(sum, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
    }
  }

  static Float from_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Float from_bf16(const uint16_t* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  static float from_f16(uint16_t half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }
  static void to_f16(uint16_t* p, Float v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static void gather(float* to, const float* from, const int32_t* rows, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = rows[i] < 0 ? 0.0f : from[rows[i]];
  }
};

}  // namespace
