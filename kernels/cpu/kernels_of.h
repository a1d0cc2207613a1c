// The table of one level's kernels.

#include "tile.h"
#include "dense.h"
#include "rearrange.h"

namespace {

template <class S>
const Kernels* kernels_of(const char* name) {
  static const Kernels kernels{name,     strip_of<S>, quantize_row<S>, multiply<S>,
                               dense<S>, repack,      unpack,          dequantize};
  return &kernels;
}

}  // namespace
