// The words of a checkpoint into those of packed.h, back, and these into numbers, for a stripe of columns.
//
// Both hold the codes of 32 rows of a column in as many words as a code has bits, so that all of this is
// arithmetic on 32-bit lanes, one for each column. On their way the codes lie as "fields": as in a
// checkpoint, but 3 bits take 4, so that no code lies across two words and any row is found by one shift.
//
// Rows change their order as fields, each block picking its rows from the whole height of the stripe. That
// height lies in scratch memory that fits a core's own cache: in the checkpoint every word of a column is on
// another page.
//
// Kernels of a level, as those of tile.h are, in plain loops that compilers turn into vectors.

namespace {

// The bits of a field; the fields of a block's 32 rows take as many words.
template <int BITS>
constexpr int kField = field_bits(BITS);

// Eight codes of 3 bits as eight fields, and back: halves move apart, then their halves, then theirs.
inline ROPEWALK_INLINE uint32_t widened_3(uint32_t codes) {
  codes = (codes & 0xFFF) | (codes & 0xFFF000) << 4;
  codes = (codes & 0x003F003F) | (codes & 0x0FC00FC0) << 2;
  return (codes & 0x07070707) | (codes & 0x38383838) << 1;
}

inline ROPEWALK_INLINE uint32_t narrowed_3(uint32_t fields) {
  fields = (fields & 0x07070707) | (fields & 0x70707070) >> 1;
  fields = (fields & 0x003F003F) | (fields & 0x3F003F00) >> 2;
  return (fields & 0xFFF) | (fields & 0x0FFF0000) >> 4;
}

// A stripe of a layer, and what of it is inside the matrix.
struct Stripe {
  Stripe(const Layer& layer, int64_t index)
      : first(index * kStripe),
        columns(layer.columns - first < kStripe ? layer.columns - first : kStripe),
        tile(first / kColumns),
        tiles(static_cast<int>((columns + kColumns - 1) / kColumns)),
        stride(layer.columns),
        tile_bytes(layer.blocks * block_bytes(layer.bits)) {}

  int64_t first, columns;
  int64_t tile;  // the first one
  int tiles;
  int64_t stride;      // words from a checkpoint's row of them to the next
  int64_t tile_bytes;  // from a tile to the next
};

// Copy `words` words of each of a stripe's columns; what is outside the matrix is zeros.
inline void copy_in(const Stripe& stripe, const uint32_t* from, int64_t words, uint32_t* to) {
  for (; words > 0; --words, from += stripe.stride, to += kStripe) {
    if (stripe.columns == kStripe) {
      std::memcpy(to, from, kStripe * sizeof *to);  // of a size that the compiler knows
    } else {
      std::memcpy(to, from, stripe.columns * sizeof *to);
      std::memset(to + stripe.columns, 0, (kStripe - stripe.columns) * sizeof *to);
    }
  }
}

inline void copy_out(const Stripe& stripe, const uint32_t* from, int64_t words, uint32_t* to) {
  for (; words > 0; --words, from += kStripe, to += stripe.stride) {
    if (stripe.columns == kStripe) {
      std::memcpy(to, from, kStripe * sizeof *to);
    } else {
      std::memcpy(to, from, stripe.columns * sizeof *to);
    }
  }
}

// `rows` rows of a checkpoint as fields, from the words of the first of them on.
template <int BITS>
void read_fields(const Stripe& stripe, const uint32_t* from, int64_t rows, uint32_t* to) {
  if constexpr (BITS != 3) {
    copy_in(stripe, from, rows * BITS / 32, to);
  } else {
    alignas(64) uint32_t words[3 * kStripe];
    for (; rows > 0; rows -= kBlock, from += 3 * stripe.stride, to += 4 * kStripe) {
      copy_in(stripe, from, 3, words);
#pragma omp simd
      for (int n = 0; n < kStripe; ++n) {
        const uint32_t a = words[n], b = words[kStripe + n], c = words[2 * kStripe + n];
        to[n] = widened_3(a);
        to[kStripe + n] = widened_3(a >> 24 | b << 8);
        to[2 * kStripe + n] = widened_3(b >> 16 | c << 16);
        to[3 * kStripe + n] = widened_3(c >> 8);
      }
    }
  }
}

template <int BITS>
void write_fields(const Stripe& stripe, const uint32_t* from, int64_t rows, uint32_t* to) {
  if constexpr (BITS != 3) {
    copy_out(stripe, from, rows * BITS / 32, to);
  } else {
    alignas(64) uint32_t words[3 * kStripe];
    for (; rows > 0; rows -= kBlock, from += 4 * kStripe, to += 3 * stripe.stride) {
#pragma omp simd
      for (int n = 0; n < kStripe; ++n) {
        const uint32_t b = narrowed_3(from[kStripe + n]), c = narrowed_3(from[2 * kStripe + n]);
        words[n] = narrowed_3(from[n]) | b << 24;
        words[kStripe + n] = b >> 8 | c << 16;
        words[2 * kStripe + n] = c >> 16 | narrowed_3(from[3 * kStripe + n]) << 8;
      }
      copy_out(stripe, words, 3, to);
    }
  }
}

// Pick the 32 rows of a block from fields of more; a row below zero is one of zeros.
template <int BITS>
void pick_rows(const uint32_t* from, const int32_t* rows, uint32_t* to) {
  constexpr int kBits = kField<BITS>, kRows = 32 / kBits;  // of a word
  constexpr uint32_t kMask = (1u << kBits) - 1;
  static const uint32_t zeros[kStripe] = {};
  for (int w = 0; w < kBits; ++w, rows += kRows, to += kStripe) {
    const uint32_t* source[kRows];
    int shift[kRows];
    for (int j = 0; j < kRows; ++j) {
      source[j] = rows[j] < 0 ? zeros : from + int64_t{rows[j]} / kRows * kStripe;
      shift[j] = rows[j] < 0 ? 0 : rows[j] % kRows * kBits;
    }
#pragma omp simd
    for (int n = 0; n < kStripe; ++n) {
      uint32_t word = 0;
      unrolled<kRows>([&](auto j) ROPEWALK_INLINE {
        word |= (source[j][n] >> shift[j] & kMask) << (j * kBits);
      });
      to[n] = word;
    }
  }
}

// Swap the bits of the mask with those `distance` further up.
template <int DISTANCE, uint32_t MASK>
inline ROPEWALK_INLINE uint32_t swapped(uint32_t word) {
  const uint32_t differ = (word ^ word >> DISTANCE) & MASK;
  return word ^ differ ^ differ << DISTANCE;
}

// A word of fields as one of a tile, and back. Field 4 q + i becomes field q of byte i: of its number in
// binary, q q i i or q i i, the digits i go up and q down. Each step swaps two digits.
template <int FIELD>
inline ROPEWALK_INLINE uint32_t tile_word(uint32_t fields) {
  if constexpr (FIELD == 2) {
    return swapped<6, 0x00CC00CC>(swapped<12, 0x0000F0F0>(fields));
  } else if constexpr (FIELD == 4) {
    return swapped<4, 0x00F000F0>(swapped<8, 0x0000FF00>(fields));
  } else {
    return fields;
  }
}

template <int FIELD>
inline ROPEWALK_INLINE uint32_t field_word(uint32_t word) {
  if constexpr (FIELD == 4) {
    return swapped<8, 0x0000FF00>(swapped<4, 0x00F000F0>(word));
  } else {
    return tile_word<FIELD>(word);
  }
}

// 3 bits: a tile word of 4-bit fields has two codes in each byte. Their low two bits are half of a word of
// low bits, their third ones a quarter of one of high bits.
inline ROPEWALK_INLINE uint32_t low_half(uint32_t word) {
  return (word & 0x03030303) | (word >> 2 & 0x0C0C0C0C);
}
inline ROPEWALK_INLINE uint32_t high_quarter(uint32_t word) {
  return (word >> 2 & 0x01010101) | (word >> 5 & 0x02020202);
}
inline ROPEWALK_INLINE uint32_t joined(uint32_t low, uint32_t high) {
  low = (low & 0x03030303) | (low & 0x0C0C0C0C) << 2;
  return low | (high & 0x01010101) << 2 | (high & 0x02020202) << 5;
}

// The fields of a block into the stripe's tiles, the first of which has the block at `to`.
template <int BITS>
void to_tiles(const Stripe& stripe, const uint32_t* from, uint8_t* to) {
  for (int half = 0; half < 2 * stripe.tiles; ++half, from += 16) {
    uint8_t* block = to + half / 2 * stripe.tile_bytes;
    auto* words = reinterpret_cast<uint32_t*>(block) + half % 2 * 16 * BITS;
    if constexpr (BITS == 3) {
#pragma omp simd
      for (int n = 0; n < 16; ++n) {
        const uint32_t a = tile_word<4>(from[n]), b = tile_word<4>(from[kStripe + n]);
        const uint32_t c = tile_word<4>(from[2 * kStripe + n]), d = tile_word<4>(from[3 * kStripe + n]);
        words[n] = low_half(a) | low_half(b) << 4;
        words[16 + n] = low_half(c) | low_half(d) << 4;
        words[32 + n] = high_quarter(a) | high_quarter(b) << 2 | high_quarter(c) << 4 | high_quarter(d) << 6;
      }
    } else {
      for (int w = 0; w < BITS; ++w) {
#pragma omp simd
        for (int n = 0; n < 16; ++n) words[16 * w + n] = tile_word<BITS>(from[w * kStripe + n]);
      }
    }
  }
}

template <int BITS>
void from_tiles(const Stripe& stripe, const uint8_t* from, uint32_t* to) {
  for (int half = 0; half < 2 * stripe.tiles; ++half, to += 16) {
    const uint8_t* block = from + half / 2 * stripe.tile_bytes;
    const auto* words = reinterpret_cast<const uint32_t*>(block) + half % 2 * 16 * BITS;
    if constexpr (BITS == 3) {
#pragma omp simd
      for (int n = 0; n < 16; ++n) {
        const uint32_t a = words[n], b = words[16 + n], high = words[32 + n];
        to[n] = field_word<4>(joined(a, high));
        to[kStripe + n] = field_word<4>(joined(a >> 4, high >> 2));
        to[2 * kStripe + n] = field_word<4>(joined(b, high >> 4));
        to[3 * kStripe + n] = field_word<4>(joined(b >> 4, high >> 6));
      }
    } else {
      for (int w = 0; w < BITS; ++w) {
#pragma omp simd
        for (int n = 0; n < 16; ++n) to[w * kStripe + n] = field_word<BITS>(words[16 * w + n]);
      }
    }
  }
}

template <int BITS>
void repack_bits(const Layer& layer, const uint32_t* from, uint8_t* to, int64_t index, uint32_t* scratch) {
  const Stripe stripe(layer, index);
  alignas(64) uint32_t fields[kField<BITS> * kStripe];
  from += stripe.first;
  to += stripe.tile * stripe.tile_bytes;
  if (layer.rows != nullptr) read_fields<BITS>(stripe, from, layer.in_features, scratch);
  for (int64_t block = 0; block < layer.blocks; ++block) {
    if (layer.rows != nullptr) {
      pick_rows<BITS>(scratch, layer.rows + block * kBlock, fields);
    } else {
      read_fields<BITS>(stripe, from + block * BITS * stripe.stride, kBlock, fields);
    }
    to_tiles<BITS>(stripe, fields, to + block * block_bytes(BITS));
  }
}

template <int BITS>
void unpack_bits(const Layer& layer, const uint8_t* from, uint32_t* to, int64_t index, uint32_t* scratch) {
  const Stripe stripe(layer, index);
  alignas(64) uint32_t fields[kField<BITS> * kStripe];
  from += stripe.tile * stripe.tile_bytes;
  to += stripe.first;
  if (layer.rows != nullptr) {
    for (int64_t block = 0; block < layer.blocks; ++block) {
      from_tiles<BITS>(stripe, from + block * block_bytes(BITS), scratch + block * kField<BITS> * kStripe);
    }
  }
  for (int64_t row = 0; row < layer.in_features; row += kBlock) {
    const int64_t block = row / kBlock, rest = layer.in_features - row;
    if (layer.rows != nullptr) {
      pick_rows<BITS>(scratch, layer.rows + row, fields);
    } else {
      from_tiles<BITS>(stripe, from + block * block_bytes(BITS), fields);
    }
    write_fields<BITS>(stripe, fields, rest < kBlock ? rest : kBlock, to + block * BITS * stripe.stride);
  }
}

template <int BITS>
void dequantize_bits(const Layer& layer, const Weight& w, float* to, int64_t index) {
  constexpr int kBits = kField<BITS>, kRows = 32 / kBits;
  constexpr uint32_t kMask = (1u << kBits) - 1;
  const Stripe stripe(layer, index);
  alignas(64) uint32_t fields[kBits * kStripe];
  alignas(64) float scales[kStripe];
  alignas(64) int32_t zeros[kStripe];
  to += stripe.first;
  for (int64_t block = 0; block < layer.blocks; ++block) {
    from_tiles<BITS>(stripe, w.words + stripe.tile * stripe.tile_bytes + block * block_bytes(BITS), fields);
    if (block % w.blocks_per_group == 0) {
      const int64_t group = block / w.blocks_per_group;
      for (int64_t n = 0; n < stripe.columns; ++n) {
        const int64_t at = ((stripe.tile + n / kColumns) * w.groups + group) * kColumns + n % kColumns;
        scales[n] = static_cast<const float*>(w.scales)[at];
        zeros[n] = w.zeros == nullptr ? 1 << (BITS - 1) : w.zeros[at];
      }
    }
    for (int r = 0; r < kBlock; ++r) {
      const int64_t row = layer.rows == nullptr ? block * kBlock + r : layer.rows[block * kBlock + r];
      if (row < 0) continue;
      const uint32_t* words = fields + r / kRows * kStripe;
      const int shift = r % kRows * kBits;
      float* out = to + row * layer.columns;
#pragma omp simd
      for (int64_t n = 0; n < stripe.columns; ++n) {
        const auto code = static_cast<int32_t>(words[n] >> shift & kMask);
        out[n] = static_cast<float>(code - zeros[n]) * scales[n];
      }
    }
  }
}

template <class F>
inline void for_bits(int bits, F&& f) {
  switch (bits) {
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    default: return f(std::integral_constant<int, 8>{});
  }
}

void repack(const Layer& layer, const uint32_t* from, uint8_t* to, int64_t stripe, uint32_t* scratch) {
  for_bits(layer.bits, [&](auto bits) { repack_bits<bits>(layer, from, to, stripe, scratch); });
}

void unpack(const Layer& layer, const uint8_t* from, uint32_t* to, int64_t stripe, uint32_t* scratch) {
  for_bits(layer.bits, [&](auto bits) { unpack_bits<bits>(layer, from, to, stripe, scratch); });
}

void dequantize(const Layer& layer, const Weight& weight, float* to, int64_t stripe) {
  for_bits(layer.bits, [&](auto bits) { dequantize_bits<bits>(layer, weight, to, stripe); });
}

}  // namespace
