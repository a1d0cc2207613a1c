// ropewalk::cpu_repack, cpu_unpack and cpu_dequantize: the words of a checkpoint into those of cpu_layout.py, back, and
// these into numbers.
//
// Both layouts hold their codes as a stream of bits along K, a checkpoint's 32 / b codes to a word and for 3 bits 32
// codes to three words, so that a column's code is found by shifting, whatever its row.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "packed.h"

namespace ropewalk {
namespace {

using at::Tensor;

// Where in a block's 16 columns a code's bits lie.
struct Place {
  int byte;   // of the low bits in the block, for column 0; column n has it 4 n further on
  int shift;
  int high_byte, high_shift;  // of the third bit of three
};

template <int BITS>
constexpr Place place_of(int row) {
  const int quad = row / 4, i = row % 4;
  if constexpr (BITS == 3) {
    return {64 * (quad / 4) + i, 2 * (quad % 4), 128 + i, quad};
  } else {
    constexpr int kPerByte = 8 / BITS;
    return {64 * (quad / kPerByte) + i, BITS * (quad % kPerByte), 0, 0};
  }
}

// codes[n] of row `row` of a checkpoint for `columns` columns from `words` on, each word row `stride` words long.
template <int BITS>
void read_row(const uint32_t* words, int64_t stride, int64_t row, int64_t columns, uint8_t* codes) {
  constexpr uint32_t kMask = (1u << BITS) - 1;
  const int64_t bit = row * BITS;
  const uint32_t* low = words + bit / 32 * stride;
  const int shift = static_cast<int>(bit % 32);
  if (BITS == 3 && shift > 29) {
    const uint32_t* high = low + stride;
    for (int64_t n = 0; n < columns; ++n) codes[n] = (low[n] >> shift | high[n] << (32 - shift)) & kMask;
  } else {
    for (int64_t n = 0; n < columns; ++n) codes[n] = low[n] >> shift & kMask;
  }
}

template <int BITS>
void write_row(uint32_t* words, int64_t stride, int64_t row, int64_t columns, const uint8_t* codes) {
  const int64_t bit = row * BITS;
  uint32_t* low = words + bit / 32 * stride;
  const int shift = static_cast<int>(bit % 32);
  for (int64_t n = 0; n < columns; ++n) low[n] |= uint32_t{codes[n]} << shift;
  if (BITS == 3 && shift > 29) {
    for (int64_t n = 0; n < columns; ++n) low[stride + n] |= uint32_t{codes[n]} >> (32 - shift);
  }
}

template <int BITS>
void repack(const uint32_t* from, uint8_t* to, const int32_t* rows, int64_t columns, int64_t blocks, int64_t tile) {
  const int64_t first = tile * kColumns, here = std::min<int64_t>(kColumns, columns - first);
  for (int64_t block = 0; block < blocks; ++block, to += block_bytes(BITS)) {
    std::memset(to, 0, block_bytes(BITS));
    for (int r = 0; r < kBlock; ++r) {
      const int64_t row = rows == nullptr ? block * kBlock + r : rows[block * kBlock + r];
      if (row < 0) continue;
      uint8_t codes[kColumns] = {};
      read_row<BITS>(from + first, columns, row, here, codes);
      const Place at = place_of<BITS>(r);
      for (int n = 0; n < kColumns; ++n) {
        uint8_t* vector = to + n / 16 * (64 * BITS) + n % 16 * 4;
        if constexpr (BITS == 3) {
          vector[at.byte] |= static_cast<uint8_t>((codes[n] & 3) << at.shift);
          vector[at.high_byte] |= static_cast<uint8_t>(codes[n] >> 2 << at.high_shift);
        } else {
          vector[at.byte] |= static_cast<uint8_t>(codes[n] << at.shift);
        }
      }
    }
  }
}

// The codes of row `row` of a block's 32 columns.
template <int BITS>
void codes_of(const uint8_t* block, int row, uint8_t* codes) {
  const Place at = place_of<BITS>(row);
  for (int n = 0; n < kColumns; ++n) {
    const uint8_t* vector = block + n / 16 * (64 * BITS) + n % 16 * 4;
    if constexpr (BITS == 3) {
      codes[n] = (vector[at.byte] >> at.shift & 3) | (vector[at.high_byte] >> at.high_shift & 1) << 2;
    } else {
      codes[n] = vector[at.byte] >> at.shift & ((1 << BITS) - 1);
    }
  }
}

template <int BITS>
void unpack(const uint8_t* from, uint32_t* to, const int32_t* rows, int64_t columns, int64_t blocks, int64_t tile) {
  const int64_t first = tile * kColumns, here = std::min<int64_t>(kColumns, columns - first);
  for (int64_t block = 0; block < blocks; ++block, from += block_bytes(BITS)) {
    for (int r = 0; r < kBlock; ++r) {
      const int64_t row = rows == nullptr ? block * kBlock + r : rows[block * kBlock + r];
      if (row < 0) continue;
      uint8_t codes[kColumns];
      codes_of<BITS>(from, r, codes);
      write_row<BITS>(to + first, columns, row, here, codes);
    }
  }
}

template <int BITS>
void dequantize(const uint8_t* from, const float* scales, const uint8_t* zeros, float* to, const int32_t* rows,
                int64_t columns, int64_t blocks, int64_t blocks_per_group, int64_t tile) {
  const int64_t first = tile * kColumns, here = std::min<int64_t>(kColumns, columns - first);
  for (int64_t block = 0; block < blocks; ++block, from += block_bytes(BITS)) {
    const int64_t group = block / blocks_per_group * kColumns;
    for (int r = 0; r < kBlock; ++r) {
      const int64_t row = rows == nullptr ? block * kBlock + r : rows[block * kBlock + r];
      if (row < 0) continue;
      uint8_t codes[kColumns];
      codes_of<BITS>(from, r, codes);
      for (int n = 0; n < here; ++n) {
        const int zero = zeros == nullptr ? 1 << (BITS - 1) : zeros[group + n];
        to[row * columns + first + n] = static_cast<float>(codes[n] - zero) * scales[group + n];
      }
    }
  }
}

template <class F>
void for_bits(int64_t bits, F&& f) {
  switch (bits) {
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 8: return f(std::integral_constant<int, 8>{});
    default: TORCH_CHECK(false, "bits: expected 2, 3, 4 or 8, found ", bits);
  }
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

// Ask for large pages for memory that nothing has been written to yet: a token reads all weights once, and finds few
// of their pages in the translation buffer. It is a request only; what fails is as it was.
void ask_for_large_pages(const Tensor& tensor) {
#if defined(__linux__)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) + tensor.nbytes()) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

Tensor cpu_repack(const Tensor& qweight, const std::optional<Tensor>& rows, int64_t bits, int64_t blocks) {
  TORCH_CHECK(qweight.dim() == 2 && qweight.scalar_type() == at::kInt && qweight.is_contiguous(),
              "qweight: expected contiguous int32 of 2 dimensions, found ", qweight.scalar_type(), " ",
              qweight.sizes());
  const int64_t columns = qweight.size(1), tiles = (columns + kColumns - 1) / kColumns;
  Tensor words = at::empty({tiles, blocks, kBlock * bits}, qweight.options());
  ask_for_large_pages(words);
  for_bits(bits, [&](auto b) {
    const int32_t* order = checked_rows(rows, blocks, qweight.size(0) * 32 / b);
    const auto* from = static_cast<const uint32_t*>(qweight.const_data_ptr());
    auto* to = static_cast<uint8_t*>(words.mutable_data_ptr());
    at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        repack<b>(from, to + t * blocks * block_bytes(b), order, columns, blocks, t);
      }
    });
  });
  return words;
}

Tensor cpu_unpack(const Tensor& words, const std::optional<Tensor>& rows, int64_t bits, int64_t in_features,
                  int64_t out_features) {
  const int64_t tiles = (out_features + kColumns - 1) / kColumns;
  TORCH_CHECK(words.dim() == 3 && words.scalar_type() == at::kInt && words.is_contiguous() && words.size(0) == tiles &&
                  words.size(2) == kBlock * bits,
              "words: expected contiguous int32 [", tiles, ", blocks, ", kBlock * bits, "], found ",
              words.scalar_type(), " ", words.sizes());
  const int64_t blocks = words.size(1);
  Tensor qweight = at::zeros({in_features * bits / 32, out_features}, words.options());
  for_bits(bits, [&](auto b) {
    const int32_t* order = checked_rows(rows, blocks, in_features);
    const auto* from = static_cast<const uint8_t*>(words.const_data_ptr());
    auto* to = static_cast<uint32_t*>(qweight.mutable_data_ptr());
    at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        unpack<b>(from + t * blocks * block_bytes(b), to, order, out_features, blocks, t);
      }
    });
  });
  return qweight;
}

Tensor cpu_dequantize(const Tensor& words, const Tensor& scales, const std::optional<Tensor>& zeros,
                      const std::optional<Tensor>& rows, int64_t bits, int64_t group_size, int64_t in_features,
                      int64_t out_features) {
  const int64_t tiles = (out_features + kColumns - 1) / kColumns;
  TORCH_CHECK(words.dim() == 3 && words.scalar_type() == at::kInt && words.is_contiguous() && words.size(0) == tiles &&
                  words.size(2) == kBlock * bits,
              "words: expected contiguous int32 [", tiles, ", blocks, ", kBlock * bits, "], found ",
              words.scalar_type(), " ", words.sizes());
  const int64_t blocks = words.size(1);
  const bool one_group = group_size == -1 || group_size >= in_features;
  const int64_t blocks_per_group = ((one_group ? in_features : group_size) + kBlock - 1) / kBlock;
  const int64_t groups = (blocks + blocks_per_group - 1) / blocks_per_group;
  TORCH_CHECK(scales.is_floating_point() && scales.sizes() == at::IntArrayRef({tiles, groups, kColumns}),
              "scales: expected [", tiles, ", ", groups, ", 32], found ", scales.sizes());
  TORCH_CHECK(!zeros || (zeros->scalar_type() == at::kByte && zeros->is_contiguous() &&
                         zeros->sizes() == scales.sizes()),
              "zeros: expected contiguous uint8 like scales");
  const Tensor floats = scales.to(at::kFloat).contiguous();
  Tensor weight = at::empty({in_features, out_features}, floats.options());
  for_bits(bits, [&](auto b) {
    const int32_t* order = checked_rows(rows, blocks, in_features);
    const auto* from = static_cast<const uint8_t*>(words.const_data_ptr());
    const auto* scale = static_cast<const float*>(floats.const_data_ptr());
    const auto* zero = zeros ? static_cast<const uint8_t*>(zeros->const_data_ptr()) : nullptr;
    auto* to = static_cast<float*>(weight.mutable_data_ptr());
    at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t at = t * groups * kColumns;
        dequantize<b>(from + t * blocks * block_bytes(b), scale + at, zero == nullptr ? nullptr : zero + at, to, order,
                      out_features, blocks, blocks_per_group, t);
      }
    });
  });
  return weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(ropewalk, CPU, m) {
  m.impl("cpu_repack", cpu_repack);
  m.impl("cpu_unpack", cpu_unpack);
  m.impl("cpu_dequantize", cpu_dequantize);
}

}  // namespace ropewalk
