// The same arithmetic on any processor: 16 lanes as GCC and clang know vectors, which they make of what there is
// (SSE2, NEON, …).

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Portable {
  typedef int32_t Int __attribute__((vector_size(64)));
  typedef uint32_t Bits __attribute__((vector_size(64)));
  typedef float Float __attribute__((vector_size(64)));
  static constexpr int kLanes = 16;
  static constexpr int kVectors = 1;
  static constexpr int kRegisters = 0;
  static constexpr int kRowParts = 1;
  static constexpr int kAhead = 0;

  static Int load(const void* p) { return copy<Int>(p); }
  static Float load_float(const float* p) { return copy<Float>(p); }
  static void store(float* p, Float v) { std::memcpy(p, &v, sizeof v); }
  static Float zero() { return Float{}; }
  static Int broadcast(int32_t v) { return Int{} + v; }
  static Float broadcast(float v) { return Float{} + v; }
  static Int widen(const uint8_t* p) {
    Int out;
    for (int i = 0; i < kLanes; ++i) out[i] = p[i];
    return out;
  }
  static Int multiply(Int a, Int b) { return a * b; }
  static Float multiply(Float a, Float b) { return a * b; }
  static Int add(Int a, Int b) { return a + b; }
  template <int N>
  static Int shift_left(Int v) {
    return v * (1 << N);
  }
  static Float to_float(Int v) { return __builtin_convertvector(v, Float); }
  // Rounded once, as the others do.
  static Float fma(Float a, Float b, Float c) {
    Float out;
    for (int i = 0; i < kLanes; ++i) out[i] = std::fma(a[i], b[i], c[i]);
    return out;
  }
  static void prefetch(const void*) {}

  template <int BITS, int AT>
  static Int field(Int v) {
    return (Int)((Bits)v >> AT & 0x01010101u * ((1u << BITS) - 1));
  }

  template <int AT, int HIGH>
  static Int join(Int low, Int high) {
    return field<2, AT>(low) | field<1, HIGH>(high) << 2;
  }

  template <int BITS>
  static Int dot(Int sum, Int codes, Int x) {
    for (int shift = 0; shift < 32; shift += 8) {
      sum += (Int)((Bits)codes >> shift & 0xffu) * ((Int)((Bits)x << (24 - shift)) >> 24);
    }
    return sum;
  }

  static float from_f16(uint16_t half) {
    // The exponent is put right by a multiplication, which takes care of subnormal numbers, too.
    const uint32_t shifted = uint32_t{half & 0x7fffu} << 13;
    const float value = copy<float>(&shifted) * 0x1p112f;
    uint32_t bits = copy<uint32_t>(&value);
    if ((half & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
    bits |= uint32_t{half & 0x8000u} << 16;
    return copy<float>(&bits);
  }
  static Float from_f16(const uint16_t* p) {
    Float out;
    for (int i = 0; i < kLanes; ++i) out[i] = from_f16(p[i]);
    return out;
  }
  static Float from_bf16(const uint16_t* p) {
    Float out;
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t bits = uint32_t{p[i]} << 16;
      out[i] = copy<float>(&bits);
    }
    return out;
  }

  // To nearest, ties to even.
  static uint16_t to_f16(float value) {
    uint32_t bits = copy<uint32_t>(&value);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (bits < 0x38800000u) {
      // Subnormal: adding a half brings its last bit to where a float's is.
      const float shifted = copy<float>(&bits) + 0.5f;
      return static_cast<uint16_t>(sign | (copy<uint32_t>(&shifted) - 0x3f000000u));
    }
    bits += 0xc8000fffu + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | bits >> 13);
  }
  static void to_f16(uint16_t* p, Float v) {
    for (int i = 0; i < kLanes; ++i) p[i] = to_f16(v[i]);
  }

  static void gather(float* to, const float* from, const int32_t* rows, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = rows[i] < 0 ? 0.0f : from[rows[i]];
  }

 private:
  template <class T>
  static T copy(const void* p) {
    T out;
    std::memcpy(&out, p, sizeof out);
    return out;
  }
};

}  // namespace
