// AVX2 with AVX-VNNI: Alder Lake, Zen 5 and later.

#if defined(__x86_64__) || defined(_M_X64)

#include <cpuid.h>
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "packed.h"

// From here on; the standard library's own functions above must run anywhere.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), \
                             apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif

#include "simd_avx2.h"
#include "kernels_of.h"

namespace ropewalk {
const Kernels* avx_vnni_kernels() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx);
  const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (eax >> 4 & 1) != 0;
  return has ? kernels_of<Avx2<true>>("avx_vnni") : nullptr;
}
}  // namespace ropewalk

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

#include "packed.h"

namespace ropewalk {
const Kernels* avx_vnni_kernels() { return nullptr; }
}  // namespace ropewalk

#endif
