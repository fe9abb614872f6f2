// The operators of 3x3 convolutions, of tensors with a task axis.
#include "winograd.h"

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "checks.h"
#include "tensors.h"

namespace lk {
namespace {

// Sizes of one task's convolution, for sizes [1 or T, ...] of x and weight, one of which may be given as numbers.
Convolution sizes(const Operands& operands, at::IntArrayRef x, at::IntArrayRef weight, at::IntArrayRef padding) {
  operands.check_count("the sizes of x", x.size(), 5), operands.check_count("the sizes of the weight", weight.size(), 5);
  operands.check_count("padding", padding.size(), 2);
  TORCH_CHECK(weight[3] == 3 && weight[4] == 3, "winograd: a weight must be [tasks, outputs, inputs, 3, 3], got ", weight);
  const int64_t geometry[] = {1, 1, padding[0], padding[1], 1, 1};
  return operands.convolution(x, weight, geometry, 1, 1);
}

void check_images(const Operands& operands, const at::Tensor& x) {
  operands.check("x", x, {kOwn, kSome, kSome, kSome, kSome});
}

void check_gradient(const Operands& operands, const at::Tensor& gy, const Convolution& c) {
  operands.check("gy", gy, {kOwn, c.images, c.outputs, c.rows, c.columns});
}

void check_weight(const Operands& operands, const at::Tensor& weight) {
  operands.check("the weight", weight, {kOwn, kSome, kSome, 3, 3});
}

// Of sizes that are given as numbers.
void check_tasks(int64_t given, int64_t tasks) {
  TORCH_CHECK(given == 1 || tasks == 1 || given == tasks, "winograd: sizes of ", given, " tasks do not fit operands of ",
              tasks);
}

template <typename T>
T* data(const at::Tensor& t) {
  return const_cast<T*>(t.const_data_ptr<T>());
}

int64_t of(const at::Tensor& t, int64_t task) { return t.size(0) == 1 ? 0 : task; }

at::Tensor winograd(const at::Tensor& x_, const at::Tensor& weight, at::IntArrayRef padding) {
  const Operands operands("winograd", x_, {&x_, &weight});
  check_images(operands, x_), check_weight(operands, weight);
  Convolution c = sizes(operands, x_.sizes(), weight.sizes(), padding);
  const int64_t tasks = operands.tasks(), runs = weight.size(0) == 1 ? 1 : tasks;
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
  const Operands operands("winograd_input_grad", gy_, {&gy_, &weight});
  check_weight(operands, weight);
  Convolution c = sizes(operands, x, weight.sizes(), padding);
  check_gradient(operands, gy_, c);
  const int64_t tasks = operands.tasks(), runs = weight.size(0) == 1 ? 1 : tasks;
  check_tasks(x[0], tasks);
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
  const Operands operands("winograd_weight_grad", gy_, {&gy_, &x_});
  check_images(operands, x_);
  Convolution c = sizes(operands, x_.sizes(), weight, padding);
  check_gradient(operands, gy_, c);
  const bool shared = weight[0] == 1;
  const int64_t tasks = operands.tasks(), runs = shared ? 1 : tasks;
  check_tasks(weight[0], tasks);
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
  m.impl("winograd", &Door<&winograd>::call);
  m.impl("winograd_input_grad", &Door<&winograd_input_grad>::call);
  m.impl("winograd_weight_grad", &Door<&winograd_weight_grad>::call);
}

}  // namespace
}  // namespace lk
