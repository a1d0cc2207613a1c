// ropewalk::cpu_repack, cpu_unpack and cpu_dequantize: the words of a checkpoint into those of cpu_layout.py,
// back, and these into numbers.
//
// A level's kernels do the work (rearrange.h); here is what is around it.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "levels.h"
#include "packed.h"

namespace ropewalk {
namespace {

using at::Tensor;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_bits(int64_t bits) {
  TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits: expected 2, 3, 4 or 8, found ", bits);
}

void check_words(const Tensor& words, int64_t bits, int64_t out_features) {
  const int64_t tiles = ceil_div(out_features, kColumns);
  TORCH_CHECK(words.dim() == 3 && words.scalar_type() == at::kInt && words.is_contiguous() &&
                  words.size(0) == tiles && words.size(2) == kBlock * bits,
              "words: expected contiguous int32 [", tiles, ", blocks, ", kBlock * bits, "], found ",
              words.scalar_type(), " ", words.sizes());
}

const int32_t* checked_rows(const std::optional<Tensor>& rows, int64_t blocks, int64_t in_features) {
  if (!rows) {
    TORCH_CHECK(in_features == blocks * kBlock, "rows: expected them where K is not whole blocks");
    return nullptr;
  }
  TORCH_CHECK(rows->scalar_type() == at::kInt && rows->is_contiguous() && rows->numel() == blocks * kBlock,
              "rows: expected ", blocks * kBlock, " int32, found ", rows->scalar_type(), " ", rows->sizes());
  const auto* data = static_cast<const int32_t*>(rows->const_data_ptr());
  for (int64_t i = 0; i < rows->numel(); ++i) {
    TORCH_CHECK(data[i] < in_features, "rows: expected less than ", in_features, ", found ", data[i]);
  }
  return data;
}

// Ask for large pages for memory that nothing has been written to yet: to be given it in small ones takes
// longer than to fill it, and a token reads all weights once and finds few of their pages in the translation
// buffer. It is a request only; what fails is as it was.
void ask_for_large_pages(const Tensor& tensor) {
#if defined(__linux__)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) + tensor.nbytes()) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// How many words a stripe takes as fields, read or written.
int64_t fields_room(const Layer& layer) {
  const int64_t blocks = std::max(layer.blocks, ceil_div(layer.in_features, kBlock));
  return layer.rows == nullptr ? 0 : blocks * field_bits(layer.bits) * kStripe;
}

// Call f(stripe, scratch) for every stripe of a layer, with scratch memory of `room` words.
template <class F>
void for_stripes(const Layer& layer, int64_t room, const F& f) {
  at::parallel_for(0, ceil_div(layer.columns, kStripe), 1, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> scratch(room);
    for (int64_t stripe = begin; stripe < end; ++stripe) f(stripe, scratch.data());
  });
}

void cpu_repack_into(const Tensor& words, const Tensor& qweight, const std::optional<Tensor>& rows, int64_t bits) {
  check_bits(bits);
  TORCH_CHECK(qweight.dim() == 2 && qweight.scalar_type() == at::kInt && qweight.is_contiguous(),
              "qweight: expected contiguous int32 of 2 dimensions, found ", qweight.scalar_type(), " ",
              qweight.sizes());
  TORCH_CHECK(bits != 3 || qweight.size(0) % 3 == 0, "qweight: expected 3-bit words in threes, found ",
              qweight.size(0));
  const int64_t in_features = qweight.size(0) * 32 / bits, columns = qweight.size(1);
  check_words(words, bits, columns);
  const int64_t blocks = words.size(1);
  const int32_t* order = checked_rows(rows, blocks, in_features);
  const Layer layer{static_cast<int>(bits), in_features, columns, blocks, order};
  const auto* from = static_cast<const uint32_t*>(qweight.const_data_ptr());
  auto* to = static_cast<uint8_t*>(words.mutable_data_ptr());
  const Kernels& chosen = kernels();
  for_stripes(layer, fields_room(layer), [&](int64_t stripe, uint32_t* scratch) {
    chosen.repack(layer, from, to, stripe, scratch);
  });
}

Tensor cpu_repack(const Tensor& qweight, const std::optional<Tensor>& rows, int64_t bits, int64_t blocks) {
  check_bits(bits);
  const int64_t columns = qweight.dim() == 2 ? qweight.size(1) : 0;
  Tensor words =
      at::empty({ceil_div(columns, kColumns), blocks, kBlock * bits}, qweight.options().dtype(at::kInt));
  ask_for_large_pages(words);
  cpu_repack_into(words, qweight, rows, bits);
  return words;
}

Tensor cpu_unpack(const Tensor& words, const std::optional<Tensor>& rows, int64_t bits, int64_t in_features,
                  int64_t out_features) {
  check_bits(bits);
  check_words(words, bits, out_features);
  const int64_t multiple = bits == 3 ? 32 : 32 / bits;  // so that codes fill whole words, or threes of them
  TORCH_CHECK(in_features >= 0 && in_features % multiple == 0, "in_features: expected a multiple of ",
              multiple, " for ", bits, " bits, found ", in_features);
  const int64_t blocks = words.size(1);
  const int32_t* order = checked_rows(rows, blocks, in_features);
  std::vector<int32_t> places;  // of the checkpoint's rows in the blocks
  if (order != nullptr) {
    places.assign(ceil_div(in_features, kBlock) * kBlock, -1);
    for (int64_t i = 0; i < blocks * kBlock; ++i) {
      if (order[i] >= 0) places[order[i]] = static_cast<int32_t>(i);
    }
  }
  const Layer layer{static_cast<int>(bits), in_features, out_features, blocks,
                    order == nullptr ? nullptr : places.data()};
  Tensor qweight = at::empty({in_features * bits / 32, out_features}, words.options());
  ask_for_large_pages(qweight);
  const auto* from = static_cast<const uint8_t*>(words.const_data_ptr());
  auto* to = static_cast<uint32_t*>(qweight.mutable_data_ptr());
  const Kernels& chosen = kernels();
  for_stripes(layer, fields_room(layer), [&](int64_t stripe, uint32_t* scratch) {
    chosen.unpack(layer, from, to, stripe, scratch);
  });
  return qweight;
}

Tensor cpu_dequantize(const Tensor& words, const Tensor& scales, const std::optional<Tensor>& zeros,
                      const std::optional<Tensor>& rows, int64_t bits, int64_t group_size,
                      int64_t in_features, int64_t out_features) {
  check_bits(bits);
  check_words(words, bits, out_features);
  const int64_t tiles = words.size(0), blocks = words.size(1);
  TORCH_CHECK(in_features > 0, "in_features: expected more than 0, found ", in_features);
  TORCH_CHECK(group_size == -1 || group_size > 0, "group_size: expected -1 or more than 0, found ",
              group_size);
  const bool one_group = group_size == -1 || group_size >= in_features;
  const int64_t blocks_per_group = ceil_div(one_group ? in_features : group_size, kBlock);
  const int64_t groups = ceil_div(blocks, blocks_per_group);
  TORCH_CHECK(scales.is_floating_point() && scales.sizes() == at::IntArrayRef({tiles, groups, kColumns}),
              "scales: expected [", tiles, ", ", groups, ", 32], found ", scales.sizes());
  TORCH_CHECK(!zeros || (zeros->scalar_type() == at::kByte && zeros->is_contiguous() &&
                         zeros->sizes() == scales.sizes()),
              "zeros: expected contiguous uint8 like scales");
  const int32_t* order = checked_rows(rows, blocks, in_features);
  const Layer layer{static_cast<int>(bits), in_features, out_features, blocks, order};
  const Tensor floats = scales.to(at::kFloat).contiguous();
  const Weight weight{static_cast<const uint8_t*>(words.const_data_ptr()),
                      floats.const_data_ptr(),
                      false,
                      zeros ? static_cast<const uint8_t*>(zeros->const_data_ptr()) : nullptr,
                      layer.bits,
                      out_features,
                      blocks,
                      blocks_per_group,
                      groups};
  Tensor dense = at::empty({in_features, out_features}, floats.options());
  ask_for_large_pages(dense);
  auto* to = static_cast<float*>(dense.mutable_data_ptr());
  const Kernels& chosen = kernels();
  for_stripes(layer, 0, [&](int64_t stripe, uint32_t*) { chosen.dequantize(layer, weight, to, stripe); });
  return dense;
}

}  // namespace

TORCH_LIBRARY_IMPL(ropewalk, CPU, m) {
  m.impl("cpu_repack", cpu_repack);
  m.impl("cpu_repack_into", cpu_repack_into);
  m.impl("cpu_unpack", cpu_unpack);
  m.impl("cpu_dequantize", cpu_dequantize);
}

}  // namespace ropewalk
