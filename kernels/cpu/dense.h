// A few rows times a matrix that is kept in 16 bits and not packed: a model's output embedding, which is as much to
// read for a token as a quarter of its packed layers, and twice that in float32. One of the kernels of a level, as
// tile.h is; the order of the sums is the same at every level.

namespace {

template <class S, bool BF16>
inline typename S::Float widened(const uint16_t* p) {
  if constexpr (BF16) {
    return S::from_bf16(p);
  } else {
    return S::from_f16(p);
  }
}

template <class S, bool BF16>
inline float widened_one(uint16_t half) {
  if constexpr (!BF16) return S::from_f16(half);
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// x [R][K] times ROWS rows of the matrix: y[r * stride + i] for row i.
template <class S, bool BF16, int R, int ROWS>
inline void dense_rows(const uint16_t* matrix, const float* x, int64_t k, float* y, int64_t stride) {
  using Float = typename S::Float;
  constexpr int kSums = 32 / S::kLanes;  // 32 partial sums of a product
  Float sums[ROWS][R][kSums];
  unrolled<ROWS>([&](auto i) ROPEWALK_INLINE {
    unrolled<R>([&](auto r) ROPEWALK_INLINE {
      unrolled<kSums>([&](auto s) ROPEWALK_INLINE { sums[i][r][s] = S::zero(); });
    });
  });
  int64_t at = 0;
  for (; at + 32 <= k; at += 32) {
    unrolled<kSums>([&](auto s) ROPEWALK_INLINE {
      constexpr int kOffset = s * S::kLanes;
      unrolled<ROWS>([&](auto i) ROPEWALK_INLINE {
        if constexpr (s == 0) S::prefetch(matrix + i * k + at + 1024);
        const Float w = widened<S, BF16>(matrix + i * k + at + kOffset);
        unrolled<R>([&](auto r) ROPEWALK_INLINE {
          sums[i][r][s] = S::fma(w, S::load_float(x + r * k + at + kOffset), sums[i][r][s]);
        });
      });
    });
  }
  unrolled<ROWS>([&](auto i) ROPEWALK_INLINE {
    unrolled<R>([&](auto r) ROPEWALK_INLINE {
      alignas(64) float partial[32];
      unrolled<kSums>([&](auto s) ROPEWALK_INLINE { S::store(partial + s * S::kLanes, sums[i][r][s]); });
      for (int width = 16; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) partial[j] += partial[j + width];
      }
      for (int64_t rest = at; rest < k; ++rest) {
        partial[0] = std::fma(widened_one<S, BF16>(matrix[i * k + rest]), x[r * k + rest], partial[0]);
      }
      y[r * stride + i] = partial[0];
    });
  });
}

template <class S, bool BF16>
void dense_columns(const DenseWeight& w, const float* x, int64_t m, float* y, int64_t begin, int64_t end) {
  constexpr int kRows = S::kRegisters >= 32 ? 4 : 1;
  const auto* matrix = static_cast<const uint16_t*>(w.weight);
  int64_t n = begin;
  const auto rows = [&](auto count) {
    for (; n + count <= end; n += count) {
      const uint16_t* from = matrix + n * w.in_features;
      int64_t r = 0;
      for (; r + 2 <= m; r += 2) {
        dense_rows<S, BF16, 2, count>(from, x + r * w.in_features, w.in_features, y + r * w.columns + n, w.columns);
      }
      if (r < m) {
        dense_rows<S, BF16, 1, count>(from, x + r * w.in_features, w.in_features, y + r * w.columns + n, w.columns);
      }
    }
  };
  rows(std::integral_constant<int, kRows>{});
  if constexpr (kRows > 1) rows(std::integral_constant<int, 1>{});
}

template <class S>
void dense(const DenseWeight& w, const float* x, int64_t m, float* y, int64_t begin, int64_t end) {
  if (w.bf16) {
    dense_columns<S, true>(w, x, m, y, begin, end);
  } else {
    dense_columns<S, false>(w, x, m, y, begin, end);
  }
}

}  // namespace
