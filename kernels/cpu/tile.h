// The kernels of one processor level: activations into integers, and a strip of rows times a tile of columns.
//
// S is the vector arithmetic of the level (simd_*.h). Everything is in the level's own anonymous namespace: what is
// compiled for one level must never be what another one calls.

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "packed.h"

namespace {

using namespace ropewalk;

// Whether a level has a kernel for strips of so many rows.
template <class S>
constexpr bool has_strip(int rows, int parts) {
  return rows == 1 || (rows * parts <= S::kRowParts && (rows != 3 || parts == 3));
}

template <class S>
int strip_of(int64_t rows, int parts) {
  for (const int strip : {8, 4, 3, 2}) {
    if (strip <= rows && has_strip<S>(strip, parts)) return strip;
  }
  return 1;
}

template <class S>
inline void to_float(const void* from, Dtype dtype, float* to, int64_t n) {
  if (dtype == Dtype::f32) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  const auto* halves = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  if (dtype == Dtype::f16) {
    for (; i + S::kLanes <= n; i += S::kLanes) S::store(to + i, S::from_f16(halves + i));
    for (; i < n; ++i) to[i] = S::from_f16(halves[i]);
  } else {
    for (; i < n; ++i) {
      const uint32_t bits = uint32_t{halves[i]} << 16;
      std::memcpy(to + i, &bits, sizeof bits);
    }
  }
}

template <class S>
void quantize_row(const Input& in, const Activations& a, int64_t source, int64_t start, int strip, int r,
                  float* scratch) {
  constexpr float kLargest[] = {127.0f, 127.0f * 256, 127.0f * 65536};  // 127 in the first part
  const int64_t padded = a.blocks * kBlock;
  const void* row = static_cast<const char*>(in.x) + source * in.stride * size_of(in.dtype);
  const float* values = static_cast<const float*>(row);
  if (in.rows != nullptr) {
    const float* plain = values;
    if (in.dtype != Dtype::f32) {
      to_float<S>(row, in.dtype, scratch + padded, in.in_features);
      plain = scratch + padded;
    }
    S::gather(scratch, plain, in.rows, padded);
    values = scratch;
  } else if (in.dtype != Dtype::f32) {
    to_float<S>(row, in.dtype, scratch, padded);
    values = scratch;
  }
  const int parts = a.parts;
  int8_t* out = a.values + start * padded * parts + int64_t{r} * parts * kBlock;
  float* scales = a.scales + start * a.blocks + r;
  int32_t* sums = a.sums + start * a.blocks * parts + int64_t{r} * parts;
  for (int64_t b = 0; b < a.blocks; ++b, values += kBlock) {
    // Compared as integers, infinities and what is not a number are the largest.
    uint32_t largest = 0;
    for (int i = 0; i < kBlock; ++i) {
      uint32_t bits;
      std::memcpy(&bits, values + i, sizeof bits);
      bits &= 0x7fffffffu;
      largest = bits > largest ? bits : largest;
    }
    float amax;
    std::memcpy(&amax, &largest, sizeof amax);
    // Such a block makes its row of the result not a number, whatever the codes are; one that is next to nothing
    // would overflow the division.
    const bool finite = largest < 0x7f800000u;
    const float factor = finite && amax > 0x1p-100f ? kLargest[parts - 1] / amax : 0.0f;
    *scales = finite ? (factor == 0.0f ? 0.0f : amax / kLargest[parts - 1]) : std::nanf("");
    alignas(64) int32_t whole[kBlock];
    if (finite) {
      for (int i = 0; i < kBlock; ++i) whole[i] = static_cast<int32_t>(__builtin_rintf(values[i] * factor));
    } else {
      std::memset(whole, 0, sizeof whole);
    }
    for (int p = parts - 1; p >= 0; --p) {
      int8_t* part = out + p * kBlock;
      int32_t sum = 0;
      for (int i = 0; i < kBlock; ++i) {
        const auto low = static_cast<int8_t>(whole[i]);
        part[i] = low;
        sum += low;
        whole[i] = (whole[i] - low) >> 8;
      }
      sums[p] = -(sum << a.shift);
    }
    out += int64_t{strip} * parts * kBlock;
    scales += strip;
    sums += int64_t{strip} * parts;
  }
}

// Quad q of the vector of S::kLanes columns at `raw`, one code in each byte.
template <class S, int BITS, int Q>
inline typename S::Int quad(const uint8_t* raw) {
  if constexpr (BITS == 8) {
    return S::load(raw + 64 * Q);
  } else if constexpr (BITS == 3) {
    return S::template join<2 * (Q % 4), Q>(S::load(raw + 64 * (Q / 4)), S::load(raw + 128));
  } else {
    constexpr int kPerByte = 8 / BITS;
    return S::template field<BITS, BITS * (Q % kPerByte)>(S::load(raw + 64 * (Q / kPerByte)));
  }
}

// Whatever is not inlined keeps its accumulators in memory.
#define ROPEWALK_INLINE __attribute__((always_inline))

template <int N, class F>
inline ROPEWALK_INLINE void unrolled(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) ROPEWALK_INLINE {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// R rows times the columns of a tile. Writes float32 [R][32] to `out`.
template <class S, int BITS, int P, int R>
void multiply_strip(const Weight& w, const Activations& a, int64_t start, int64_t tile, float* out) {
  using Int = typename S::Int;
  using Float = typename S::Float;
  constexpr int L = S::kLanes, V = S::kVectors;
  constexpr int kStep = L * V;  // columns at once
  // What a group has summed, and what all have: in registers where these suffice.
  constexpr bool kInRegisters = R * V * (P + 2) <= S::kRegisters - 8;
  const int64_t padded = w.blocks * kBlock;
  for (int column = 0; column < kColumns; column += kStep) {
    alignas(64) float group_memory[kInRegisters ? 1 : R * kStep];
    float* group = group_memory;
    float* total = out + column;
    Float group_register[R][V], total_register[R][V];
    unrolled<R>([&](auto r) ROPEWALK_INLINE {
      unrolled<V>([&](auto v) ROPEWALK_INLINE {
        if constexpr (kInRegisters) {
          total_register[r][v] = S::zero();
        } else {
          S::store(total + r * kColumns + v * L, S::zero());
        }
      });
    });
    const uint8_t* words = w.words + tile * w.blocks * block_bytes(BITS) + column * (4 * BITS);
    const int8_t* x = a.values + start * padded * P;
    const float* x_scales = a.scales + start * w.blocks;
    const int32_t* x_sums = a.sums + start * w.blocks * P;
    const auto weight_scale = [&](int64_t at) ROPEWALK_INLINE {
      return w.half_scales ? S::from_f16(static_cast<const uint16_t*>(w.scales) + at)
                           : S::load_float(static_cast<const float*>(w.scales) + at);
    };
    const auto add_to_total = [&](auto r, auto v, Float sum, Float scale) ROPEWALK_INLINE {
      if constexpr (kInRegisters) {
        total_register[r][v] = S::fma(sum, scale, total_register[r][v]);
      } else {
        float* to = total + r * kColumns + v * L;
        S::store(to, S::fma(sum, scale, S::load_float(to)));
      }
    };
    // Groups of one block, which need not be summed up first. The results are the same.
    const bool whole_groups = w.blocks_per_group == 1;
    int64_t block = 0;
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t index = (tile * w.groups + g) * kColumns + column;
      if (!whole_groups) {
        unrolled<R>([&](auto r) ROPEWALK_INLINE {
          unrolled<V>([&](auto v) ROPEWALK_INLINE {
            if constexpr (kInRegisters) {
              group_register[r][v] = S::zero();
            } else {
              S::store(group + r * kStep + v * L, S::zero());
            }
          });
        });
      }
      const int64_t end = block + w.blocks_per_group < w.blocks ? block + w.blocks_per_group : w.blocks;
      for (; block < end; ++block) {
        Int sums[R][P][V];
        // The codes count from 0: what their zero point adds to the sum comes first.
        if (w.zeros == nullptr) {
          unrolled<R>([&](auto r) ROPEWALK_INLINE {
            unrolled<P>([&](auto p) ROPEWALK_INLINE {
              const Int less = S::broadcast(x_sums[r * P + p]);
              unrolled<V>([&](auto v) ROPEWALK_INLINE { sums[r][p][v] = less; });
            });
          });
        } else {
          unrolled<V>([&](auto v) ROPEWALK_INLINE {
            const Int zero = S::widen(w.zeros + index + v * L);
            unrolled<R>([&](auto r) ROPEWALK_INLINE {
              unrolled<P>([&](auto p) ROPEWALK_INLINE {
                sums[r][p][v] = S::multiply(zero, S::broadcast(x_sums[r * P + p]));
              });
            });
          });
        }
        unrolled<kBlock / 4>([&](auto q) ROPEWALK_INLINE {
          constexpr int kLines = kStep * 4 * BITS / 64;
          for (int line = q * kLines / 8; line < (q + 1) * kLines / 8; ++line) {
            S::prefetch(words + S::kAhead * BITS + line * 64);
          }
          Int codes[V];
          unrolled<V>([&](auto v) ROPEWALK_INLINE {
            constexpr int at = v * L;
            codes[v] = quad<S, BITS, q>(words + at / 16 * (64 * BITS) + at % 16 * 4);
          });
          unrolled<R>([&](auto r) ROPEWALK_INLINE {
            unrolled<P>([&](auto p) ROPEWALK_INLINE {
              int32_t four;
              std::memcpy(&four, x + (r * P + p) * kBlock + 4 * q, sizeof four);
              const Int xs = S::broadcast(four);
              unrolled<V>([&](auto v) ROPEWALK_INLINE {
                sums[r][p][v] = S::template dot<BITS>(sums[r][p][v], codes[v], xs);
              });
            });
          });
        });
        const auto sum_of = [&](auto r, auto v) ROPEWALK_INLINE {
          if constexpr (P == 1) {
            return S::to_float(sums[r][0][v]);
          } else {
            const Float sum = S::to_float(S::add(S::template shift_left<8>(sums[r][0][v]), sums[r][1][v]));
            if constexpr (P == 2) return sum;
            return S::fma(sum, S::broadcast(256.0f), S::to_float(sums[r][P - 1][v]));
          }
        };
        if (whole_groups) {
          unrolled<V>([&](auto v) ROPEWALK_INLINE {
            const Float scale = weight_scale(index + v * L);
            unrolled<R>([&](auto r) ROPEWALK_INLINE {
              add_to_total(r, v, S::multiply(sum_of(r, v), S::broadcast(x_scales[r])), scale);
            });
          });
        } else {
          unrolled<R>([&](auto r) ROPEWALK_INLINE {
            const Float scale = S::broadcast(x_scales[r]);
            unrolled<V>([&](auto v) ROPEWALK_INLINE {
              if constexpr (kInRegisters) {
                group_register[r][v] = S::fma(sum_of(r, v), scale, group_register[r][v]);
              } else {
                float* at = group + r * kStep + v * L;
                S::store(at, S::fma(sum_of(r, v), scale, S::load_float(at)));
              }
            });
          });
        }
        words += block_bytes(BITS);
        x += R * P * kBlock;
        x_scales += R;
        x_sums += R * P;
      }
      if (whole_groups) continue;
      unrolled<V>([&](auto v) ROPEWALK_INLINE {
        const Float scale = weight_scale(index + v * L);
        unrolled<R>([&](auto r) ROPEWALK_INLINE {
          if constexpr (kInRegisters) {
            add_to_total(r, v, group_register[r][v], scale);
          } else {
            add_to_total(r, v, S::load_float(group + r * kStep + v * L), scale);
          }
        });
      });
    }
    if constexpr (kInRegisters) {
      unrolled<R>([&](auto r) ROPEWALK_INLINE {
        unrolled<V>([&](auto v) ROPEWALK_INLINE { S::store(total + r * kColumns + v * L, total_register[r][v]); });
      });
    }
  }
}

template <class S>
inline void write_row(float* sums, const Output& out, int64_t row, int64_t first, int64_t columns) {
  if (out.bias != nullptr) {
    for (int64_t n = 0; n < columns; ++n) sums[n] += out.bias[first + n];
  }
  const int64_t at = (out.indices != nullptr ? out.indices[row] : row) * out.stride + first - out.origin;
  if (out.dtype == Dtype::f32) {
    std::memcpy(static_cast<float*>(out.y) + at, sums, columns * sizeof(float));
    return;
  }
  auto* to = static_cast<uint16_t*>(out.y) + at;
  if (out.dtype == Dtype::f16) {
    alignas(64) uint16_t halves[kColumns];
    for (int n = 0; n < kColumns; n += S::kLanes) S::to_f16(halves + n, S::load_float(sums + n));
    std::memcpy(to, halves, columns * sizeof(uint16_t));
    return;
  }
  for (int64_t n = 0; n < columns; ++n) {
    uint32_t bits;
    std::memcpy(&bits, sums + n, sizeof bits);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    // To nearest, ties to even.
    to[n] = is_nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
  }
}

template <class S, int BITS, int P, int R>
void multiply_rows(const Weight& w, const Activations& a, int64_t start, int64_t tile, const Output& out) {
  if constexpr (has_strip<S>(R, P)) {
    alignas(64) float sums[R * kColumns];
    float* memory = sums;
    __asm__("" : "+r"(memory));  // or the compiler would keep what has no register in others' registers
    multiply_strip<S, BITS, P, R>(w, a, start, tile, memory);
    const int64_t first = tile * kColumns;
    const int64_t columns = w.columns - first < kColumns ? w.columns - first : kColumns;
    for (int r = 0; r < R; ++r) write_row<S>(memory + r * kColumns, out, start + r, first, columns);
  }
}

template <class S, int BITS, int P>
void multiply_all(const Weight& w, const Activations& a, int64_t rows, int64_t tile, const Output& out) {
  for (int64_t start = 0; start < rows;) {
    const int strip = strip_of<S>(rows - start, P);
    switch (strip) {
      case 8: multiply_rows<S, BITS, P, 8>(w, a, start, tile, out); break;
      case 4: multiply_rows<S, BITS, P, 4>(w, a, start, tile, out); break;
      case 3: multiply_rows<S, BITS, P, 3>(w, a, start, tile, out); break;
      case 2: multiply_rows<S, BITS, P, 2>(w, a, start, tile, out); break;
      default: multiply_rows<S, BITS, P, 1>(w, a, start, tile, out); break;
    }
    start += strip;
  }
}

template <class S, int BITS>
void multiply_bits(const Weight& w, const Activations& a, int64_t rows, int64_t tile, const Output& out) {
  switch (a.parts) {
    case 1: return multiply_all<S, BITS, 1>(w, a, rows, tile, out);
    case 2: return multiply_all<S, BITS, 2>(w, a, rows, tile, out);
    default: return multiply_all<S, BITS, 3>(w, a, rows, tile, out);
  }
}

template <class S>
void multiply(const Weight& w, const Activations& a, int64_t rows, int64_t tile, const Output& out) {
  switch (w.bits) {
    case 2: return multiply_bits<S, 2>(w, a, rows, tile, out);
    case 3: return multiply_bits<S, 3>(w, a, rows, tile, out);
    case 4: return multiply_bits<S, 4>(w, a, rows, tile, out);
    default: return multiply_bits<S, 8>(w, a, rows, tile, out);
  }
}

}  // namespace
