// The operators of norm, ReLU and max-pool, of tensors with a task axis: checks, memory layout, threads.
#include "norm_relu_pool.h"

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>

#include "checks.h"
#include "tensors.h"

namespace lk {
namespace {

// gammas: by name, [1 or T, C]
Operands check(const char* name, const at::Tensor& z,
               std::initializer_list<std::pair<const char*, const at::Tensor&>> gammas, int64_t pool) {
  Operands operands(name, z, {&z});
  operands.check("z", z, {operands.tasks(), kSome, kSome, kSome, kSome});
  TORCH_CHECK(pool == 1 || pool == 2, name, ": pool must be 1 or 2, got ", pool);
  TORCH_CHECK(std::max({z.size(1), z.size(3), z.size(4)}) <= kMostSide && z.numel() <= kMostValues, name, ": z ", z.sizes(),
              " has more than ", kMostValues, " values, or sides of more than ", kMostSide);
  for (const auto& [what, t] : gammas) operands.check(what, t, {kOwn, z.size(2)});
  return operands;
}

// What the forward pass returned, and the gradient of y.
void check_saved(const Operands& operands, const at::Tensor& gy, const at::Tensor& z, const at::Tensor& index,
                 const at::Tensor& mean, const at::Tensor& rstd, int64_t pool) {
  const int64_t tasks = z.size(0), height = z.size(3) / pool, width = z.size(4) / pool;
  operands.check("mean", mean, {tasks, z.size(2)}), operands.check("rstd", rstd, {tasks, z.size(2)});
  operands.check("index", index, {tasks, z.size(1), z.size(2), height, width}, -1, at::kByte);
  operands.check("gy", gy, {tasks, z.size(1), z.size(2), height, width});
}

// As many tasks, images and channels as z has, of another size.
at::Tensor images_like(const at::Tensor& z, int64_t height, int64_t width, at::ScalarType dtype) {
  return empty_images(z.size(0), z.size(1), z.size(2), height, width, z.options().dtype(dtype));
}

template <typename T, template <typename> class Params = NormReluPool>
Params<T> describe(const at::Tensor& z, int64_t pool) {
  Params<T> p{};
  p.tasks = z.size(0);
  p.images = z.size(1);
  p.channels = z.size(2);
  p.height = z.size(3);
  p.width = z.size(4);
  p.pool = pool;
  set_slabs<T>(p);
  p.z = z.const_data_ptr<T>();
  return p;
}

// What the backward kernels read of the forward pass.
template <typename T>
void read_back(NormReluPool<T>& p, const at::Tensor& gy, const at::Tensor& gamma, const at::Tensor& index,
               const at::Tensor& mean, const at::Tensor& rstd) {
  p.gy = gy.const_data_ptr<T>();
  p.gamma = gamma.const_data_ptr<T>();
  p.gamma_task = gamma.size(0) == 1 ? 0 : p.channels;
  p.index = const_cast<uint8_t*>(index.const_data_ptr<uint8_t>());
  p.mean = const_cast<T*>(mean.const_data_ptr<T>());
  p.rstd = const_cast<T*>(rstd.const_data_ptr<T>());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_relu_pool(const at::Tensor& z_, const at::Tensor& gamma_,
                                                                          const at::Tensor& beta_, double eps,
                                                                          int64_t pool) {
  check("norm_relu_pool", z_, {{"gamma", gamma_}, {"beta", beta_}}, pool);
  const at::Tensor z = channels_last(z_), gamma = gamma_.contiguous(), beta = beta_.contiguous();
  at::Tensor y = images_like(z, z.size(3) / pool, z.size(4) / pool, z.scalar_type());
  at::Tensor index = images_like(z, z.size(3) / pool, z.size(4) / pool, at::kByte);
  at::Tensor mean = at::empty({z.size(0), z.size(2)}, z.options()), rstd = at::empty(mean.sizes(), z.options());
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "norm_relu_pool", [&] {
    auto p = describe<scalar_t>(z, pool);
    const at::Tensor partial = at::empty({p.tasks, p.images, p.slabs, 2, p.channels}, z.options().dtype(at::kDouble));
    p.eps = eps;
    p.gamma = gamma.const_data_ptr<scalar_t>();
    p.beta = beta.const_data_ptr<scalar_t>();
    p.gamma_task = gamma.size(0) == 1 ? 0 : p.channels;
    p.beta_task = beta.size(0) == 1 ? 0 : p.channels;
    p.mean = mean.mutable_data_ptr<scalar_t>();
    p.rstd = rstd.mutable_data_ptr<scalar_t>();
    p.y = y.mutable_data_ptr<scalar_t>();
    p.index = index.mutable_data_ptr<uint8_t>();
    p.partial = partial.mutable_data_ptr<double>();
    run_norm_relu_pool(p);
  });
  return {y, index, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_relu_pool_grad(const at::Tensor& gy_, const at::Tensor& z_,
                                                                   const at::Tensor& gamma_, const at::Tensor& index_,
                                                                   const at::Tensor& mean_, const at::Tensor& rstd_,
                                                                   int64_t pool, bool need_z) {
  const Operands operands = check("norm_relu_pool_grad", z_, {{"gamma", gamma_}}, pool);
  check_saved(operands, gy_, z_, index_, mean_, rstd_, pool);
  const at::Tensor gy = channels_last(gy_), z = channels_last(z_), index = channels_last(index_);
  const at::Tensor gamma = gamma_.contiguous(), mean = mean_.contiguous(), rstd = rstd_.contiguous();
  at::Tensor dz = need_z ? images_like(z, z.size(3), z.size(4), z.scalar_type()) : at::empty({0}, z.options());
  at::Tensor dgamma = at::empty({z.size(0), z.size(2)}, z.options()), dbeta = at::empty(dgamma.sizes(), z.options());
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "norm_relu_pool_grad", [&] {
    auto p = describe<scalar_t>(z, pool);
    const at::Tensor partial = at::empty({p.tasks, p.images, p.slabs, 2, p.channels}, z.options().dtype(at::kDouble));
    read_back<scalar_t>(p, gy, gamma, index, mean, rstd);
    p.dgamma = dgamma.mutable_data_ptr<scalar_t>();
    p.dbeta = dbeta.mutable_data_ptr<scalar_t>();
    p.partial = partial.mutable_data_ptr<double>();
    p.dz = need_z ? dz.mutable_data_ptr<scalar_t>() : nullptr;
    run_norm_relu_pool_grad(p);
  });
  return {dz, dgamma, dbeta};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_relu_pool_grad_grad(const at::Tensor& gy_, const at::Tensor& z_,
                                                                        const at::Tensor& gamma_, const at::Tensor& index_,
                                                                        const at::Tensor& mean_, const at::Tensor& rstd_,
                                                                        int64_t pool, const std::optional<at::Tensor>& v_,
                                                                        const at::Tensor& v_gamma_,
                                                                        const at::Tensor& v_beta_, bool need_z) {
  const Operands operands =
      check("norm_relu_pool_grad_grad", z_, {{"gamma", gamma_}, {"v_gamma", v_gamma_}, {"v_beta", v_beta_}}, pool);
  check_saved(operands, gy_, z_, index_, mean_, rstd_, pool);
  if (v_) operands.check("v", *v_, {z_.size(0), z_.size(1), z_.size(2), z_.size(3), z_.size(4)});
  const at::Tensor gy = channels_last(gy_), z = channels_last(z_), index = channels_last(index_);
  const at::Tensor v = v_ ? channels_last(*v_) : at::Tensor();
  const at::Tensor gamma = gamma_.contiguous(), mean = mean_.contiguous(), rstd = rstd_.contiguous();
  const at::Tensor v_gamma = v_gamma_.expand(mean.sizes()).contiguous(), v_beta = v_beta_.expand(mean.sizes()).contiguous();
  at::Tensor d_gy = images_like(z, gy.size(3), gy.size(4), z.scalar_type());
  at::Tensor d_z = need_z ? images_like(z, z.size(3), z.size(4), z.scalar_type()) : at::empty({0}, z.options());
  at::Tensor d_gamma = at::empty(mean.sizes(), z.options());
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "norm_relu_pool_grad_grad", [&] {
    auto p = describe<scalar_t, NormReluPoolGradGrad>(z, pool);
    const auto doubles = z.options().dtype(at::kDouble);
    const at::Tensor partial = at::empty({p.tasks, p.images, p.slabs, 5, p.channels}, doubles);
    const at::Tensor sums = at::empty({p.tasks, 5, p.channels}, doubles);
    read_back<scalar_t>(p, gy, gamma, index, mean, rstd);
    p.partial = partial.mutable_data_ptr<double>();
    p.v = v_ ? v.const_data_ptr<scalar_t>() : nullptr;
    p.v_gamma = v_gamma.const_data_ptr<scalar_t>();
    p.v_beta = v_beta.const_data_ptr<scalar_t>();
    p.sums = sums.mutable_data_ptr<double>();
    p.d_gy = d_gy.mutable_data_ptr<scalar_t>();
    p.d_z = need_z ? d_z.mutable_data_ptr<scalar_t>() : nullptr;
    p.d_gamma = d_gamma.mutable_data_ptr<scalar_t>();
    const auto& kernels = norm_relu_pool_kernels<scalar_t>();
    over_threads(kernels.reduce_grad_grad, p, p.tasks * p.images * p.slabs);
    over_threads(kernels.merge_grad_grad, p, p.tasks);
    over_threads(kernels.dense_grad_grad, p, p.tasks * p.images * ((p.height + pool - 1) / pool));
  });
  return {d_gy, d_z, d_gamma};
}

TORCH_LIBRARY_FRAGMENT(lambda_kernels, m) {
  // z [T, N, C, H, W], gamma and beta [1 or T, C] -> y, index [T, N, C, H / pool, W / pool], mean, rstd [T, C]
  m.def("norm_relu_pool(Tensor z, Tensor gamma, Tensor beta, float eps, int pool) -> (Tensor, Tensor, Tensor, Tensor)");
  // -> dz (empty unless need_z), dgamma, dbeta [T, C]
  m.def("norm_relu_pool_grad(Tensor gy, Tensor z, Tensor gamma, Tensor index, Tensor mean, Tensor rstd, int pool, "
        "bool need_z) -> (Tensor, Tensor, Tensor)");
  // The gradients of norm_relu_pool_grad's results in direction v [as z or None], v_gamma, v_beta [1 or T, C]
  // -> d_gy, d_z (empty unless need_z), d_gamma [T, C]
  m.def("norm_relu_pool_grad_grad(Tensor gy, Tensor z, Tensor gamma, Tensor index, Tensor mean, Tensor rstd, int pool, "
        "Tensor? v, Tensor v_gamma, Tensor v_beta, bool need_z) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lambda_kernels, CPU, m) {
  m.impl("norm_relu_pool", &Door<&norm_relu_pool>::call);
  m.impl("norm_relu_pool_grad", &Door<&norm_relu_pool_grad>::call);
  m.impl("norm_relu_pool_grad_grad", &Door<&norm_relu_pool_grad_grad>::call);
}

}  // namespace
}  // namespace lk
