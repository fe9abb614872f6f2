// The operator of a block without a gradient, of tensors with a task axis.
#include "frozen_block.h"

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "checks.h"
#include "tensors.h"

namespace lk {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> frozen_block(const at::Tensor& x_, const at::Tensor& weight,
                                                            const at::Tensor& gamma_, const at::Tensor& beta_,
                                                            at::IntArrayRef geometry, double eps) {
  const Operands operands("frozen_block", x_, {&x_, &weight, &gamma_, &beta_});
  const Convolution c = operands.block(x_, weight, geometry);
  operands.check("gamma", gamma_, {kOwn, c.outputs}), operands.check("beta", beta_, {kOwn, c.outputs});
  const int64_t tasks = operands.tasks(), pool = geometry[6];
  TORCH_CHECK(frozen_block_takes(c, pool), "frozen_block: no kernel for a weight ", weight.sizes(), " over images ",
              x_.sizes(), " with pool ", pool);
  const at::Tensor x = ImageConvolution<float>::takes(c, pool) ? x_ : channels_last(x_);
  const at::Tensor gamma = gamma_.contiguous(), beta = beta_.contiguous();
  at::Tensor y = empty_images(tasks, c.images, c.outputs, c.rows / pool, c.columns / pool, x.options());
  at::Tensor mean = at::empty({tasks, c.outputs}, x.options()), rstd = at::empty({tasks, c.outputs}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "frozen_block", [&] {
    const auto own = [](const at::Tensor& t, int64_t task) {
      return const_cast<scalar_t*>(t.const_data_ptr<scalar_t>()) + (t.size(0) == 1 ? 0 : task * t.stride(0));
    };
    const auto one = [&](int64_t begin, int64_t end) {
      const Borrowed arena;
      for (int64_t task = begin; task < end; ++task)
        run_frozen_block<scalar_t>({c, pool, eps, own(x, task), x.strides().data() + 1, own(weight, task),
                                    weight.strides().data() + 1, own(gamma, task), own(beta, task), own(y, task),
                                    own(mean, task), own(rstd, task)},
                                   *arena);
    };
    at::parallel_for(0, tasks, tasks >= at::get_num_threads() ? 1 : tasks, one);
  });
  return {y, mean, rstd};
}

TORCH_LIBRARY_FRAGMENT(lambda_kernels, m) {
  // A block without a gradient: x [1 or T, N, C, H, W], weight [1 or T, O, C, kh, kw] -> y, mean, rstd
  m.def("frozen_block(Tensor x, Tensor weight, Tensor gamma, Tensor beta, int[] geometry, float eps) -> "
        "(Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lambda_kernels, CPU, m) { m.impl("frozen_block", &Door<&frozen_block>::call); }

}  // namespace
}  // namespace lk
