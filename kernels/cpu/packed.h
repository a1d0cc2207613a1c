// Packed weights and activations as the kernels read them, and the table of kernels that a processor offers.
//
// Weights lie in tiles of 32 columns and, along K, in blocks of 32 rows. Rows are sorted by group, and every group
// begins a block (cpu_layout.py), so that a block has one scale for each column. Within a block four neighbouring
// rows of a column are the four bytes of an int32, as integer dot products want them: a "quad". A block has 8 of
// them. 16 columns lie together in 64 bytes, and quads share these: for codes of b bits (2, 4 or 8)
//
//     row 4 q + i of column n  =  bits b (q % (8 / b)) of byte 4 n + i of vector q / (8 / b)
//
// 3 bits are the low two as above and a vector of high bits, bit q of each byte.
//
// Activations are integers, too: a row's 32 values of a block share a scale, and each is the sum of one, two or three
// int8 "parts", the weight of a part being 256 times that of the next. One part is what llama.cpp does; two hold 16
// bits and three hold 24, as many as a float32 has, so that the product is exact to what float32 would round anyway.
// Integer sums have no order: one row gives the same bits whatever the processor, the threads and the other rows are.

#pragma once

#include <cstdint>

namespace ropewalk {

constexpr int kColumns = 32;  // of a tile
constexpr int kBlock = 32;    // rows of a block
constexpr int kMostParts = 3;

enum class Dtype { f32, f16, bf16 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// The bytes of a block of one tile.
constexpr int64_t block_bytes(int bits) { return int64_t{kColumns} * kBlock * bits / 8; }

struct Weight {
  const uint8_t* words;   // [tiles][blocks][block_bytes(bits)]
  const void* scales;     // [tiles][groups][32], float16 or float32
  bool half_scales;
  const uint8_t* zeros;   // [tiles][groups][32], or null where all are 2^(bits - 1)
  int bits;
  int64_t columns;        // N; those that fill up the last tile are not written
  int64_t blocks;
  int64_t blocks_per_group;
  int64_t groups;
};

// Rows of x, in strips of a few rows that a kernel takes at once. The strip that begins at row s and has R rows lies
// in each array where s rows before it would end, as [blocks][R][parts]….
struct Activations {
  int8_t* values;   // 32 for each block, row and part
  float* scales;    // one for each block and row
  int32_t* sums;    // one for each block, row and part: the sum of the values times -2^shift
  int parts;
  int shift;        // bits - 1 where all zero points are 2^(bits - 1), else 0
  int64_t blocks;
};

struct Input {
  const void* x;        // rows of K values
  Dtype dtype;
  int64_t stride;       // elements from a row to the next
  int64_t in_features;  // K
  const int32_t* rows;  // [blocks * 32], the row of the checkpoint or -1 for padding; null where it is its own index
};

struct Output {
  void* y;
  Dtype dtype;
  int64_t stride;          // elements from a row to the next
  const int64_t* indices;  // row of y for each row of x, or null
  const float* bias;       // [N] or null
  int64_t origin = 0;      // the column of the product that y begins with
};

// A matrix [columns][in_features] in float16 or bfloat16.
struct DenseWeight {
  const void* weight;
  bool bf16;
  int64_t columns, in_features;
};

// What repacking takes at once: few enough columns that all rows of them fit a core's own cache, and enough
// that what lies together in a checkpoint's row is worth a new page.
constexpr int kStripe = 64;

// The bits that a code takes where it must not lie across two words (rearrange.h).
constexpr int field_bits(int bits) { return bits == 3 ? 4 : bits; }

// A layer to be repacked.
struct Layer {
  int bits;
  int64_t in_features, columns;
  int64_t blocks;
  // Which row of what is read each row of what is written is, -1 for one of zeros; as many as whole blocks
  // have. Null where all are their own.
  const int32_t* rows;
};

// What one processor level offers.
struct Kernels {
  const char* name;
  // Return how many rows the strip has that begins with `rows` rows left to do.
  int (*strip)(int64_t rows, int parts);
  // Quantize row `source` of the input into row `r` of the strip of `strip` rows that begins at row `start`.
  // `scratch` has room for blocks * 32 + K floats.
  void (*quantize)(const Input&, const Activations&, int64_t source, int64_t start, int strip, int r, float* scratch);
  // Multiply `rows` rows of activations with a tile.
  void (*multiply)(const Weight&, const Activations&, int64_t rows, int64_t tile, const Output&);
  // Multiply `rows` rows x [rows][K] with columns `begin` to `end` of a matrix, into y [rows][N].
  void (*dense)(const DenseWeight&, const float* x, int64_t rows, float* y, int64_t begin, int64_t end);
  // Turn a stripe of a checkpoint's words into those of tiles, and back. `scratch` has room for the stripe in
  // fields, rows filled up to whole blocks; it is used where there are `rows`.
  void (*repack)(const Layer&, const uint32_t* from, uint8_t* to, int64_t stripe, uint32_t* scratch);
  void (*unpack)(const Layer&, const uint8_t* from, uint32_t* to, int64_t stripe, uint32_t* scratch);
  // Write a stripe of float32 [K][N]. The layer's rows are those of the result, the weight's scales float32.
  void (*dequantize)(const Layer&, const Weight&, float* to, int64_t stripe);
};

// out = gate / (1 + e^-gate) * up for n columns, rounded once (gate.cpp).
void silu_times(const float* gate, const float* up, int64_t n, Dtype dtype, void* out);

// The levels that were compiled, best first; null where the processor lacks one.
const Kernels* avx512_vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* avx_vnni_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

}  // namespace ropewalk
