// The operators of 3x3 convolutions, of tensors with a task axis.
#include "filter.h"

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <tuple>
#include <utility>

#include "block.h"

namespace lk {
namespace {

// [tasks, images, C, H, W], channels-last
at::Tensor empty_images(int64_t tasks, int64_t images, int64_t channels, int64_t height, int64_t width,
                        const at::TensorOptions& options) {
  return at::empty({tasks, images, height, width, channels}, options).permute({0, 1, 4, 2, 3});
}

at::Tensor channels_last(const at::Tensor& x) { return x.permute({0, 1, 3, 4, 2}).contiguous(); }

// Sizes of one task's, or of `tasks` tasks' that share a weight.
Convolution sizes(at::IntArrayRef x, at::IntArrayRef weight, at::IntArrayRef padding, int64_t tasks) {
  TORCH_CHECK(x.size() == 5 && weight.size() == 5 && weight[2] == x[2] && weight[3] == 3 && weight[4] == 3 &&
                  padding.size() == 2,
              "winograd: a weight ", weight, " does not fit images ", x);
  Convolution c{tasks * x[1], x[3], x[4], x[2], 0, 0, weight[1], {3, 3}, {1, 1}, {padding[0], padding[1]}, {1, 1}, 1};
  c.size_output();
  return c;
}

template <typename T>
T* data(const at::Tensor& t) {
  return const_cast<T*>(t.const_data_ptr<T>());
}

int64_t of(const at::Tensor& t, int64_t task) { return t.size(0) == 1 ? 0 : task; }

}  // namespace

at::Tensor winograd(const at::Tensor& x_, const at::Tensor& weight, at::IntArrayRef padding) {
  const bool shared = weight.size(0) == 1;
  const int64_t tasks = std::max(x_.size(0), weight.size(0)), runs = shared ? 1 : tasks;
  const Convolution c = sizes(x_.sizes(), weight.sizes(), padding, shared ? tasks : 1);
  const at::Tensor x = channels_last(x_);
  at::Tensor y = empty_images(tasks, x_.size(1), c.outputs, c.rows, c.columns, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "winograd", [&] {
    const Borrowed arena;
    for (int64_t task = 0; task < runs; ++task) {
      const Filter<scalar_t> filter(c, data<scalar_t>(weight[task]), weight.strides().data() + 1);
      filter.forward(x[of(x, task)].const_data_ptr<scalar_t>(), y[task].mutable_data_ptr<scalar_t>(), *arena);
    }
  });
  return y;
}

at::Tensor winograd_input_grad(const at::Tensor& gy_, const at::Tensor& weight, at::IntArrayRef x, at::IntArrayRef padding) {
  const bool shared = weight.size(0) == 1;
  const int64_t tasks = std::max(gy_.size(0), weight.size(0)), runs = shared ? 1 : tasks;
  const Convolution c = sizes(x, weight.sizes(), padding, shared ? tasks : 1);
  const at::Tensor gy = channels_last(gy_);
  at::Tensor gx = empty_images(tasks, x[1], c.inputs, c.height, c.width, gy.options());
  AT_DISPATCH_FLOATING_TYPES(gy.scalar_type(), "winograd_input_grad", [&] {
    const Borrowed arena;
    for (int64_t task = 0; task < runs; ++task) {
      const Filter<scalar_t> filter(c, data<scalar_t>(weight[task]), weight.strides().data() + 1);
      filter.input_gradient(gy[of(gy, task)].const_data_ptr<scalar_t>(), gx[task].mutable_data_ptr<scalar_t>(), *arena);
    }
  });
  return gx;
}

at::Tensor winograd_weight_grad(const at::Tensor& gy_, const at::Tensor& x_, at::IntArrayRef weight, at::IntArrayRef padding) {
  const bool shared = weight[0] == 1;
  const int64_t tasks = std::max(gy_.size(0), x_.size(0)), runs = shared ? 1 : tasks;
  const Convolution c = sizes(x_.sizes(), weight, padding, shared ? tasks : 1);
  const auto whole = [&](const at::Tensor& t) {
    return channels_last(shared && t.size(0) < tasks ? t.expand({tasks, -1, -1, -1, -1}) : t);
  };
  const at::Tensor x = whole(x_), gy = whole(gy_);
  at::Tensor gw = at::zeros({runs, weight[1], weight[2], weight[3], weight[4]}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "winograd_weight_grad", [&] {
    const Borrowed arena;
    for (int64_t task = 0; task < runs; ++task) {
      const Filter<scalar_t> filter(c, gw[task].mutable_data_ptr<scalar_t>(), gw.strides().data() + 1);
      filter.descend(x[of(x, task)].const_data_ptr<scalar_t>(), gy[of(gy, task)].const_data_ptr<scalar_t>(), scalar_t(1),
                     *arena);
    }
  });
  return gw;
}

}  // namespace lk
