// The gate of an MLP, applied to products that are still in the cache.

#include "loops.h"
#include "packed.h"

namespace ropewalk {
namespace {

template <typename T>
INLINE void gated(const float* gate, const float* up, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) narrow(gate[i] / (1.0f + exp_of(-gate[i])) * up[i], out[i]);
}

}  // namespace

WIDEST void silu_times(const float* gate, const float* up, int64_t n, Dtype dtype, void* out) {
  switch (dtype) {
    case Dtype::f16: return gated(gate, up, n, static_cast<c10::Half*>(out));
    case Dtype::bf16: return gated(gate, up, n, static_cast<c10::BFloat16*>(out));
    default: return gated(gate, up, n, static_cast<float*>(out));
  }
}

}  // namespace ropewalk
