// The operators of 3x3 convolutions, of tensors with a task axis.
#include "winograd.h"

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <utility>

#include "tensors.h"

namespace lk {
namespace {

// Sizes of one task's convolution.
Convolution sizes(at::IntArrayRef x, at::IntArrayRef weight, at::IntArrayRef padding) {
  const auto fits = [&](int axis) { return padding[axis] >= 0 && x[3 + axis] + 2 * padding[axis] >= 3; };
  TORCH_CHECK(x.size() == 5 && weight.size() == 5 && weight[2] == x[2] && weight[3] == 3 && weight[4] == 3 &&
                  padding.size() == 2 && fits(0) && fits(1) && x[0] * x[1] * x[2] * weight[0] * weight[1] > 0,
              "winograd: a weight ", weight, " with padding ", padding, " does not fit images ", x);
  const int64_t geometry[] = {1, 1, padding[0], padding[1], 1, 1};
  return Convolution::of(x[1], x[2], x[3], x[4], weight[1], {3, 3}, geometry);
}

// The number of tasks of two operands, one of which may be shared.
int64_t tasks_of(at::IntArrayRef a, at::IntArrayRef b) {
  TORCH_CHECK(a[0] == b[0] || a[0] == 1 || b[0] == 1, "winograd: ", b, " is of other tasks than ", a);
  return std::max(a[0], b[0]);
}

void check_gradient(at::IntArrayRef gy, const Convolution& c, at::IntArrayRef x, at::IntArrayRef weight) {
  TORCH_CHECK(gy.size() == 5 && gy[0] > 0 && gy[1] == c.images && gy[2] == c.outputs && gy[3] == c.rows &&
                  gy[4] == c.columns,
              "winograd: the gradient ", gy, " is not that of a weight ", weight, " over images ", x);
}

template <typename T>
T* data(const at::Tensor& t) {
  return const_cast<T*>(t.const_data_ptr<T>());
}

int64_t of(const at::Tensor& t, int64_t task) { return t.size(0) == 1 ? 0 : task; }

at::Tensor winograd(const at::Tensor& x_, const at::Tensor& weight, at::IntArrayRef padding) {
  const bool shared = weight.size(0) == 1;
  Convolution c = sizes(x_.sizes(), weight.sizes(), padding);
  const int64_t tasks = tasks_of(x_.sizes(), weight.sizes()), runs = shared ? 1 : tasks;
  c.images *= tasks / runs;
  const at::Tensor x = pixels_of(x_);
  at::Tensor y = empty_images(tasks, x_.size(1), c.outputs, c.rows, c.columns, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "winograd", [&] {
    const Borrowed arena;
    for (int64_t task = 0; task < runs; ++task) {
      const WinogradConvolution<scalar_t> filter(c, data<scalar_t>(weight[task]), weight.strides().data() + 1);
      filter.forward(x[of(x, task)].const_data_ptr<scalar_t>(), y[task].mutable_data_ptr<scalar_t>(), *arena);
    }
  });
  return y;
}

at::Tensor winograd_input_grad(const at::Tensor& gy_, const at::Tensor& weight, at::IntArrayRef x, at::IntArrayRef padding) {
  const bool shared = weight.size(0) == 1;
  Convolution c = sizes(x, weight.sizes(), padding);
  check_gradient(gy_.sizes(), c, x, weight.sizes());
  const int64_t tasks = tasks_of(gy_.sizes(), weight.sizes()), runs = shared ? 1 : tasks;
  c.images *= tasks / runs;
  const at::Tensor gy = pixels_of(gy_);
  at::Tensor gx = empty_images(tasks, x[1], c.inputs, c.height, c.width, gy.options());
  AT_DISPATCH_FLOATING_TYPES(gy.scalar_type(), "winograd_input_grad", [&] {
    const Borrowed arena;
    for (int64_t task = 0; task < runs; ++task) {
      const WinogradConvolution<scalar_t> filter(c, data<scalar_t>(weight[task]), weight.strides().data() + 1);
      filter.input_gradient(gy[of(gy, task)].const_data_ptr<scalar_t>(), gx[task].mutable_data_ptr<scalar_t>(), *arena);
    }
  });
  return gx;
}

at::Tensor winograd_weight_grad(const at::Tensor& gy_, const at::Tensor& x_, at::IntArrayRef weight,
                                at::IntArrayRef padding) {
  const bool shared = weight[0] == 1;
  Convolution c = sizes(x_.sizes(), weight, padding);
  check_gradient(gy_.sizes(), c, x_.sizes(), weight);
  const int64_t tasks = tasks_of(gy_.sizes(), x_.sizes()), runs = shared ? 1 : tasks;
  c.images *= tasks / runs;
  const auto whole = [&](const at::Tensor& t) {
    return pixels_of(shared && t.size(0) < tasks ? t.expand({tasks, -1, -1, -1, -1}) : t);
  };
  const at::Tensor x = whole(x_), gy = whole(gy_);
  at::Tensor gw = at::zeros({runs, weight[1], weight[2], weight[3], weight[4]}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "winograd_weight_grad", [&] {
    const Borrowed arena;
    for (int64_t task = 0; task < runs; ++task) {
      const WinogradConvolution<scalar_t> filter(c, gw[task].mutable_data_ptr<scalar_t>(), gw.strides().data() + 1);
      filter.add_weight_gradient(x[of(x, task)].const_data_ptr<scalar_t>(), gy[of(gy, task)].const_data_ptr<scalar_t>(),
                                 scalar_t(1), *arena);
    }
  });
  return gw;
}

TORCH_LIBRARY_FRAGMENT(lambda_kernels, m) {
  // Convolutions of 3x3 pixels, stride 1: x [1 or T, N, C, H, W], weight [1 or T, O, C, 3, 3] -> y [T, N, O, H', W']
  m.def("winograd(Tensor x, Tensor weight, int[] padding) -> Tensor");
  m.def("winograd_input_grad(Tensor gy, Tensor weight, int[] x, int[] padding) -> Tensor");    // sizes of x
  m.def("winograd_weight_grad(Tensor gy, Tensor x, int[] weight, int[] padding) -> Tensor");  // sizes of the weight
}

TORCH_LIBRARY_IMPL(lambda_kernels, CPU, m) {
  m.impl("winograd", &winograd);
  m.impl("winograd_input_grad", &winograd_input_grad);
  m.impl("winograd_weight_grad", &winograd_weight_grad);
}

}  // namespace
}  // namespace lk
