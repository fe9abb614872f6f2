// The operators of the first block, of tensors with a task axis.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "checks.h"
#include "image_block.h"
#include "tensors.h"

namespace lk {
namespace {

void check_taken(const Convolution& c, int64_t pool) {
  TORCH_CHECK(ImageConvolution<float>::takes(c, pool), "image_block: a kernel of ", c.kernel[0], "x", c.kernel[1],
              " over images of ", c.inputs, " channels with pool ", pool, ": at most ", ImageConvolution<float>::kMostTaps,
              " numbers per patch and a pool of 1 or 2");
}

// moments [1 or T, K + 1, K + 1], of T and of so many as x
void check_moments(const Operands& operands, const at::Tensor& moments, const at::Tensor& x, const Convolution& c) {
  const int64_t side = c.inputs * c.kernel[0] * c.kernel[1] + 1;
  operands.check("moments", moments, {x.size(0), side, side}, -1, at::kDouble);
}

at::Tensor of_task(const at::Tensor& t, int64_t task) { return t[t.size(0) == 1 ? 0 : task]; }

template <typename T>
ImageConvolution<T> images_of(const Convolution& c, int64_t pool, const at::Tensor& x, int64_t task, Arena& arena) {
  const at::Tensor own = of_task(x, task);
  return ImageConvolution<T>(c, pool, own.const_data_ptr<T>(), own.strides().data(), arena);
}

template <typename T>
const T* values(const at::Tensor& t, int64_t task) {
  return t.const_data_ptr<T>() + (t.size(0) == 1 ? 0 : task) * (t.numel() / t.size(0));
}

at::Tensor image_moments(const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef geometry) {
  const Operands operands("image_moments", x, {&x});
  operands.check("x", x, {kOwn, kSome, kSome, kSome, kSome});
  operands.check_count("kernel", kernel.size(), 2), operands.check_count("geometry", geometry.size(), kGeometry - 1);
  const Convolution c =
      operands.convolution(x.sizes(), {1, x.size(2), kernel[0], kernel[1]}, geometry.data(), 1, geometry[6]);
  check_taken(c, geometry[6]);
  const int64_t side = c.inputs * kernel[0] * kernel[1] + 1;
  at::Tensor result = at::empty({x.size(0), side, side}, x.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "image_moments", [&] {
    const Borrowed arena;
    for (int64_t task = 0; task < x.size(0); ++task) {
      const Arena::Mark mark = (*arena).mark();
      images_of<scalar_t>(c, geometry[6], x, task, *arena).moments(result[task].mutable_data_ptr<double>(), *arena);
      (*arena).rewind(mark);
    }
  });
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> image_block(const at::Tensor& x, const at::Tensor& weight_,
                                                                       const at::Tensor& gamma_, const at::Tensor& beta_,
                                                                       const at::Tensor& moments_, at::IntArrayRef geometry,
                                                                       double eps) {
  const Operands operands("image_block", x, {&x, &weight_, &gamma_, &beta_});
  const Convolution c = operands.block(x, weight_, geometry);
  operands.check("gamma", gamma_, {kOwn, c.outputs}), operands.check("beta", beta_, {kOwn, c.outputs});
  check_moments(operands, moments_, x, c), check_taken(c, geometry[6]);
  const int64_t tasks = operands.tasks(), pool = geometry[6];
  const at::Tensor weight = weight_.contiguous(), gamma = gamma_.contiguous(), beta = beta_.contiguous();
  const at::Tensor moments = moments_.contiguous();
  const auto empty = [&](at::ScalarType type) {
    return empty_images(tasks, c.images, c.outputs, c.rows / pool, c.columns / pool, x.options().dtype(type));
  };
  at::Tensor y = empty(x.scalar_type()), index = empty(at::kByte);
  at::Tensor mean = at::empty({tasks, c.outputs}, x.options()), rstd = at::empty({tasks, c.outputs}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "image_block", [&] {
    const Borrowed arena;
    for (int64_t task = 0; task < tasks; ++task) {
      const Arena::Mark mark = (*arena).mark();
      const ImageConvolution<scalar_t> images = images_of<scalar_t>(c, pool, x, task, *arena);
      const Patches patches(moments.size(1) - 1, values<double>(moments, task));
      images.block(values<scalar_t>(weight, task), values<scalar_t>(gamma, task), values<scalar_t>(beta, task), patches, eps,
                   y[task].mutable_data_ptr<scalar_t>(), index[task].mutable_data_ptr<uint8_t>(),
                   mean[task].mutable_data_ptr<scalar_t>(), rstd[task].mutable_data_ptr<scalar_t>(), *arena);
      (*arena).rewind(mark);
    }
  });
  return {y, index, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> image_block_grad(const at::Tensor& gy_, const at::Tensor& x,
                                                                const at::Tensor& weight_, const at::Tensor& gamma_,
                                                                const at::Tensor& index_, const at::Tensor& rstd_,
                                                                const at::Tensor& moments_, at::IntArrayRef geometry) {
  const Operands operands("image_block_grad", x, {&gy_, &x, &weight_, &gamma_});
  const Convolution c = operands.block(x, weight_, geometry);
  check_moments(operands, moments_, x, c), check_taken(c, geometry[6]);
  const int64_t tasks = operands.tasks(), rows = c.rows / geometry[6], columns = c.columns / geometry[6];
  operands.check("gy", gy_, {tasks, c.images, c.outputs, rows, columns});
  operands.check("index", index_, {tasks, c.images, c.outputs, rows, columns}, -1, at::kByte);
  operands.check("gamma", gamma_, {kOwn, c.outputs}), operands.check("rstd", rstd_, {tasks, c.outputs});
  const at::Tensor gy = pixels_of(gy_), index = pixels_of(index_), weight = weight_.contiguous(),
                   gamma = gamma_.contiguous(), rstd = rstd_.contiguous(), moments = moments_.contiguous();
  const int64_t shape[] = {tasks, weight.size(1), weight.size(2), weight.size(3), weight.size(4)};
  at::Tensor dweight = at::empty(shape, x.options()), dgamma = at::empty({tasks, c.outputs}, x.options()),
             dbeta = at::empty({tasks, c.outputs}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "image_block_grad", [&] {
    const Borrowed arena;
    for (int64_t task = 0; task < tasks; ++task) {
      const Arena::Mark mark = (*arena).mark();
      const Patches patches(moments.size(1) - 1, values<double>(moments, task));
      images_of<scalar_t>(c, geometry[6], x, task, *arena)
          .block_grad(values<scalar_t>(gy, task), values<scalar_t>(weight, task), values<scalar_t>(gamma, task),
                      values<uint8_t>(index, task), values<scalar_t>(rstd, task), patches,
                      dweight[task].mutable_data_ptr<scalar_t>(), dgamma[task].mutable_data_ptr<scalar_t>(),
                      dbeta[task].mutable_data_ptr<scalar_t>(), *arena);
      (*arena).rewind(mark);
    }
  });
  return {dweight, dgamma, dbeta};
}

TORCH_LIBRARY_FRAGMENT(lambda_kernels, m) {
  // x [1 or T, N, C, H, W] -> moments [1 or T, K + 1, K + 1], float64; geometry: stride, padding, dilation (vertical,
  // horizontal each), pool
  m.def("image_moments(Tensor x, int[] kernel, int[] geometry) -> Tensor");
  // -> y, index [T, N, O, H', W'], mean, rstd [T, O]
  m.def("image_block(Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor moments, int[] geometry, float eps) -> "
        "(Tensor, Tensor, Tensor, Tensor)");
  // -> dweight [T, O, C, kh, kw], dgamma, dbeta [T, O]
  m.def("image_block_grad(Tensor gy, Tensor x, Tensor weight, Tensor gamma, Tensor index, Tensor rstd, Tensor moments, "
        "int[] geometry) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lambda_kernels, CPU, m) {
  m.impl("image_moments", &Door<&image_moments>::call);
  m.impl("image_block", &Door<&image_block>::call);
  m.impl("image_block_grad", &Door<&image_block_grad>::call);
}

}  // namespace
}  // namespace lk
