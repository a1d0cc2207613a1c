// For the kernels that are plain loops over float32, float16 and bfloat16 (rope.cpp, norm.cpp, attention.cpp): one
// source for every processor, which the compiler turns into the vectors of each; and the same bits on all of them.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

// One build serves every x86: the dynamic linker picks the widest of these that the processor has.
#if !defined(__x86_64__) || !defined(__linux__)
#define WIDEST
#elif defined(__clang__) || __GNUC__ >= 12
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define WIDEST __attribute__((target_clones("avx2", "default")))
#endif
#define INLINE inline __attribute__((always_inline))

// No fused multiply-add: it would round otherwise than torch, and differ between those builds.
#ifdef __clang__
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace {

// To float32 and back, rounded to nearest even. Those of c10, written without a branch: with one the loops that use
// them are not vectorized.
INLINE float widen(float x) { return x; }
INLINE float widen(c10::BFloat16 x) { return std::bit_cast<float>(uint32_t{x.x} << 16); }
INLINE float widen(c10::Half x) {
  const uint32_t magnitude = uint32_t{x.x} << 17, sign = (uint32_t{x.x} & 0x8000u) << 16;
  const float normal = std::bit_cast<float>((magnitude >> 4) + 0x70000000u) * 0x1p-112f;
  const float subnormal = std::bit_cast<float>((magnitude >> 17) | 0x3F000000u) - 0.5f;
  const uint32_t is_small = -static_cast<uint32_t>(magnitude < 0x08000000u);
  const uint32_t bits = (std::bit_cast<uint32_t>(subnormal) & is_small) | (std::bit_cast<uint32_t>(normal) & ~is_small);
  return std::bit_cast<float>(sign | bits);
}

INLINE void narrow(float x, float& out) { out = x; }
INLINE void narrow(float x, c10::BFloat16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out.x = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
INLINE void narrow(float x, c10::Half& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits << 1;
  const uint32_t exponent = std::max(magnitude & 0xFF000000u, 0x71000000u);
  // Overflow goes to infinity here, and the sum rounds at the last bit that a float16 has.
  const float scaled = (std::bit_cast<float>(bits & 0x7FFFFFFFu) * 0x1p+112f) * 0x1p-110f;
  const uint32_t sum = std::bit_cast<uint32_t>(std::bit_cast<float>((exponent >> 1) + 0x07800000u) + scaled);
  const uint32_t half = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  const uint32_t is_nan = -static_cast<uint32_t>(magnitude > 0xFF000000u);
  out.x = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | (half & ~is_nan) | (0x7E00u & is_nan));
}

// e to the x, to 2e-7 of it where it is a normal number; beyond, the nearest such.
INLINE float exp_of(float x) {
  constexpr float kMagic = 12582912.0f;  // adding 1.5 * 2^23 rounds to whole numbers
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.3f ? 88.3f : x;
  const float shifted = x * 1.44269504f + kMagic;
  const float n = shifted - kMagic;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * std::bit_cast<float>((std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kMagic) + 127) << 23);
}

// Sixteen sums side by side, added up in one order whatever the width of the vectors is.
struct Sums {
  float lanes[16] = {};

  INLINE float total() {
    for (int width = 8; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
  }
};

}  // namespace
