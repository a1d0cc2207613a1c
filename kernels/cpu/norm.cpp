// ropewalk::rms_norm and ropewalk::add_rms_norm on the CPU: the sum of the residual stream and what a layer adds to it,
// and its norm, in one pass over a row that is in the cache. The schemas and what they compute are in kernels/norm.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "loops.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Fewer elements than this are not worth waking another thread.
constexpr int64_t kGrain = 1 << 15;

struct Row {
  const void *x, *y;  // y is null where nothing is added
  void *sum, *normed;
  const void* weight;
  const int32_t* order;  // null where nothing is moved
  int64_t size;
  float eps;
};

template <typename T>
INLINE void norm_row(const Row& row, float* scratch) {
  const auto *x = static_cast<const T*>(row.x), *y = static_cast<const T*>(row.y);
  const auto* weight = static_cast<const T*>(row.weight);
  auto *sum = static_cast<T*>(row.sum), *normed = static_cast<T*>(row.normed);
  for (int64_t i = 0; i < row.size; ++i) scratch[i] = widen(x[i]);
  if (y != nullptr) {
    for (int64_t i = 0; i < row.size; ++i) {
      narrow(scratch[i] + widen(y[i]), sum[i]);
      scratch[i] = widen(sum[i]);
    }
  }
  Sums squares;
  int64_t i = 0;
  for (; i + 16 <= row.size; i += 16) {
    for (int j = 0; j < 16; ++j) squares.lanes[j] += scratch[i + j] * scratch[i + j];
  }
  for (; i < row.size; ++i) squares.lanes[0] += scratch[i] * scratch[i];
  const float factor = 1.0f / std::sqrt(squares.total() / static_cast<float>(row.size) + row.eps);
  // Rounded before the weight as well as after it, as transformers has it.
  for (i = 0; i < row.size; ++i) {
    T rounded;
    narrow(scratch[i] * factor, rounded);
    scratch[i] = widen(rounded) * widen(weight[i]);
  }
  if (row.order == nullptr) {
    for (i = 0; i < row.size; ++i) narrow(scratch[i], normed[i]);
  } else {
    for (i = 0; i < row.size; ++i) narrow(scratch[row.order[i]], normed[i]);
  }
}

WIDEST void norm_row(at::ScalarType dtype, const Row& row, float* scratch) {
  switch (dtype) {
    case at::kHalf: return norm_row<c10::Half>(row, scratch);
    case at::kBFloat16: return norm_row<c10::BFloat16>(row, scratch);
    default: return norm_row<float>(row, scratch);
  }
}

// Whether these are arguments for `norm`, which checks nothing.
bool fit(const Tensor& x, const OptionalTensor& y, const Tensor& weight, const OptionalTensor& order) {
  const auto dtype = x.scalar_type();
  if (at::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad() || (y && y->requires_grad()))) {
    return false;  // the gradient would be lost
  }
  if (dtype != at::kFloat && dtype != at::kHalf && dtype != at::kBFloat16) return false;
  if (x.dim() < 1 || x.size(-1) == 0 || weight.sizes() != x.sizes().slice(x.dim() - 1)) return false;
  if (weight.scalar_type() != dtype || !weight.is_contiguous()) return false;
  if (y && (y->scalar_type() != dtype || y->sizes() != x.sizes())) return false;
  if (!order) return true;
  if (order->scalar_type() != at::kInt || order->sizes() != weight.sizes() || !order->is_contiguous()) return false;
  const auto* rows = order->const_data_ptr<int32_t>();
  for (int64_t i = 0; i < weight.numel(); ++i) {
    if (rows[i] < 0 || rows[i] >= weight.numel()) return false;
  }
  return true;
}

void norm(const Tensor& x, const OptionalTensor& y, const Tensor& weight, double eps, const OptionalTensor& order,
          const Tensor* sum, const Tensor& normed) {
  const int64_t size = x.size(-1), rows = x.numel() / size, bytes = size * x.element_size();
  const Tensor from = x.contiguous(), added = y ? y->contiguous() : Tensor();
  const auto dtype = x.scalar_type();
  const auto* x_data = static_cast<const char*>(from.const_data_ptr());
  const auto* y_data = y ? static_cast<const char*>(added.const_data_ptr()) : nullptr;
  auto* sum_data = sum ? static_cast<char*>(sum->mutable_data_ptr()) : nullptr;
  auto* normed_data = static_cast<char*>(normed.mutable_data_ptr());
  const auto* moved = order ? order->const_data_ptr<int32_t>() : nullptr;
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(size);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * bytes;
      norm_row(dtype,
               {x_data + at, y_data ? y_data + at : nullptr, sum_data ? sum_data + at : nullptr, normed_data + at,
                weight.const_data_ptr(), moved, size, static_cast<float>(eps)},
               scratch.data());
    }
  });
}

// Call an operator of plain torch that has the signature of `function`; it also says in words what does not fit.
template <typename Result, typename... Arguments>
Result in_torch(const char* name, Result (*)(Arguments...), std::type_identity_t<Arguments>... arguments) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Result(Arguments...)>().call(arguments...);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, const OptionalTensor& order) {
  if (!fit(x, {}, weight, order)) {
    return in_torch("ropewalk::rms_norm_in_torch", rms_norm, x, weight, eps, order);
  }
  Tensor normed = at::empty(x.sizes(), x.options());
  norm(x, {}, weight, eps, order, nullptr, normed);
  return normed;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& y, const Tensor& weight, double eps,
                                        const OptionalTensor& order) {
  if (!fit(x, y, weight, order)) {
    return in_torch("ropewalk::add_rms_norm_in_torch", add_rms_norm, x, y, weight, eps, order);
  }
  std::tuple<Tensor, Tensor> out{at::empty(x.sizes(), x.options()), at::empty(x.sizes(), x.options())};
  norm(x, y, weight, eps, order, &std::get<0>(out), std::get<1>(out));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(ropewalk, CPU, m) {
  m.impl("rms_norm", &rms_norm);
  m.impl("add_rms_norm", &add_rms_norm);
}
