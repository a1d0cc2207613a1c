// ropewalk::cpu_dense_linear: a few rows times a matrix in 16 bits. The schema is in dense.py.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "levels.h"

namespace ropewalk {
namespace {

using at::Tensor;

Tensor cpu_dense_linear(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.dim() >= 1, "x: expected float32 of 1 dimension or more, found ",
              x.scalar_type(), " ", x.sizes());
  const bool bf16 = weight.scalar_type() == at::kBFloat16;
  TORCH_CHECK((bf16 || weight.scalar_type() == at::kHalf) && weight.dim() == 2 && weight.is_contiguous() &&
                  weight.size(1) == x.size(-1),
              "weight: expected contiguous float16 or bfloat16 [N, ", x.size(-1), "], found ", weight.scalar_type(),
              " ", weight.sizes());
  const DenseWeight w{weight.const_data_ptr(), bf16, weight.size(0), weight.size(1)};
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = w.columns;
  Tensor y = at::empty(shape, x.options());
  const int64_t m = w.in_features == 0 ? 0 : x.numel() / w.in_features;
  if (m == 0) return y.zero_();
  const Tensor rows = x.contiguous();
  const auto* from = static_cast<const float*>(rows.const_data_ptr());
  auto* to = static_cast<float*>(y.mutable_data_ptr());
  const Kernels& level = kernels();
  // A piece is worth a thread from about 20 us on.
  const int64_t grain = 1 + (int64_t{1} << 19) / w.in_features;
  at::parallel_for(0, w.columns, grain, [&](int64_t begin, int64_t end) { level.dense(w, from, m, to, begin, end); });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(ropewalk, CPU, m) { m.impl("cpu_dense_linear", cpu_dense_linear); }

}  // namespace ropewalk
