// Packed matmul for few tokens on the tensor cores of sm_80 and later: out = x @ W for W in the execution layout
// (layout.py), where all that counts is that the weight streams in from memory.
//
// A warp takes 16 columns (TILES times) and every WARPS-th block of rows. Its next blocks, with the activations that meet
// them, are on their way into a ring of shared memory of its own (cp.async), so no other warp is waited for. The 16 bytes that a thread copies and reads
// back, words 4t to 4t+3 of column g, are its part of the left operand of mma.m16n8k16 as they stand: a word holds two
// neighbouring rows of each plane in its halves, and which row of the weight meets which row of the instruction does
// not matter as long as the activations follow, where they are the 8 neighbouring rows 8t to 8t+7 of a plane, 16 bytes
// again. Nothing is exchanged between threads until the warps' sums are added, in order, at the end.
//
// A code is or-ed into the last places of a floating-point number and becomes code - zero by one fused multiply-add,
// exactly; the sums of a group are scaled once, in float32.
//
// Compiled once for each setting, with these defined:
//   BITS 2, 3, 4 or 8; GROUP rows of a group, 0 for one group; HAS_ZEROS, HAS_ORDER 0 or 1
//   X_BF16, SCALE_BF16, BIAS_BF16 whether they are bfloat16, float16 otherwise; HAS_BIAS 0 or 1
//   TILES of 16 columns, TOKENS / 8, WARPS, STAGES of the ring
//   GATE_UP whether W holds gate and up, eight columns of each by turns (layout.interleave), and the result is
//   silu(x @ gate) * (x @ up)
// GROUP and the rows of a block divide one another; N is a multiple of 16 * TILES.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

#ifdef ROPEWALK_EMULATED  // on a CPU, for tests
#include ROPEWALK_EMULATED
#else
extern __shared__ __align__(128) char shared[];

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// Copies of which only the first `bytes` are read; the rest becomes 0.
__device__ __forceinline__ void copy16(void* to, const void* from, u32 bytes = 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void copy8(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// a * b + c for a pair of numbers
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
#if X_BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
}
__device__ __forceinline__ void mma(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if X_BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <int BF16>
__device__ __forceinline__ float to_float(u16 x) {
    if (BF16) return __int_as_float((u32)x << 16);
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
    return f;
}
template <int BF16>
__device__ __forceinline__ u16 from_float(float f) {
    u16 x;
    if (BF16)
        asm("{.reg .b32 p; cvt.rn.bf16x2.f32 p, %1, %1; cvt.u16.u32 %0, p;}" : "=h"(x) : "f"(f));
    else
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x) : "f"(f));
    return x;
}
#endif

constexpr int LOW_BITS = BITS == 3 ? 2 : BITS;
constexpr int PLANES = 16 / LOW_BITS;  // of 32 rows, in a block
constexpr int ROWS = 32 * PLANES;
constexpr int GROUPS = GROUP == 0 ? 0 : GROUP < ROWS ? ROWS / GROUP : 1;  // of which a block has rows
constexpr int SEGMENTS = GROUPS ? GROUPS : 1;
constexpr int SEGMENT = PLANES / SEGMENTS;  // planes
constexpr int COLUMNS = 16 * TILES;
constexpr int THREADS = 32 * WARPS;
// Of a stage of a ring: words, high bits of 3 bits, scales, zero points; then the rows' order, or each token's
// activations, of which 64 bytes more keep tokens out of each other's banks.
constexpr int HIGH = TILES * 1024;
constexpr int SCALES = HIGH + (BITS == 3 ? TILES * 512 : 0);
constexpr int ZEROS = SCALES + GROUPS * TILES * 32;
constexpr int ROWS_HERE = ZEROS + (HAS_ZEROS ? SEGMENTS * TILES * 16 : 0);
constexpr int TOKEN = ROWS * 2 + 64;

__device__ __forceinline__ u32 twice(u32 half) { return half << 16 | half; }

// The high bits of 3 bits that belong to a word, those of each half at its bits 2 to 9 (see HIGH_BIT in layout.py).
__device__ __forceinline__ u32 spread_high(u32 both) {
    both &= 0xFFFF;
    return both << 2 | both << 10;
}

// What is to be subtracted for a zero point, where codes stand SHIFT places up: a pair of numbers.
template <int SHIFT>
__device__ __forceinline__ u32 less(u32 zero) {
#if X_BF16
    return twice(0xC300 + zero);  // -(128 + zero), of bits that count ones
#else
    // -(1024 / 2^SHIFT + zero); the last place of 1024 / 2^SHIFT counts 2^-SHIFT
    return twice(0xE400 - (SHIFT << 10) + (zero << SHIFT));
#endif
}

// The pair of codes of plane p in a word, less the zero point; `high` are the high bits of 3 bits (spread_high).
template <int P>
__device__ __forceinline__ u32 weights(u32 word, u32 high, u32 zero) {
    constexpr u32 mask = 0x00010001u * ((1 << LOW_BITS) - 1);
#if X_BF16
    constexpr u32 one = 0x3F803F80, ones = 0x43004300;  // 128, whose last place counts ones
    u32 pair = word >> (LOW_BITS * P);
    if (BITS == 8) {  // seven places are too few
        u32 low = fma2((pair & 0x000F000F) | ones, one, 0xC300C300);
        u32 up = fma2((pair >> 4 & 0x000F000F) | ones, one, 0xC300C300);
        return fma2(up, 0x41804180, fma2(low, one, twice(from_float<1>(-(float)zero))));
    }
    pair = (pair & mask) | ones;
    if (BITS == 3) pair |= (high >> (P < 4 ? 2 * P : 2 * P - 7)) & 0x00040004;
    return fma2(pair, one, less<0>(zero));
#else
    // Ten places serve several planes before the word has to be shifted.
    constexpr int each = BITS == 2 ? 5 : BITS == 3 ? 4 : BITS == 4 ? 2 : 1;
    constexpr int moved = P / each, shift = P % each * LOW_BITS;
    u32 pair = ((word >> (moved * each * LOW_BITS)) & (mask << shift)) | 0x64006400;  // 1024 + code * 2^shift
    if (BITS == 3) pair |= (high >> moved) & (0x00040004u << shift);
    return fma2(pair, twice((15 - shift) << 10), less<shift>(zero));
#endif
}

struct Streams {
    const u16* x;
    const int* low;
    const u16* high;
    const u16* scales;
    const u8* zeros;
    const int* order;
    i64 N, stride_x;
    int n, M, K;

    __device__ int group(int block, int segment) const {
        int row = block * ROWS + segment * SEGMENT * 32;
        return GROUP == 0 ? 0 : (row < K ? row : K - 1) / (GROUP ? GROUP : 1);  // rows of padding have no group
    }
    // Bring what a block needs on its way into a stage.
    __device__ __forceinline__ void request(char* stage, int block, int lane) const {
        i64 column = block * N + n;
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) {
            copy16(stage + i * 512 + lane * 16, low + (column + 8 * i) * 16 + lane * 4);
            if (BITS == 3) copy8(stage + HIGH + i * 256 + lane * 8, high + (column + 8 * i) * 16 + lane * 4);
        }
#pragma unroll
        for (int i = 0; i < GROUPS * TILES * 8; i += 32) {
            int u = i + lane;
            if (u < GROUPS * TILES * 8)
                copy4(stage + SCALES + u * 4, scales + group(block, u / (TILES * 8)) * N + n + u % (TILES * 8) * 2);
        }
        if (HAS_ZEROS) {
#pragma unroll
            for (int i = 0; i < SEGMENTS * TILES * 4; i += 32) {
                int u = i + lane;
                if (u < SEGMENTS * TILES * 4)
                    copy4(stage + ZEROS + u * 4, zeros + group(block, u / (TILES * 4)) * N + n + u % (TILES * 4) * 4);
            }
        }
        const int first = block * ROWS;
        if (HAS_ORDER) {
            for (int u = lane; u < ROWS / 4; u += 32)
                if (first + u * 4 < K) copy16(stage + ROWS_HERE + u * 16, order + first + u * 4);
        } else {
            for (int u = lane; u < M * (ROWS / 8); u += 32) {
                int m = u / (ROWS / 8), k = u % (ROWS / 8) * 8;
                bool here = first + k < K;
                copy16(stage + ROWS_HERE + m * TOKEN + k * 2, here ? x + m * stride_x + first + k : x, here ? 16 : 0);
            }
        }
    }
};

template <int P>
__device__ __forceinline__ void plane(float (*sums)[TOKENS][4], const uint4* words, const uint2* high, const u32* zero,
                                      const char* rows, int M, int lane) {
    uint4 b[TOKENS];
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
        int token = 8 * i + lane / 4;
        b[i] = token < M ? *(const uint4*)(rows + token * TOKEN + 64 * P + lane % 4 * 16) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        const uint4 v = words[2 * j], w = words[2 * j + 1];
        const uint2 g = high[2 * j], h = high[2 * j + 1];
        const u32 y = zero[2 * j], z = zero[2 * j + 1];
        // 16 high bits for each of four words.
        u32 a0 = weights<P>(v.x, spread_high(g.x), y), a1 = weights<P>(w.x, spread_high(h.x), z);
        u32 a2 = weights<P>(v.y, spread_high(g.x >> 16), y), a3 = weights<P>(w.y, spread_high(h.x >> 16), z);
#pragma unroll
        for (int i = 0; i < TOKENS; i++) mma(sums[j][i], a0, a1, a2, a3, b[i].x, b[i].y);
        a0 = weights<P>(v.z, spread_high(g.y), y), a1 = weights<P>(w.z, spread_high(h.y), z);
        a2 = weights<P>(v.w, spread_high(g.y >> 16), y), a3 = weights<P>(w.w, spread_high(h.y >> 16), z);
#pragma unroll
        for (int i = 0; i < TOKENS; i++) mma(sums[j][i], a0, a1, a2, a3, b[i].z, b[i].w);
    }
}

template <int P, int LAST>
__device__ __forceinline__ void planes(float (*sums)[TOKENS][4], const uint4* words, const uint2* high, const u32* zero,
                                       const char* rows, int M, int lane) {
    plane<P>(sums, words, high, zero, rows, M, lane);
    if constexpr (P + 1 < LAST) planes<P + 1, LAST>(sums, words, high, zero, rows, M, lane);
}

// The planes of a block, group by group from S on.
template <int S>
__device__ __forceinline__ void segments(float (*total)[TOKENS][4], const uint4* words, const uint2* high,
                                         const char* stage, const char* rows, int M, int lane) {
    u32 zero[2 * TILES];
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++)
        zero[i] = HAS_ZEROS ? ((const u8*)(stage + ZEROS))[S * COLUMNS + 8 * i + lane / 4] : 1 << (BITS - 1);
    if constexpr (GROUP == 0) {
        planes<0, PLANES>(total, words, high, zero, rows, M, lane);
    } else {
        float sums[TILES][TOKENS][4] = {};
        planes<S * SEGMENT, (S + 1) * SEGMENT>(sums, words, high, zero, rows, M, lane);
        const u16* scales = (const u16*)(stage + SCALES) + S * COLUMNS;
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            const float upper = to_float<SCALE_BF16>(scales[16 * j + lane / 4]);
            const float lower = to_float<SCALE_BF16>(scales[16 * j + lane / 4 + 8]);
#pragma unroll
            for (int i = 0; i < TOKENS; i++)
#pragma unroll
                for (int c = 0; c < 4; c++) total[j][i][c] += sums[j][i][c] * (c < 2 ? upper : lower);
        }
        if constexpr (S + 1 < SEGMENTS) segments<S + 1>(total, words, high, stage, rows, M, lane);
    }
}

// Add what the warps have of a sum, in their order.
__device__ __forceinline__ float added(const float* sums, const u16* scales, int column) {
    float sum = 0;
    for (int w = 0; w < WARPS; w++) sum += sums[w * 8 * TOKENS * COLUMNS];
    return GROUP == 0 ? sum * to_float<SCALE_BF16>(scales[column]) : sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    few_tokens(const u16* x, const int* low, const u16* high, const u16* scales, const u8* zeros, const int* order,
               const u16* bias, void* out, int M, int N, int K, i64 stride_x, int each) {
    // Grid (N / COLUMNS, parts): part p has the blocks from p * each on. With one part out is [M, N] in x's dtype,
    // otherwise float32 [parts, M, N] without bias.
    // With GATE_UP the one part is [M, N / 2].
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int blocks = (K + ROWS - 1) / ROWS, first = blockIdx.y * each, last = min(first + each, blocks);
    const int size = ROWS_HERE + (HAS_ORDER ? ROWS * 4 : M * TOKEN);  // of a stage
    const Streams streams = {x, low, high, scales, zeros, order, N, stride_x, (int)blockIdx.x * COLUMNS, M, K};
    char* ring = shared + warp * STAGES * size;

    // With an order the activations are picked from shared memory: each on its own would be a transaction.
    u16* whole = (u16*)(shared + WARPS * STAGES * size);
    char* sorted = (char*)(whole + M * K) + warp * M * TOKEN;
    if (HAS_ORDER)
        for (int m = 0; m < M; m++)
            for (int k = threadIdx.x * 8; k < K; k += THREADS * 8) copy16(whole + m * K + k, x + m * stride_x + k);
    int next = first + warp;
    for (int s = 0; s < STAGES - 1; s++, next += WARPS) {
        if (next < last) streams.request(ring + s * size, next, lane);
        commit();
    }
    if (HAS_ORDER) {
        wait<STAGES - 2>();
        __syncthreads();
    }

    float total[TILES][TOKENS][4] = {};
    int slot = 0;
    for (int block = first + warp; block < last; block += WARPS, next += WARPS) {
        wait<STAGES - 2>();
        __syncwarp();
        // Into the stage that was read last time, by all lanes.
        if (next < last) streams.request(ring + (slot ? slot - 1 : STAGES - 1) * size, next, lane);
        commit();
        const char* stage = ring + slot * size;
        slot = slot + 1 < STAGES ? slot + 1 : 0;
        uint4 words[2 * TILES];
        uint2 more[2 * TILES] = {};
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) {
            words[i] = *(const uint4*)(stage + i * 512 + lane * 16);
            if (BITS == 3) more[i] = *(const uint2*)(stage + HIGH + i * 256 + lane * 8);
        }
        const char* rows = stage + ROWS_HERE;
        if (HAS_ORDER) {
#pragma unroll
            for (int k = lane * 2; k < ROWS; k += 64) {
                const int2 from = *(const int2*)(rows + k * 4);
                const bool here = block * ROWS + k < K;
                for (int m = 0; m < M; m++) {
                    const u16* token = whole + m * K;
                    *(u32*)(sorted + m * TOKEN + k * 2) = here ? token[from.x] | (u32)token[from.y] << 16 : 0;
                }
            }
            __syncwarp();
            rows = sorted;
        }
        segments<0>(total, words, more, stage, rows, M, lane);
    }

    // The warps' sums, added in the order of the warps.
    wait<0>();
    __syncthreads();
    float* sums = (float*)shared;
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < TOKENS; i++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int token = 8 * i + lane % 4 * 2 + c % 2, column = 16 * j + lane / 4 + c / 2 * 8;
                sums[(warp * 8 * TOKENS + token) * COLUMNS + column] = total[j][i][c];
            }
    __syncthreads();
    if (GATE_UP && gridDim.y == 1) {
        for (int i = threadIdx.x; i < M * COLUMNS / 2; i += THREADS) {
            const int kept = i % (COLUMNS / 2), m = i / (COLUMNS / 2), column = kept / 8 * 8 + kept;
            const int n = blockIdx.x * COLUMNS + column;
            float gate = added(sums + m * COLUMNS + column, scales, n);
            float up = added(sums + m * COLUMNS + column + 8, scales, n + 8);
            if (HAS_BIAS) gate += to_float<BIAS_BF16>(bias[n]), up += to_float<BIAS_BF16>(bias[n + 8]);
            const float result = gate / (1 + expf(-gate)) * up;
            ((u16*)out)[(i64)m * (N / 2) + blockIdx.x * (COLUMNS / 2) + kept] = from_float<X_BF16>(result);
        }
        return;
    }
    for (int i = threadIdx.x; i < M * COLUMNS; i += THREADS) {
        const int n = blockIdx.x * COLUMNS + i % COLUMNS, m = i / COLUMNS;
        float sum = added(sums + i, scales, n);
        if (gridDim.y > 1) {
            ((float*)out)[((i64)blockIdx.y * M + m) * N + n] = sum;
        } else {
            if (HAS_BIAS) sum += to_float<BIAS_BF16>(bias[n]);
            ((u16*)out)[(i64)m * N + n] = from_float<X_BF16>(sum);
        }
    }
}
