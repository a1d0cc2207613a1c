// Any processor.

#include "simd_portable.h"
#include "kernels_of.h"

namespace ropewalk {
const Kernels* portable_kernels() { return kernels_of<Portable>("portable"); }
}  // namespace ropewalk
