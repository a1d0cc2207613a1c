// AVX2: Haswell, Zen 1 and later.

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "packed.h"

// From here on; the standard library's own functions above must run anywhere.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), \
                             apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c")
#endif

#include "simd_avx2.h"
#include "kernels_of.h"

namespace ropewalk {
const Kernels* avx2_kernels() {
  // Whatever has both has F16C.
  const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has ? kernels_of<Avx2<false>>("avx2") : nullptr;
}
}  // namespace ropewalk

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

#include "packed.h"

namespace ropewalk {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace ropewalk

#endif
