// Rotary embedding on the CPU: the operators of kernels/rope/ops.py, in one pass over q and k.
//
// Each token's cosines and sines become float32 once and turn all of its heads; strides are followed, so that the
// transposed views of transformers are read and written as they lie. Products and sums are rounded one by one, as
// torch does: the results are those of kernels/rope/reference.py, bit for bit, on every processor and with any number
// of threads. What does not fit goes to the operator's form in plain torch, which also says in words what is wrong.

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "loops.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Fewer elements than this are not worth waking another thread.
constexpr int64_t kGrain = 1 << 16;

// A tensor [batch, heads, seq, dim]; strides in elements.
struct Heads {
  explicit Heads(const Tensor& x)
      : data(static_cast<char*>(x.data_ptr())),
        size(x.element_size()),
        heads(x.size(1)),
        batch_stride(x.size(0) == 1 ? 0 : x.stride(0)),
        head_stride(x.stride(1)),
        token_stride(x.stride(2)),
        stride(x.stride(3)) {}

  char* token(int64_t b, int64_t s) const { return data + (b * batch_stride + s * token_stride) * size; }

  char* data;
  int64_t size, heads, batch_stride, head_stride, token_stride, stride;
};

// Cosines or sines [1 or batch, seq, half] or [1 or batch, seq, 2, half].
struct Table {
  explicit Table(const Tensor& given) {
    const auto dtype = given.scalar_type();
    kept = dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 ? given : given.to(at::kFloat);
    batch_stride = kept.size(0) == 1 ? 0 : kept.stride(0);
    pair_stride = kept.dim() == 4 ? kept.stride(2) : 0;
  }

  // Write float32 factors of the first and the second channels of a token's pairs.
  void read(int64_t b, int64_t s, float scale, float* first, float* second) const {
    const int64_t at = b * batch_stride + s * kept.stride(1);
    switch (kept.scalar_type()) {
      case at::kHalf: return read<c10::Half>(at, scale, first, second);
      case at::kBFloat16: return read<c10::BFloat16>(at, scale, first, second);
      default: return read<float>(at, scale, first, second);
    }
  }

  template <typename T>
  void read(int64_t at, float scale, float* first, float* second) const {
    const T* row = static_cast<const T*>(kept.const_data_ptr()) + at;
    const int64_t half = kept.size(-1), stride = kept.stride(-1), pair = pair_stride;
    for (int64_t i = 0; i < half; ++i) {
      first[i] = widen(row[i * stride]) * scale;
      second[i] = widen(row[i * stride + pair]) * scale;
    }
  }

  Tensor kept;
  int64_t batch_stride, pair_stride;
};

// A token's factors: a' = a cos_a - b sin_a, b' = b cos_b + a sin_b.
struct Turn {
  const float *cos_a, *cos_b, *sin_a, *sin_b;
  int64_t half, head_dim;
  bool interleaved;
};

template <typename T, bool kInterleaved, bool kInRow>
INLINE void turn_head(const T* x, T* out, int64_t x_stride, int64_t out_stride, const Turn& turn) {
  const int64_t half = turn.half;
  const float *cos_a = turn.cos_a, *cos_b = turn.cos_b, *sin_a = turn.sin_a, *sin_b = turn.sin_b;
  if (kInRow) x_stride = out_stride = 1;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const int64_t first = kInterleaved ? 2 * i : i, second = kInterleaved ? 2 * i + 1 : i + half;
    const float a = widen(x[first * x_stride]), b = widen(x[second * x_stride]);
    narrow(a * cos_a[i] - b * sin_a[i], out[first * out_stride]);
    narrow(b * cos_b[i] + a * sin_b[i], out[second * out_stride]);
  }
  if (x == out) return;
  for (int64_t i = 2 * half; i < turn.head_dim; ++i) out[i * out_stride] = x[i * x_stride];
}

template <typename T>
INLINE void turn_heads(const Heads& x, const Heads& out, const char* from, char* to, const Turn& turn) {
  const bool in_row = x.stride == 1 && out.stride == 1;
  for (int64_t h = 0; h < x.heads; ++h) {
    const T* src = reinterpret_cast<const T*>(from) + h * x.head_stride;
    T* dst = reinterpret_cast<T*>(to) + h * out.head_stride;
    if (in_row && turn.interleaved) {
      turn_head<T, true, true>(src, dst, 1, 1, turn);
    } else if (in_row) {
      turn_head<T, false, true>(src, dst, 1, 1, turn);
    } else if (turn.interleaved) {
      turn_head<T, true, false>(src, dst, x.stride, out.stride, turn);
    } else {
      turn_head<T, false, false>(src, dst, x.stride, out.stride, turn);
    }
  }
}

// Rotate all heads of one token.
WIDEST void turn_token(at::ScalarType dtype, const Heads& x, const Heads& out, const char* from, char* to,
                       const Turn& turn) {
  switch (dtype) {
    case at::kHalf: return turn_heads<c10::Half>(x, out, from, to, turn);
    case at::kBFloat16: return turn_heads<c10::BFloat16>(x, out, from, to, turn);
    default: return turn_heads<float>(x, out, from, to, turn);
  }
}

void copy_token(const Heads& x, const Heads& out, const char* from, char* to, int64_t dim) {
  for (int64_t h = 0; h < x.heads; ++h, from += x.head_stride * x.size, to += out.head_stride * x.size) {
    if (x.stride == 1 && out.stride == 1) {
      std::memcpy(to, from, dim * x.size);
      continue;
    }
    for (int64_t i = 0; i < dim; ++i) std::memcpy(to + i * out.stride * x.size, from + i * x.stride * x.size, x.size);
  }
}

// How to rotate, as the operators are told it.
struct How {
  const OptionalTensor &inv_freq, &position_ids, &cos, &sin;
  double attention_scaling;
  bool interleaved, inverse;
};

// Where rotated keys, and values, go besides.
struct Cache {
  const Tensor &v, &k_cache, &v_cache, &slots;
};

bool is_per_token(const Tensor& x, int64_t dim, const Tensor& q) {
  return x.dim() == dim && (x.size(0) == 1 || x.size(0) == q.size(0)) && x.size(1) == q.size(2);
}

// Whether so many pairs are in a head.
bool fits_head(int64_t half, const Tensor& q) { return half >= 1 && 2 * half <= q.size(3); }

bool is_table(const Tensor& x, const Tensor& q) {
  const bool fits = is_per_token(x, 3, q) || (is_per_token(x, 4, q) && x.size(2) == 2);
  return fits && fits_head(x.size(-1), q) && at::isFloatingType(x.scalar_type());
}

// Whether these are arguments for `rotate`: it checks nothing, and must not read or write beyond an end.
bool fit(const Tensor& q, const Tensor& k, const How& how) {
  const auto dtype = q.scalar_type();
  if (dtype != at::kFloat && dtype != at::kHalf && dtype != at::kBFloat16) return false;
  if (q.dim() != 4 || k.dim() != 4 || k.scalar_type() != dtype) return false;
  if (k.size(0) != q.size(0) || k.size(2) != q.size(2) || k.size(3) != q.size(3)) return false;
  if (how.inv_freq && how.position_ids && !how.cos && !how.sin) {
    const Tensor &inv_freq = *how.inv_freq, &ids = *how.position_ids;
    return inv_freq.dim() == 1 && fits_head(inv_freq.size(0), q) && inv_freq.scalar_type() == at::kFloat &&
           inv_freq.is_contiguous() && is_per_token(ids, 2, q) && !at::isFloatingType(ids.scalar_type());
  }
  return !how.inv_freq && !how.position_ids && how.cos && how.sin && is_table(*how.cos, q) && is_table(*how.sin, q) &&
         how.sin->size(-1) == how.cos->size(-1);
}

bool is_cache(const Tensor& cache, const Tensor& x, int64_t length) {
  return cache.dim() == 4 && (cache.size(0) == 1 || cache.size(0) == x.size(0)) && cache.size(1) == x.size(1) &&
         cache.size(2) == length && cache.size(3) == x.size(3) && cache.scalar_type() == x.scalar_type();
}

bool fit(const Tensor& k, const Cache& cache) {
  const auto& [v, k_cache, v_cache, slots] = cache;
  return v.dim() == 4 && v.sizes().slice(0, 3) == k.sizes().slice(0, 3) && k_cache.dim() == 4 &&
         is_cache(k_cache, k, k_cache.size(2)) && is_cache(v_cache, v, k_cache.size(2)) &&
         slots.scalar_type() == at::kLong && is_per_token(slots, 2, k);
}

// Whether a tensor may be written over: no gradient is lost, and no two of its elements are one in memory.
bool is_writable(const Tensor& x) {
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (x.stride(i) == 0 && x.size(i) > 1) return false;
  }
  return !x.requires_grad();
}

void rotate(const Tensor& q, const Tensor& k, const Tensor& out_q, const Tensor& out_k, const How& how,
            const Cache* cache = nullptr) {
  Tensor cosines, sines;
  if (how.inv_freq) {
    const Tensor angles = how.position_ids->unsqueeze(-1).to(at::kFloat).mul(*how.inv_freq);
    cosines = angles.cos();
    sines = angles.sin();
  } else {
    cosines = *how.cos;
    sines = *how.sin;
  }
  const Table cos(cosines), sin(sines);
  const Heads q_in(q), k_in(k), q_out(out_q), k_out(out_k);
  const int64_t seq = q.size(2), head_dim = q.size(3), half = cosines.size(-1);
  const auto scale = static_cast<float>(how.attention_scaling);
  const auto dtype = q.scalar_type();

  std::optional<Heads> v, k_cache, v_cache;
  const int64_t* slots = nullptr;
  int64_t slot_batch = 0, slot_token = 0, length = 0, v_dim = 0;
  if (cache) {
    v.emplace(cache->v);
    k_cache.emplace(cache->k_cache);
    v_cache.emplace(cache->v_cache);
    slots = cache->slots.const_data_ptr<int64_t>();
    slot_batch = cache->slots.size(0) == 1 ? 0 : cache->slots.stride(0);
    slot_token = cache->slots.stride(1);
    length = cache->k_cache.size(2);
    v_dim = cache->v.size(3);
  }

  const int64_t per_token = std::max<int64_t>(1, (q_in.heads + k_in.heads) * head_dim);
  at::parallel_for(0, q.size(0) * seq, std::max<int64_t>(1, kGrain / per_token), [&](int64_t begin, int64_t end) {
    std::vector<float> factors(4 * half);
    float *cos_a = factors.data(), *cos_b = cos_a + half, *sin_a = cos_b + half, *sin_b = sin_a + half;
    const Turn turn{cos_a, cos_b, sin_a, sin_b, half, head_dim, how.interleaved};
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / seq, s = t % seq;
      cos.read(b, s, scale, cos_a, cos_b);
      // The opposite angle: of tables with entries of their own for the two channels, the transpose.
      if (how.inverse) {
        sin.read(b, s, -scale, sin_b, sin_a);
      } else {
        sin.read(b, s, scale, sin_a, sin_b);
      }
      turn_token(dtype, q_in, q_out, q_in.token(b, s), q_out.token(b, s), turn);
      turn_token(dtype, k_in, k_out, k_in.token(b, s), k_out.token(b, s), turn);
      if (!slots) continue;
      const int64_t slot = slots[b * slot_batch + s * slot_token];
      if (slot < 0 || slot >= length) continue;
      copy_token(k_out, *k_cache, k_out.token(b, s), k_cache->token(b, slot), head_dim);
      copy_token(*v, *v_cache, v->token(b, s), v_cache->token(b, slot), v_dim);
    }
  });
}

// Call an operator of plain torch that has the signature of `function`.
template <typename Result, typename... Arguments>
Result in_torch(const char* name, Result (*)(Arguments...), std::type_identity_t<Arguments>... arguments) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Result(Arguments...)>().call(arguments...);
}

using Rotated = std::tuple<Tensor, Tensor>;

Rotated rope(const Tensor& q, const Tensor& k, const OptionalTensor& inv_freq, const OptionalTensor& position_ids,
             const OptionalTensor& cos, const OptionalTensor& sin, double attention_scaling, bool interleaved,
             bool inverse) {
  const How how{inv_freq, position_ids, cos, sin, attention_scaling, interleaved, inverse};
  if (!fit(q, k, how)) {
    return in_torch("ropewalk::rope_in_torch", rope, q, k, inv_freq, position_ids, cos, sin, attention_scaling,
                    interleaved, inverse);
  }
  Rotated out{at::empty_like(q), at::empty_like(k)};
  rotate(q, k, std::get<0>(out), std::get<1>(out), how);
  return out;
}

void rope_(const Tensor& q, const Tensor& k, const OptionalTensor& inv_freq, const OptionalTensor& position_ids,
           const OptionalTensor& cos, const OptionalTensor& sin, double attention_scaling, bool interleaved) {
  const How how{inv_freq, position_ids, cos, sin, attention_scaling, interleaved, false};
  if (!fit(q, k, how) || !is_writable(q) || !is_writable(k)) {
    return in_torch("ropewalk::rope_in_torch_", rope_, q, k, inv_freq, position_ids, cos, sin, attention_scaling,
                    interleaved);
  }
  rotate(q, k, q, k, how);
}

void rope_and_cache_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                     const Tensor& slots, const OptionalTensor& inv_freq, const OptionalTensor& position_ids,
                     const OptionalTensor& cos, const OptionalTensor& sin, double attention_scaling,
                     bool interleaved) {
  const How how{inv_freq, position_ids, cos, sin, attention_scaling, interleaved, false};
  const Cache cache{v, k_cache, v_cache, slots};
  if (!fit(q, k, how) || !fit(k, cache) || !is_writable(q) || !is_writable(k) || !is_writable(k_cache) ||
      !is_writable(v_cache)) {
    return in_torch("ropewalk::rope_and_cache_in_torch_", rope_and_cache_, q, k, v, k_cache, v_cache, slots, inv_freq,
                    position_ids, cos, sin, attention_scaling, interleaved);
  }
  rotate(q, k, q, k, how, &cache);
}

}  // namespace

TORCH_LIBRARY_IMPL(ropewalk, CPU, m) {
  m.impl("rope", &rope);
  m.impl("rope_", &rope_);
  m.impl("rope_and_cache_", &rope_and_cache_);
  m.impl("rope_cpu", &rope);
}

// ropewalk::rope_cpu is for callers that need no gradient: torch's way of asking whether one is needed, in Python,
// takes longer than rotating a token.
TORCH_LIBRARY_IMPL(ropewalk, Autograd, m) { m.impl("rope_cpu", torch::CppFunction::makeFallthrough()); }
