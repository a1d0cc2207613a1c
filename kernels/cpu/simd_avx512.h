// 16 lanes of AVX-512 (F, BW, VL, DQ), with or without VNNI.

#include <immintrin.h>

namespace {

template <bool VNNI>
struct Avx512 {
  using Int = __m512i;
  using Float = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kVectors = 2;    // at once
  static constexpr int kRegisters = 32;
  static constexpr int kRowParts = VNNI ? 9 : 4;  // of 2 vectors each; with 12 the kernels are slower
  static constexpr int kAhead = 1024;   // bytes for each bit of a code, to fetch before they are needed

  static Int load(const void* p) { return _mm512_loadu_si512(p); }
  static Float load_float(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static Float zero() { return _mm512_setzero_ps(); }
  static Int broadcast(int32_t v) { return _mm512_set1_epi32(v); }
  static Float broadcast(float v) { return _mm512_set1_ps(v); }
  static Int widen(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Int multiply(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  template <int N>
  static Int shift_left(Int v) {
    return _mm512_slli_epi32(v, N);
  }
  static Float to_float(Int v) { return _mm512_cvtepi32_ps(v); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

  // BITS bits of each byte, from bit AT on.
  template <int BITS, int AT>
  static Int field(Int v) {
    if constexpr (AT > 0) v = _mm512_srli_epi32(v, AT);
    return _mm512_and_si512(v, _mm512_set1_epi8((1 << BITS) - 1));
  }

  // Two bits of each byte of `low` from bit AT on, and above them bit HIGH of `high`.
  template <int AT, int HIGH>
  static Int join(Int low, Int high) {
    if constexpr (AT > 0) low = _mm512_srli_epi32(low, AT);
    if constexpr (HIGH < 2) high = _mm512_slli_epi32(high, 2 - HIGH);
    if constexpr (HIGH > 2) high = _mm512_srli_epi32(high, HIGH - 2);
    high = _mm512_and_si512(high, _mm512_set1_epi8(4));
    return _mm512_ternarylogic_epi32(high, low, _mm512_set1_epi8(3), 0xf8);  // high | (low & 3)
  }

  // sum + the products of four unsigned codes and four signed values in each lane.
  template <int BITS>
  static Int dot(Int sum, Int codes, Int x) {
    if constexpr (VNNI) {
      return _mm512_dpbusd_epi32(sum, codes, x);
    } else if constexpr (BITS < 8) {
      // Two products fit 16 bits.
      const Int pairs = _mm512_maddubs_epi16(codes, x);
      return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
    } else {
      // They would not: the halves of the codes, one after the other.
      const Int low = _mm512_maddubs_epi16(field<4, 0>(codes), x);
      const Int high = _mm512_maddubs_epi16(field<4, 4>(codes), x);
      sum = _mm512_add_epi32(sum, _mm512_madd_epi16(low, _mm512_set1_epi16(1)));
      return _mm512_add_epi32(sum, _mm512_madd_epi16(high, _mm512_set1_epi16(16)));
    }
  }

  static Float from_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Float from_bf16(const uint16_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static float from_f16(uint16_t half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }
  static void to_f16(uint16_t* p, Float v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  // to[i] = from[rows[i]], 0 where rows[i] is negative; n is a multiple of 32.
  static void gather(float* to, const float* from, const int32_t* rows, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
      const __m512i index = _mm512_loadu_si512(rows + i);
      const __mmask16 there = _mm512_movepi32_mask(index) ^ 0xffff;
      _mm512_storeu_ps(to + i, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, index, from, 4));
    }
  }
};

}  // namespace
