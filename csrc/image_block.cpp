// The operators of the first block, of tensors with a task axis.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "image_block.h"
#include "tensors.h"

namespace lk {
namespace {

// x [1 or T, N, C, H, W]; geometry: stride, padding, dilation (vertical, horizontal each), pool
Convolution sizes(const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef geometry, int64_t outputs) {
  TORCH_CHECK(x.dim() == 5 && kernel.size() == 2 && geometry.size() == 7,
              "image_block: x must be [tasks, images, C, H, W], got ", x.sizes(),
              ", with 2 kernel sizes and 7 numbers, got ", kernel.size(), " and ", geometry.size());
  TORCH_CHECK(geometry[0] > 0 && geometry[1] > 0, "image_block: stride ", geometry[0], ", ", geometry[1],
              " must be positive");
  const Convolution c =
      Convolution::of(x.size(1), x.size(2), x.size(3), x.size(4), outputs, {kernel[0], kernel[1]}, geometry.data());
  TORCH_CHECK(ImageConvolution<float>::takes(c, geometry[6]) && x.numel() > 0, "image_block: a kernel of ", kernel[0], "x",
              kernel[1], " over images ", x.sizes().slice(1), " with pool ", geometry[6], ": at most ",
              ImageConvolution<float>::kMostTaps, " numbers per patch and a pool of 1 or 2");
  return c;
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
  const Convolution c = sizes(x, kernel, geometry, 0);
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
  const int64_t tasks = std::max({x.size(0), weight_.size(0), gamma_.size(0), beta_.size(0)}), pool = geometry.back();
  const Convolution c = sizes(x, weight_.sizes().slice(3), geometry, weight_.size(1));
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
  const int64_t tasks = gy_.size(0);
  const Convolution c = sizes(x, weight_.sizes().slice(3), geometry, weight_.size(1));
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
  m.impl("image_moments", &image_moments);
  m.impl("image_block", &image_block);
  m.impl("image_block_grad", &image_block_grad);
}

}  // namespace
}  // namespace lk
