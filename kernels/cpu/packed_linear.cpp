// ropewalk::cpu_linear, cpu_gate_up and cpu_experts, and their way into torch: arguments checked, rows quantized, tiles
// handed out to torch's threads. The schemas and what the arguments mean are in cpu_ops.py.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <optional>
#include <vector>

#include "levels.h"
#include "packed.h"

namespace ropewalk {
namespace {

using at::Tensor;

// Less than so many multiplications are done before a second thread has woken up.
constexpr int64_t kWorthThreads = 1 << 19;
// So many values of x are quantized in the time that takes.
constexpr int64_t kWorthThreadsToQuantize = 1 << 15;
// Rows at a time: their integers stay in the cache while all tiles pass.
constexpr int64_t kMostValues = 1 << 23;

Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kHalf: return Dtype::f16;
    case at::kBFloat16: return Dtype::bf16;
    default:
      TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16, found ", x.scalar_type());
  }
}

// A tensor [E, ...] of a stack, or without E that of a layer.
void check(const Tensor& tensor, const char* name, at::ScalarType dtype, const std::array<int64_t, 4>& dims, int count,
           bool stacked) {
  const at::IntArrayRef shape(dims.data() + !stacked, count - !stacked);
  TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected ", dtype, ", found ", tensor.scalar_type());
  TORCH_CHECK(tensor.sizes() == shape, name, ": expected shape ", shape, ", found ", tensor.sizes());
  TORCH_CHECK(tensor.is_contiguous(), name, ": expected contiguous, found strides ", tensor.strides());
}

// A stack of packed weights that have one shape; one of them for a linear layer.
struct Stack {
  Weight first;  // the others follow at equal distances
  const int32_t* rows;
  std::vector<float> bias;
  int64_t experts, tiles, in_features;

  Weight weight(int64_t expert) const {
    Weight w = first;
    w.words += expert * tiles * w.blocks * block_bytes(w.bits);
    const int64_t scales = expert * tiles * w.groups * kColumns;
    w.scales = static_cast<const char*>(w.scales) + scales * (w.half_scales ? 2 : 4);
    if (w.zeros != nullptr) w.zeros += scales;
    return w;
  }
};

Stack stack_of(const Tensor& words, const Tensor& scales, const std::optional<Tensor>& zeros,
               const std::optional<Tensor>& rows, const std::optional<Tensor>& bias, int64_t bits, int64_t group_size,
               int64_t in_features, int64_t out_features, bool stacked) {
  TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits: expected 2, 3, 4 or 8, found ", bits);
  TORCH_CHECK(group_size == -1 || group_size > 0, "group_size: expected -1 or more than 0, found ", group_size);
  TORCH_CHECK(words.dim() == 3 + stacked, "words: expected ", 3 + stacked, " dimensions, found ", words.dim());
  const int64_t experts = stacked ? words.size(0) : 1, blocks = words.size(1 + stacked);
  const int64_t tiles = (out_features + kColumns - 1) / kColumns;
  const bool one_group = group_size == -1 || group_size >= in_features;
  const int64_t size = one_group ? in_features : group_size;
  const int64_t blocks_per_group = (size + kBlock - 1) / kBlock;
  const int64_t groups = in_features == 0 ? 0 : (in_features + size - 1) / size;
  const int64_t last = in_features - (groups - 1) * size;
  const int64_t needed = groups == 0 ? 0 : (groups - 1) * blocks_per_group + (last + kBlock - 1) / kBlock;
  TORCH_CHECK(blocks == needed, "words: expected ", needed, " blocks for ", in_features, " rows in groups of ",
              group_size, ", found ", blocks);
  check(words, "words", at::kInt, {experts, tiles, blocks, kBlock * bits}, 4, stacked);
  const bool half = scales.scalar_type() == at::kHalf;
  check(scales, "scales", half ? at::kHalf : at::kFloat, {experts, tiles, groups, kColumns}, 4, stacked);
  if (zeros) check(*zeros, "zeros", at::kByte, {experts, tiles, groups, kColumns}, 4, stacked);
  if (rows) check(*rows, "rows", at::kInt, {experts, blocks * kBlock}, 2, stacked);
  TORCH_CHECK(rows || blocks * kBlock == in_features, "rows: expected them where groups or K are not whole blocks");
  Stack stack{};
  stack.first = {static_cast<const uint8_t*>(words.const_data_ptr()),
                 scales.const_data_ptr(),
                 half,
                 zeros ? static_cast<const uint8_t*>(zeros->const_data_ptr()) : nullptr,
                 static_cast<int>(bits),
                 out_features,
                 blocks,
                 blocks_per_group,
                 groups};
  stack.rows = rows ? static_cast<const int32_t*>(rows->const_data_ptr()) : nullptr;
  if (bias) {
    TORCH_CHECK(bias->numel() == experts * out_features, "bias: expected ", experts, " x ", out_features,
                " values, found shape ", bias->sizes());
    const Tensor floats = bias->to(at::kFloat).contiguous();
    const auto* from = static_cast<const float*>(floats.const_data_ptr());
    stack.bias.assign(from, from + floats.numel());
  }
  stack.experts = experts;
  stack.tiles = tiles;
  stack.in_features = in_features;
  return stack;
}

// Rows of x for one expert: row `sources[i]` of x gives row `targets[i]` of y; null where both are i.
struct Segment {
  int64_t expert, rows;
  const int64_t* sources;
  const int64_t* targets;
};

// A tile of gate and the same columns of up, and the gate applied to them.
void multiply_gated(const Kernels& level, const Weight& weight, const Activations& activations,
                    const Segment& segment, int64_t tile, const Output& y, std::vector<float>& scratch) {
  const int64_t size = segment.rows * kColumns, half = weight.columns / 2;
  scratch.resize(2 * size);
  for (const int64_t up : {0, 1}) {
    const int64_t first = up * half + tile * kColumns;
    const Output part{scratch.data() + up * size, Dtype::f32, kColumns, nullptr, y.bias, first};
    level.multiply(weight, activations, segment.rows, first / kColumns, part);
  }
  for (int64_t r = 0; r < segment.rows; ++r) {
    const int64_t row = segment.targets == nullptr ? r : segment.targets[r];
    const float* gate = scratch.data() + r * kColumns;
    auto* to = static_cast<char*>(y.y) + (row * y.stride + tile * kColumns) * size_of(y.dtype);
    silu_times(gate, gate + size, kColumns, y.dtype, to);
  }
}

// y = x W + bias for every segment; where W holds gate and up side by side, silu of the first half times the second.
void multiply(const Stack& stack, const std::vector<Segment>& segments, const Input& x, const Output& y, int parts,
              bool gated) {
  const Kernels& level = kernels();
  const int64_t blocks = stack.first.blocks, padded = blocks * kBlock;
  int64_t all = 0;
  for (const Segment& segment : segments) all += segment.rows;
  if (all == 0 || y.stride == 0) return;
  std::vector<int8_t> values(all * padded * parts);
  std::vector<float> scales(all * blocks);
  std::vector<int32_t> sums(all * blocks * parts);

  struct Strip {
    const Segment* segment;
    Activations activations;  // of the segment
    int64_t start;
    int rows;
  };
  std::vector<Strip> strips;
  std::vector<Activations> activations;
  int64_t before = 0;
  for (const Segment& segment : segments) {
    const Activations a{values.data() + before * padded * parts, scales.data() + before * blocks,
                        sums.data() + before * blocks * parts, parts,
                        stack.first.zeros == nullptr ? stack.first.bits - 1 : 0, blocks};
    activations.push_back(a);
    for (int64_t start = 0; start < segment.rows;) {
      const int rows = level.strip(segment.rows - start, parts);
      strips.push_back({&segment, a, start, rows});
      start += rows;
    }
    before += segment.rows;
  }

  const auto quantize = [&](int64_t from, int64_t to) {
    std::vector<float> scratch(padded + stack.in_features);
    for (int64_t i = from; i < to; ++i) {
      const Strip& strip = strips[i];
      Input input = x;
      if (stack.rows != nullptr) input.rows = stack.rows + strip.segment->expert * padded;
      for (int r = 0; r < strip.rows; ++r) {
        const int64_t row = strip.start + r;
        const int64_t source = strip.segment->sources == nullptr ? row : strip.segment->sources[row];
        level.quantize(input, strip.activations, source, strip.start, strip.rows, r, scratch.data());
      }
    }
  };
  const auto count = static_cast<int64_t>(strips.size());
  if (all * padded < kWorthThreadsToQuantize) {
    quantize(0, count);
  } else {
    at::parallel_for(0, count, 1, quantize);
  }

  // Tiles go to whoever is free: neither cores nor their loads are alike.
  const int64_t tiles = gated ? stack.tiles / 2 : stack.tiles;
  const int64_t items = tiles * static_cast<int64_t>(segments.size());
  const bool serial = all * stack.in_features * stack.first.columns < kWorthThreads;
  const int64_t workers = serial ? 1 : std::min<int64_t>(at::get_num_threads(), items);
  const int64_t chunk = std::max<int64_t>(1, items / (workers * 16));
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    std::vector<float> scratch;
    for (int64_t begin; (begin = next.fetch_add(chunk, std::memory_order_relaxed)) < items;) {
      for (int64_t item = begin; item < std::min(items, begin + chunk); ++item) {
        const int64_t s = item / tiles, tile = item % tiles;
        const Segment& segment = segments[s];
        Output out = y;
        out.indices = segment.targets;
        out.bias = stack.bias.empty() ? nullptr : stack.bias.data() + segment.expert * stack.first.columns;
        if (gated) {
          multiply_gated(level, stack.weight(segment.expert), activations[s], segment, tile, out, scratch);
        } else {
          level.multiply(stack.weight(segment.expert), activations[s], segment.rows, tile, out);
        }
      }
    }
  };
  if (workers == 1) {
    work(0, 1);
  } else {
    at::parallel_for(0, workers, 1, work);
  }
}

int parts_for(Dtype dtype, bool exact) { return !exact ? 1 : dtype == Dtype::f32 ? 3 : 2; }

// How many columns come of a product; halves that the gate can meet tile by tile.
int64_t columns_of(int64_t out_features, bool gated) {
  TORCH_CHECK(!gated || out_features % (2 * kColumns) == 0, "out_features: expected a multiple of ", 2 * kColumns,
              " for gate and up, found ", out_features);
  return gated ? out_features / 2 : out_features;
}

Tensor linear(const Tensor& x, const Tensor& words, const Tensor& scales, const std::optional<Tensor>& zeros,
              const std::optional<Tensor>& rows, const std::optional<Tensor>& bias, int64_t bits, int64_t group_size,
              int64_t out_features, bool exact, bool gated) {
  TORCH_CHECK(x.dim() >= 1, "x: expected at least 1 dimension, found none");
  const int64_t in_features = x.size(-1);
  const Stack stack =
      stack_of(words, scales, zeros, rows, bias, bits, group_size, in_features, out_features, false);
  const Dtype dtype = dtype_of(x, "x");
  c10::SmallVector<int64_t, 5> shape(x.sizes().begin(), x.sizes().end());
  const int64_t columns = columns_of(out_features, gated);
  shape.back() = columns;
  Tensor y = at::empty(shape, x.options());
  const int64_t m = in_features == 0 ? 0 : x.numel() / in_features;
  if (m == 0 || y.numel() == 0) return in_features == 0 ? y.zero_() : y;
  // One row needs no view of it.
  Tensor flat = m == 1 ? x : x.reshape({m, in_features});
  if (flat.stride(-1) != 1) flat = flat.contiguous();
  const int64_t stride = m == 1 ? in_features : flat.stride(0);
  const int parts = parts_for(dtype, exact);
  const int64_t most = std::max<int64_t>(12, kMostValues / (stack.first.blocks * kBlock * parts) / 12 * 12);
  for (int64_t start = 0; start < m; start += most) {
    const Input input{static_cast<const char*>(flat.const_data_ptr()) + start * stride * size_of(dtype), dtype,
                      stride, in_features, nullptr};
    const Output output{static_cast<char*>(y.mutable_data_ptr()) + start * columns * size_of(dtype), dtype, columns,
                        nullptr, nullptr};
    multiply(stack, {{0, std::min(most, m - start), nullptr, nullptr}}, input, output, parts, gated);
  }
  return y;
}

Tensor cpu_linear(const Tensor& x, const Tensor& words, const Tensor& scales, const std::optional<Tensor>& zeros,
                  const std::optional<Tensor>& rows, const std::optional<Tensor>& bias, int64_t bits,
                  int64_t group_size, int64_t out_features, bool exact) {
  return linear(x, words, scales, zeros, rows, bias, bits, group_size, out_features, exact, false);
}

Tensor cpu_gate_up(const Tensor& x, const Tensor& words, const Tensor& scales, const std::optional<Tensor>& zeros,
                   const std::optional<Tensor>& rows, const std::optional<Tensor>& bias, int64_t bits,
                   int64_t group_size, int64_t out_features, bool exact) {
  return linear(x, words, scales, zeros, rows, bias, bits, group_size, out_features, exact, true);
}

Tensor cpu_experts(const Tensor& x, const Tensor& words, const Tensor& scales, const std::optional<Tensor>& zeros,
                   const std::optional<Tensor>& rows, const std::optional<Tensor>& bias, const Tensor& expert_ids,
                   const std::optional<Tensor>& routing_weights, int64_t bits, int64_t group_size,
                   int64_t out_features, bool exact, bool gate_up) {
  TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "x: expected 2 or 3 dimensions, found ", x.dim());
  TORCH_CHECK(expert_ids.dim() == 2, "expert_ids: expected 2 dimensions, found ", expert_ids.dim());
  const int64_t tokens = x.size(0), top_k = expert_ids.size(1), in_features = x.size(-1);
  TORCH_CHECK(expert_ids.size(0) == tokens && (x.dim() == 2 || x.size(1) == top_k), "expert_ids: expected one for ",
              "each row of x ", x.sizes(), ", found ", expert_ids.sizes());
  if (routing_weights) {
    TORCH_CHECK(routing_weights->sizes() == expert_ids.sizes(), "routing_weights: expected ", expert_ids.sizes(),
                ", found ", routing_weights->sizes());
  }
  const Stack stack =
      stack_of(words, scales, zeros, rows, bias, bits, group_size, in_features, out_features, true);
  const Dtype dtype = dtype_of(x, "x");
  const Tensor given = x.contiguous();
  const Tensor ids = expert_ids.to(at::kLong).contiguous();
  const auto* id = static_cast<const int64_t*>(ids.const_data_ptr());

  // The rows of each expert, in the order of the tokens.
  std::vector<std::vector<int64_t>> sources(stack.experts), targets(stack.experts);
  for (int64_t i = 0; i < tokens * top_k; ++i) {
    if (id[i] < 0 || id[i] >= stack.experts) continue;
    sources[id[i]].push_back(x.dim() == 2 ? i / top_k : i);
    targets[id[i]].push_back(i);
  }
  std::vector<Segment> segments;
  for (int64_t e = 0; e < stack.experts; ++e) {
    if (!sources[e].empty()) {
      segments.push_back({e, static_cast<int64_t>(sources[e].size()), sources[e].data(), targets[e].data()});
    }
  }
  const int64_t columns = columns_of(out_features, gate_up);
  // Sums over experts are made in float32.
  Tensor each = at::zeros({tokens, top_k, columns}, routing_weights ? x.options().dtype(at::kFloat) : x.options());
  const Input input{given.const_data_ptr(), dtype, in_features, in_features, nullptr};
  const Output output{each.mutable_data_ptr(), routing_weights ? Dtype::f32 : dtype, columns, nullptr, nullptr};
  if (in_features > 0 && each.numel() > 0) multiply(stack, segments, input, output, parts_for(dtype, exact), gate_up);
  if (!routing_weights) return each;
  Tensor total = at::zeros({tokens, columns}, each.options());
  const Tensor weights = routing_weights->to(at::kFloat).contiguous();
  const auto* weight = static_cast<const float*>(weights.const_data_ptr());
  const auto* from = static_cast<const float*>(each.const_data_ptr());
  auto* to = static_cast<float*>(total.mutable_data_ptr());
  at::parallel_for(0, tokens, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t k = 0; k < top_k; ++k) {
        const int64_t i = t * top_k + k;
        if (id[i] < 0 || id[i] >= stack.experts) continue;
        for (int64_t n = 0; n < columns; ++n) to[t * columns + n] += weight[i] * from[i * columns + n];
      }
    }
  });
  return total.to(x.scalar_type());
}

std::string cpu_level() { return kernels().name; }

std::vector<std::string> cpu_levels() { return levels(); }

void cpu_cap_level(const std::string& name) { cap_level(name); }

}  // namespace

TORCH_LIBRARY_IMPL(ropewalk, CPU, m) {
  m.impl("cpu_linear", cpu_linear);
  m.impl("cpu_gate_up", cpu_gate_up);
  m.impl("cpu_experts", cpu_experts);
}

TORCH_LIBRARY_FRAGMENT(ropewalk, m) {
  m.def("cpu_level() -> str", cpu_level);
  m.def("cpu_levels() -> str[]", cpu_levels);
  m.def("cpu_cap_level(str name) -> ()", cpu_cap_level);
}

}  // namespace ropewalk
