// AVX-512 with VNNI: Ice Lake, Zen 4 and later.

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "packed.h"

// From here on; the standard library's own functions above must run anywhere.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif

#include "simd_avx512.h"
#include "kernels_of.h"

namespace ropewalk {
const Kernels* avx512_vnni_kernels() {
  const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vnni");
  return has ? kernels_of<Avx512<true>>("avx512_vnni") : nullptr;
}
}  // namespace ropewalk

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

#include "packed.h"

namespace ropewalk {
const Kernels* avx512_vnni_kernels() { return nullptr; }
}  // namespace ropewalk

#endif
