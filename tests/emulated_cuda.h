// CUDA on a CPU, as far as kernels/gptq/few_tokens.cu asks for it: a thread for each thread of a block, and barriers. An
// asynchronous copy happens when it is waited for, and not before, so that a kernel that reads too early reads poison.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index { int x = 0, y = 0; };
struct uint4 { u32 x, y, z, w; };
struct uint2 { u32 x, y; };
struct int2 { int x, y; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
using std::min;

static thread_local Index threadIdx;
static Index blockIdx, gridDim;
static char* shared;
static std::unique_ptr<std::barrier<>> block_barrier;
static std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
struct Operands { u32 a[32][4], b[32][2]; };
static std::vector<Operands> operands;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }
inline void __syncwarp() { warp_barriers[threadIdx.x / 32]->arrive_and_wait(); }

struct Copy { void* to; const void* from; int bytes, read; };
static thread_local std::vector<Copy> requested;
static thread_local std::deque<std::vector<Copy>> groups;

inline void request(void* to, const void* from, int bytes, int read) {
    if ((size_t)to % bytes || (size_t)from % bytes) abort();
    memset(to, 0xFF, bytes);  // whatever is read before the wait is not a number
    requested.push_back({to, from, bytes, read});
}
inline void copy16(void* to, const void* from, u32 read = 16) { request(to, from, 16, read); }
inline void copy8(void* to, const void* from) { request(to, from, 8, 8); }
inline void copy4(void* to, const void* from) { request(to, from, 4, 4); }
inline void commit() {
    groups.push_back(requested);
    requested.clear();
}
template <int PENDING>
inline void wait() {
    for (; groups.size() > PENDING; groups.pop_front())
        for (const Copy& copy : groups.front()) {
            memset(copy.to, 0, copy.bytes);
            memcpy(copy.to, copy.from, copy.read);
        }
}

template <int BF16>
inline float to_float(u16 x) {
    if (BF16) {
        u32 bits = (u32)x << 16;
        float f;
        memcpy(&f, &bits, 4);
        return f;
    }
    _Float16 h;
    memcpy(&h, &x, 2);
    return h;
}
template <int BF16>
inline u16 from_float(double exact) {
    if (BF16) {  // the sums that are rounded here fit into a float
        float f = (float)exact;
        u32 bits;
        memcpy(&bits, &f, 4);
        return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    }
    _Float16 h = (_Float16)exact;
    u16 x;
    memcpy(&x, &h, 2);
    return x;
}
inline u32 fma2(u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (int i = 0; i < 32; i += 16) {
        double exact = (double)to_float<X_BF16>(a >> i) * to_float<X_BF16>(b >> i) + to_float<X_BF16>(c >> i);
        d |= (u32)from_float<X_BF16>(exact) << i;
    }
    return d;
}
inline void mma(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const int lane = threadIdx.x % 32;
    Operands& o = operands[threadIdx.x / 32];
    u32 a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
    memcpy(o.a[lane], a, 16);
    memcpy(o.b[lane], b, 8);
    __syncwarp();
    auto half = [](u32 pair, int i) { return to_float<X_BF16>(pair >> 16 * (i % 2)); };
    for (int c = 0; c < 4; c++) {
        const int row = lane / 4 + c / 2 * 8, column = lane % 4 * 2 + c % 2;
        for (int k = 0; k < 16; k++)
            d[c] += half(o.a[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8], k) *
                    half(o.b[column * 4 + k % 8 / 2][k / 8], k);
    }
    __syncwarp();
}

static void run_grid(int columns, int parts, int warps, int bytes, const std::function<void()>& kernel) {
    std::vector<char> memory(bytes + 128);
    shared = memory.data() + (128 - (size_t)memory.data() % 128) % 128;
    gridDim = {columns, parts};
    operands.resize(warps);
    for (blockIdx.y = 0; blockIdx.y < parts; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < columns; blockIdx.x++) {
            memset(shared, 0xFF, bytes);
            block_barrier = std::make_unique<std::barrier<>>(32 * warps);
            warp_barriers.clear();
            for (int w = 0; w < warps; w++) warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
            std::vector<std::thread> threads;
            for (int t = 0; t < 32 * warps; t++)
                threads.emplace_back([&kernel, t] {
                    threadIdx.x = t;
                    kernel();
                });
            for (auto& thread : threads) thread.join();
        }
}
