// ropewalk::cpu_attention: the attention of a few new tokens in one call. Their queries and keys are rotated, keys and
// values written to where the cache has room, and the queries meet all that is there. The schema is in attention.py.
//
// A cached key is read once for all query heads that share it. Long contexts are cut into chunks, which threads take
// and whose results are put together in order, so that the result depends neither on the threads nor on the processor.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "loops.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // of vectors as arguments: nothing of them leaves this file

namespace {

using at::Tensor;

constexpr int64_t kChunk = 512;  // tokens that one thread takes
constexpr int64_t kBlock = 64;   // tokens whose keys and values stay in the nearest cache
// Fewer products than this are not worth waking another thread.
constexpr int64_t kWorthThreads = 1 << 17;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// A tensor [batch, heads, tokens, dim] whose rows are contiguous.
struct Cache {
  explicit Cache(const Tensor& t)
      : data(static_cast<char*>(t.data_ptr())), size(t.element_size()), batch(t.size(0) == 1 ? 0 : t.stride(0)),
        head(t.stride(1)), token(t.stride(2)) {}

  char* row(int64_t b, int64_t h, int64_t t) const { return data + (b * batch + h * head + t * token) * size; }

  char* data;
  int64_t size, batch, head, token;
};

struct Shape {
  int64_t batch, tokens, heads, kv_heads, dim, start, length;
  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return group() * tokens; }  // of queries for a head of keys
};

// Which of the cached tokens a new one sees: bool [1 or batch, 1, tokens, any], or null: all up to itself.
struct Mask {
  const bool* data;
  int64_t batch, token, stride;

  const bool* of(int64_t b, int64_t s, int64_t t) const { return data + b * batch + s * token + t * stride; }
};

// Sums over the tokens that a query has seen: of e^(score - largest), and of that times the values.
struct Seen {
  float* values;  // [dim]
  float largest = kNothing, weight = 0;

  // Make room for a larger score.
  INLINE void raise(float score, int64_t dim) {
    if (score <= largest) return;
    const float factor = largest == kNothing ? 0.0f : exp_of(largest - score);
    for (int64_t i = 0; i < dim; ++i) values[i] *= factor;
    weight *= factor;
    largest = score;
  }
};

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t Places __attribute__((vector_size(4 * kLanes)));

template <typename T>
INLINE Lanes load(const T* from, int64_t count = kLanes) {
  float values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = widen(from[i]);
  Lanes lanes;
  std::memcpy(&lanes, values, sizeof lanes);
  return lanes;
}

template <>
INLINE Lanes load(const float* from, int64_t count) {
  Lanes lanes = {};
  std::memcpy(&lanes, from, count * sizeof(float));
  return lanes;
}

// Return the lanes of a and, counted on, of b that the places name.
INLINE Lanes pick(Lanes a, Lanes b, Places places) {
#ifdef __clang__
  Lanes out;
  for (int i = 0; i < kLanes; ++i) out[i] = places[i] < kLanes ? a[places[i]] : b[places[i] - kLanes];
  return out;
#else
  return __builtin_shuffle(a, b, places);
#endif
}

// Of two vectors of PARTS parts each, add the halves of every part and put the sums side by side.
template <int PARTS>
INLINE Lanes fold(Lanes a, Lanes b) {
  constexpr int kHalf = kLanes / PARTS / 2;
  Places low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / kHalf * 2 * kHalf + i % kHalf;
    high[i] = low[i] + kHalf;
  }
  return pick(a, b, low) + pick(a, b, high);
}

// The scores of a query with 16 keys, `stride` apart: sixteen sums each, folded in one order whatever the width of the
// vectors is. Of the last keys of a cache there may be fewer.
template <typename T>
INLINE Lanes score(const float* query, const T* keys, int64_t stride, int64_t count, int64_t dim) {
  Lanes sums[kLanes] = {};
  int64_t i = 0;
  if (count >= kLanes) {
    for (; i + kLanes <= dim; i += kLanes) {
      const Lanes q = load(query + i);
#pragma GCC unroll 16
      for (int t = 0; t < kLanes; ++t) sums[t] += q * load(keys + t * stride + i);
    }
  }
  for (; i < dim; i += kLanes) {
    const int64_t some = std::min<int64_t>(kLanes, dim - i);
    const Lanes q = load(query + i, some);
    for (int t = 0; t < std::min<int64_t>(kLanes, count); ++t) sums[t] += q * load(keys + t * stride + i, some);
  }
#pragma GCC unroll 8
  for (int t = 0; t < 8; ++t) sums[t] = fold<1>(sums[2 * t], sums[2 * t + 1]);
#pragma GCC unroll 4
  for (int t = 0; t < 4; ++t) sums[t] = fold<2>(sums[2 * t], sums[2 * t + 1]);
#pragma GCC unroll 2
  for (int t = 0; t < 2; ++t) sums[t] = fold<4>(sums[2 * t], sums[2 * t + 1]);
  return fold<8>(sums[0], sums[1]);
}

// Put the other half of every 2 * DISTANCE lanes into the place of each.
template <int DISTANCE>
INLINE Lanes swapped(Lanes a) {
  Places places;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) places[i] = i ^ DISTANCE;
  return pick(a, a, places);
}

INLINE Lanes larger(Lanes a, Lanes b) {
  return b <= a ? a : b;  // b where one of them is not a number, which shall not get lost
}

INLINE float largest_of(Lanes a) {
  a = larger(a, swapped<8>(a));
  a = larger(a, swapped<4>(a));
  a = larger(a, swapped<2>(a));
  return larger(a, swapped<1>(a))[0];
}

INLINE float sum_of(Lanes a) {
  a += swapped<8>(a);
  a += swapped<4>(a);
  a += swapped<2>(a);
  return (a + swapped<1>(a))[0];
}

// Add rows, `stride` apart, each times its weight, to `sums`; WIDTH vectors of it at a time.
template <typename T, int WIDTH>
INLINE void add_rows(const float* weights, const T* values, int64_t stride, int64_t count, float* sums) {
  Lanes total[WIDTH];
  std::memcpy(total, sums, sizeof total);
  for (int64_t t = 0; t < count; ++t) {
#pragma GCC unroll 8
    for (int i = 0; i < WIDTH; ++i) total[i] += weights[t] * load(values + t * stride + i * kLanes);
  }
  std::memcpy(sums, total, sizeof total);
}

template <typename T>
INLINE void add_rows(const float* weights, const T* values, int64_t stride, int64_t count, float* sums, int64_t dim) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= dim; i += 4 * kLanes) add_rows<T, 4>(weights, values + i, stride, count, sums + i);
  for (; i + kLanes <= dim; i += kLanes) add_rows<T, 1>(weights, values + i, stride, count, sums + i);
  for (; i < dim; ++i) {
    for (int64_t t = 0; t < count; ++t) sums[i] += weights[t] * widen(values[t * stride + i]);
  }
}

// Let a query see `count` tokens, at most a block of them.
template <typename T>
INLINE void see_block(const float* query, const T* keys, int64_t k_stride, const T* values, int64_t v_stride,
                      const bool* visible, int64_t visible_stride, int64_t count, int64_t dim, Seen& seen) {
  alignas(64) float scores[kBlock];
  Lanes largest = Lanes{} + kNothing;
  for (int64_t t = 0; t < count; t += kLanes) {
    Lanes found = score(query, keys + t * k_stride, k_stride, count - t, dim);
    for (int64_t i = count - t; i < kLanes; ++i) found[i] = kNothing;
    if (visible != nullptr) {
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, count - t); ++i) {
        if (!visible[(t + i) * visible_stride]) found[i] = kNothing;
      }
    }
    std::memcpy(scores + t, &found, sizeof found);
    largest = larger(largest, found);
  }
  const float top = largest_of(largest);
  if (top == kNothing) return;
  seen.raise(top, dim);
  Lanes total = {};
  for (int64_t t = 0; t < count; t += kLanes) {
    for (int i = 0; i < kLanes; ++i) scores[t + i] = exp_of(scores[t + i] - seen.largest);
    // Next to nothing is not nothing.
    for (int64_t i = count - t; i < kLanes; ++i) scores[t + i] = 0;
    if (visible != nullptr) {
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, count - t); ++i) {
        if (!visible[(t + i) * visible_stride]) scores[t + i] = 0;
      }
    }
    total += load(scores + t);
  }
  seen.weight += sum_of(total);
  add_rows(scores, values, v_stride, count, seen.values, dim);
}

// Let all queries of a head of keys see the tokens from `begin` to `end`.
template <typename T>
INLINE void see(const Shape& shape, const Cache& keys, const Cache& values, const Mask& mask, const float* queries,
                int64_t b, int64_t h, int64_t begin, int64_t end, Seen* seen) {
  for (int64_t first = begin; first < end; first += kBlock) {
    const auto *k = reinterpret_cast<const T*>(keys.row(b, h, first)),
               *v = reinterpret_cast<const T*>(values.row(b, h, first));
    for (int64_t r = 0; r < shape.rows(); ++r) {
      const int64_t s = r % shape.tokens;
      // Where no mask says otherwise, what comes after the query's own token is not there for it.
      const int64_t last = mask.data == nullptr ? std::min(end, shape.start + s + 1) : end;
      if (last <= first) continue;
      const bool* visible = mask.data == nullptr ? nullptr : mask.of(b, s, first);
      see_block(queries + r * shape.dim, k, keys.token, v, values.token, visible, mask.stride,
                std::min(kBlock, last - first), shape.dim, seen[r]);
    }
  }
}

WIDEST void see(at::ScalarType dtype, const Shape& shape, const Cache& keys, const Cache& values, const Mask& mask,
                const float* queries, int64_t b, int64_t h, int64_t begin, int64_t end, Seen* seen) {
  switch (dtype) {
    case at::kHalf: return see<c10::Half>(shape, keys, values, mask, queries, b, h, begin, end, seen);
    case at::kBFloat16: return see<c10::BFloat16>(shape, keys, values, mask, queries, b, h, begin, end, seen);
    default: return see<float>(shape, keys, values, mask, queries, b, h, begin, end, seen);
  }
}

// The cosines and sines of a token, float32 [dim].
struct Angles {
  std::vector<float> cos, sin;
};

template <typename T>
INLINE void turn(const T* x, const Angles& angles, float scale, float* out, int64_t dim) {
  const auto rotary = static_cast<int64_t>(angles.cos.size()), half = rotary / 2;
  const float *cos = angles.cos.data(), *sin = angles.sin.data();
  for (int64_t i = 0; i < half; ++i) {
    const float a = widen(x[i]), b = widen(x[i + half]);
    out[i] = (a * cos[i] - b * sin[i]) * scale;
    out[i + half] = (b * cos[i + half] + a * sin[i + half]) * scale;
  }
  for (int64_t i = rotary; i < dim; ++i) out[i] = widen(x[i]) * scale;
}

// Rotate a new token's heads: queries, times `scaling`, to `queries`, keys and values to the cache.
template <typename T>
INLINE void enter(const Shape& shape, const T* row, const Angles& angles, float scaling, float* queries,
                  const Cache& keys, const Cache& values, int64_t b, int64_t s, float* scratch) {
  const int64_t dim = shape.dim;
  for (int64_t h = 0; h < shape.heads; ++h) {
    const int64_t r = h % shape.group() * shape.tokens + s;
    turn(row + h * dim, angles, scaling, queries + (h / shape.group() * shape.rows() + r) * dim, dim);
  }
  for (int64_t h = 0; h < shape.kv_heads; ++h) {
    turn(row + (shape.heads + h) * dim, angles, 1.0f, scratch, dim);
    auto* key = reinterpret_cast<T*>(keys.row(b, h, shape.start + s));
    for (int64_t i = 0; i < dim; ++i) narrow(scratch[i], key[i]);
    std::memcpy(values.row(b, h, shape.start + s), row + (shape.heads + shape.kv_heads + h) * dim, dim * sizeof(T));
  }
}

WIDEST void enter(at::ScalarType dtype, const Shape& shape, const void* row, const Angles& angles, float scaling,
                  float* queries, const Cache& keys, const Cache& values, int64_t b, int64_t s, float* scratch) {
  switch (dtype) {
    case at::kHalf:
      return enter(shape, static_cast<const c10::Half*>(row), angles, scaling, queries, keys, values, b, s, scratch);
    case at::kBFloat16:
      return enter(shape, static_cast<const c10::BFloat16*>(row), angles, scaling, queries, keys, values, b, s,
                   scratch);
    default:
      return enter(shape, static_cast<const float*>(row), angles, scaling, queries, keys, values, b, s, scratch);
  }
}

template <typename T>
INLINE void write_row(const float* values, float factor, T* out, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) narrow(values[i] * factor, out[i]);
}

void write_row(at::ScalarType dtype, const float* values, float factor, void* out, int64_t dim) {
  switch (dtype) {
    case at::kHalf: return write_row(values, factor, static_cast<c10::Half*>(out), dim);
    case at::kBFloat16: return write_row(values, factor, static_cast<c10::BFloat16*>(out), dim);
    default: return write_row(values, factor, static_cast<float*>(out), dim);
  }
}

void check_cache(const Tensor& cache, const char* name, const Tensor& like, const Shape& shape) {
  TORCH_CHECK(cache.scalar_type() == like.scalar_type(), name, ": expected ", like.scalar_type(), ", found ",
              cache.scalar_type());
  TORCH_CHECK(cache.dim() == 4 && cache.size(0) == shape.batch && cache.size(1) == shape.kv_heads &&
                  cache.size(3) == shape.dim && cache.stride(3) == 1,
              name, ": expected [", shape.batch, ", ", shape.kv_heads, ", tokens, ", shape.dim,
              "] with rows in one piece, found ", cache.sizes());
  TORCH_CHECK(shape.start >= 0 && shape.length <= cache.size(2), name, ": expected room for ", shape.length,
              " tokens, found ", cache.size(2));
}

Angles angles_of(const Tensor& cos, const Tensor& sin, int64_t b, int64_t s) {
  const int64_t dim = cos.size(2);
  Angles angles{std::vector<float>(dim), std::vector<float>(dim)};
  const int64_t at = ((cos.size(0) == 1 ? 0 : b) * cos.size(1) + s) * dim;
  std::copy_n(cos.const_data_ptr<float>() + at, dim, angles.cos.begin());
  std::copy_n(sin.const_data_ptr<float>() + at, dim, angles.sin.begin());
  return angles;
}

Tensor table_of(const Tensor& table, const char* name, const Shape& shape) {
  TORCH_CHECK(table.dim() == 3 && (table.size(0) == 1 || table.size(0) == shape.batch) &&
                  table.size(1) == shape.tokens && table.size(2) % 2 == 0 && table.size(2) <= shape.dim &&
                  at::isFloatingType(table.scalar_type()),
              name, ": expected floating [1 or ", shape.batch, ", ", shape.tokens, ", at most ", shape.dim,
              "], found ", table.scalar_type(), " ", table.sizes());
  return table.to(at::kFloat).contiguous();
}

Tensor cpu_attention(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& k_cache,
                     const Tensor& v_cache, const Tensor& length, const std::optional<Tensor>& mask, int64_t heads,
                     int64_t kv_heads, double scaling) {
  const auto dtype = qkv.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16,
              "qkv: expected float32, float16 or bfloat16, found ", dtype);
  TORCH_CHECK(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "heads: expected a multiple of ", kv_heads,
              ", found ", heads);
  const int64_t all = heads + 2 * kv_heads;
  TORCH_CHECK(qkv.dim() == 3 && qkv.size(2) % all == 0, "qkv: expected [batch, tokens, a multiple of ", all,
              "], found ", qkv.sizes());
  TORCH_CHECK(length.scalar_type() == at::kLong && length.numel() == 1, "length: expected one int64, found ",
              length.scalar_type(), " ", length.sizes());
  auto* filled = length.mutable_data_ptr<int64_t>();
  const int64_t tokens = qkv.size(1);
  const Shape shape{qkv.size(0), tokens, heads, kv_heads, qkv.size(2) / all, *filled, *filled + tokens};
  check_cache(k_cache, "k_cache", qkv, shape);
  check_cache(v_cache, "v_cache", qkv, shape);
  const Tensor cosines = table_of(cos, "cos", shape), sines = table_of(sin, "sin", shape);
  TORCH_CHECK(cosines.size(2) == sines.size(2) && cosines.size(0) == sines.size(0), "sin: expected ", cosines.sizes(),
              ", found ", sines.sizes());
  Mask visible{nullptr, 0, 0, 0};
  if (mask) {
    TORCH_CHECK(mask->scalar_type() == at::kBool && mask->dim() == 4 && mask->size(1) == 1 &&
                    (mask->size(0) == 1 || mask->size(0) == shape.batch) && mask->size(2) == tokens &&
                    mask->size(3) >= shape.length,
                "mask: expected bool [1 or ", shape.batch, ", 1, ", tokens, ", at least ", shape.length, "], found ",
                mask->scalar_type(), " ", mask->sizes());
    visible = {mask->const_data_ptr<bool>(), mask->size(0) == 1 ? 0 : mask->stride(0), mask->stride(2),
               mask->stride(3)};
  }

  Tensor out = at::empty({shape.batch, tokens, heads * shape.dim}, qkv.options());
  if (out.numel() == 0) return out;
  const Tensor given = qkv.contiguous();
  const Cache keys(k_cache), values(v_cache);
  const int64_t dim = shape.dim, pairs = shape.batch * kv_heads, rows = shape.rows();
  std::vector<float> queries(pairs * rows * dim), scratch(dim);
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t s = 0; s < tokens; ++s) {
      const auto* row = static_cast<const char*>(given.const_data_ptr()) + (b * tokens + s) * all * dim * keys.size;
      enter(dtype, shape, row, angles_of(cosines, sines, b, s), static_cast<float>(scaling),
            queries.data() + b * kv_heads * rows * dim, keys, values, b, s, scratch.data());
    }
  }

  const int64_t chunks = (shape.length + kChunk - 1) / kChunk;
  std::vector<float> sums(pairs * chunks * rows * dim, 0.0f);
  std::vector<Seen> seen(pairs * chunks * rows);
  for (size_t i = 0; i < seen.size(); ++i) seen[i].values = sums.data() + i * dim;
  const bool serial = pairs * rows * dim * shape.length < kWorthThreads;
  at::parallel_for(0, pairs * chunks, serial ? pairs * chunks : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = i / chunks, first = i % chunks * kChunk;
      see(dtype, shape, keys, values, visible, queries.data() + pair * rows * dim, pair / kv_heads, pair % kv_heads,
          first, std::min(first + kChunk, shape.length), seen.data() + i * rows);
    }
  });

  for (int64_t pair = 0; pair < pairs; ++pair) {
    for (int64_t r = 0; r < rows; ++r) {
      Seen& whole = seen[pair * chunks * rows + r];
      for (int64_t c = 1; c < chunks; ++c) {
        const Seen& more = seen[(pair * chunks + c) * rows + r];
        if (more.largest == kNothing) continue;
        whole.raise(more.largest, dim);
        const float factor = exp_of(more.largest - whole.largest);
        whole.weight += more.weight * factor;
        for (int64_t i = 0; i < dim; ++i) whole.values[i] += more.values[i] * factor;
      }
      const int64_t head = pair % kv_heads * shape.group() + r / tokens, s = r % tokens;
      auto* to = static_cast<char*>(out.mutable_data_ptr()) +
                 ((pair / kv_heads * tokens + s) * heads + head) * dim * keys.size;
      // A query that may see nothing gets nothing, as torch has it.
      write_row(dtype, whole.values, whole.weight == 0 ? 0.0f : 1.0f / whole.weight, to, dim);
    }
  }
  *filled = shape.length;
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(ropewalk, CPU, m) { m.impl("cpu_attention", &cpu_attention); }
