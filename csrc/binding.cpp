// Where torch meets the kernels: checks, memory layout, threads, operator registrations.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "block.h"
#include "arena.h"
#include "norm.h"

namespace {

// A dense channels-last tensor [tasks * images, C, H, W] seen as [tasks, images, C, H, W].
at::Tensor empty_images(const at::Tensor& z, at::ScalarType dtype, int64_t height, int64_t width) {
  return at::empty({z.size(0) * z.size(1), z.size(2), height, width}, z.options().dtype(dtype),
                   at::MemoryFormat::ChannelsLast)
      .unflatten(0, {z.size(0), z.size(1)});
}

at::Tensor channels_last(const at::Tensor& x) {
  const at::Tensor rows = x.permute({0, 1, 3, 4, 2});
  return rows.is_contiguous() ? x : rows.contiguous().permute({0, 1, 4, 2, 3});
}

void check(const at::Tensor& z, const at::Tensor& gamma, int64_t pool) {
  TORCH_CHECK(z.dim() == 5, "norm_relu_pool: z must be [tasks, images, C, H, W], got ", z.sizes());
  TORCH_CHECK(z.numel() > 0, "norm_relu_pool: z is empty: ", z.sizes());
  TORCH_CHECK(pool == 1 || pool == 2, "norm_relu_pool: pool must be 1 or 2, got ", pool);
  TORCH_CHECK(gamma.dim() == 2 && (gamma.size(0) == 1 || gamma.size(0) == z.size(0)) && gamma.size(1) == z.size(2),
              "norm_relu_pool: gamma and beta must be [1 or ", z.size(0), ", ", z.size(2), "], got ", gamma.sizes());
  TORCH_CHECK(gamma.scalar_type() == z.scalar_type(), "norm_relu_pool: gamma and beta must be ", z.scalar_type(), ", got ",
              gamma.scalar_type());
}

// What the forward pass returned, and the gradient of y.
void check_saved(const at::Tensor& gy, const at::Tensor& z, const at::Tensor& index, const at::Tensor& mean,
                 const at::Tensor& rstd, int64_t pool) {
  for (const at::Tensor* t : {&mean, &rstd})
    TORCH_CHECK(t->dim() == 2 && t->size(0) == z.size(0) && t->size(1) == z.size(2),
                "norm_relu_pool_grad: mean and rstd must be [", z.size(0), ", ", z.size(2), "], got ", t->sizes());
  const int64_t pooled[] = {z.size(0), z.size(1), z.size(2), z.size(3) / pool, z.size(4) / pool};
  TORCH_CHECK(index.sizes() == at::IntArrayRef(pooled) && index.scalar_type() == at::kByte,
              "norm_relu_pool_grad: index must be ", at::IntArrayRef(pooled), " bytes, got ", index.sizes());
  TORCH_CHECK(gy.sizes() == index.sizes() && gy.scalar_type() == z.scalar_type(), "norm_relu_pool_grad: gy ", gy.sizes(),
              " ", gy.scalar_type(), " does not fit index ", index.sizes());
}

template <typename T, template <typename> class Params = lk::NormReluPool>
Params<T> describe(const at::Tensor& z, int64_t pool) {
  Params<T> p{};
  p.tasks = z.size(0);
  p.images = z.size(1);
  p.channels = z.size(2);
  p.height = z.size(3);
  p.width = z.size(4);
  p.pool = pool;
  lk::set_slabs<T>(p);
  p.z = z.const_data_ptr<T>();
  return p;
}

// What the backward kernels read of the forward pass.
template <typename T>
void read_back(lk::NormReluPool<T>& p, const at::Tensor& gy, const at::Tensor& gamma, const at::Tensor& index,
               const at::Tensor& mean, const at::Tensor& rstd) {
  p.gy = gy.const_data_ptr<T>();
  p.gamma = gamma.const_data_ptr<T>();
  p.gamma_task = gamma.size(0) == 1 ? 0 : p.channels;
  p.index = const_cast<uint8_t*>(index.const_data_ptr<uint8_t>());
  p.mean = const_cast<T*>(mean.const_data_ptr<T>());
  p.rstd = const_cast<T*>(rstd.const_data_ptr<T>());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lk::norm_relu_pool(const at::Tensor& z_, const at::Tensor& gamma_,
                                                                              const at::Tensor& beta_, double eps,
                                                                              int64_t pool) {
  check(z_, gamma_, pool);
  check(z_, beta_, pool);
  const at::Tensor z = channels_last(z_), gamma = gamma_.contiguous(), beta = beta_.contiguous();
  at::Tensor y = empty_images(z, z.scalar_type(), z.size(3) / pool, z.size(4) / pool);
  at::Tensor index = empty_images(z, at::kByte, z.size(3) / pool, z.size(4) / pool);
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
    lk::norm_forward(p);
  });
  return {y, index, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lk::norm_relu_pool_grad(const at::Tensor& gy_, const at::Tensor& z_,
                                                                       const at::Tensor& gamma_, const at::Tensor& index_,
                                                                       const at::Tensor& mean_, const at::Tensor& rstd_,
                                                                       int64_t pool, bool need_z) {
  check(z_, gamma_, pool);
  check_saved(gy_, z_, index_, mean_, rstd_, pool);
  const at::Tensor gy = channels_last(gy_), z = channels_last(z_), index = channels_last(index_);
  const at::Tensor gamma = gamma_.contiguous(), mean = mean_.contiguous(), rstd = rstd_.contiguous();
  at::Tensor dz = need_z ? empty_images(z, z.scalar_type(), z.size(3), z.size(4)) : at::empty({0}, z.options());
  at::Tensor dgamma = at::empty({z.size(0), z.size(2)}, z.options()), dbeta = at::empty(dgamma.sizes(), z.options());
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "norm_relu_pool_grad", [&] {
    auto p = describe<scalar_t>(z, pool);
    const at::Tensor partial = at::empty({p.tasks, p.images, p.slabs, 2, p.channels}, z.options().dtype(at::kDouble));
    read_back<scalar_t>(p, gy, gamma, index, mean, rstd);
    p.dgamma = dgamma.mutable_data_ptr<scalar_t>();
    p.dbeta = dbeta.mutable_data_ptr<scalar_t>();
    p.partial = partial.mutable_data_ptr<double>();
    p.dz = need_z ? dz.mutable_data_ptr<scalar_t>() : nullptr;
    lk::norm_backward(p);
  });
  return {dz, dgamma, dbeta};
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_relu_pool_grad_grad(
    const at::Tensor& gy_, const at::Tensor& z_, const at::Tensor& gamma_, const at::Tensor& index_,
    const at::Tensor& mean_, const at::Tensor& rstd_, int64_t pool, const std::optional<at::Tensor>& v_,
    const at::Tensor& v_gamma_, const at::Tensor& v_beta_, bool need_z) {
  check(z_, gamma_, pool);
  check(z_, v_gamma_, pool);
  check(z_, v_beta_, pool);
  check_saved(gy_, z_, index_, mean_, rstd_, pool);
  TORCH_CHECK(!v_ || (v_->sizes() == z_.sizes() && v_->scalar_type() == z_.scalar_type()),
              "norm_relu_pool_grad_grad: v must be like z, ", z_.sizes());
  const at::Tensor gy = channels_last(gy_), z = channels_last(z_), index = channels_last(index_);
  const at::Tensor v = v_ ? channels_last(*v_) : at::Tensor();
  const at::Tensor gamma = gamma_.contiguous(), mean = mean_.contiguous(), rstd = rstd_.contiguous();
  const at::Tensor v_gamma = v_gamma_.expand(mean.sizes()).contiguous(), v_beta = v_beta_.expand(mean.sizes()).contiguous();
  at::Tensor d_gy = empty_images(z, z.scalar_type(), gy.size(3), gy.size(4));
  at::Tensor d_z = need_z ? empty_images(z, z.scalar_type(), z.size(3), z.size(4)) : at::empty({0}, z.options());
  at::Tensor d_gamma = at::empty(mean.sizes(), z.options());
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "norm_relu_pool_grad_grad", [&] {
    auto p = describe<scalar_t, lk::NormReluPoolSecond>(z, pool);
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
    const auto& kernels = lk::norm_relu_pool_kernels<scalar_t>();
    lk::run_norm(kernels.reduce_second, p, p.tasks * p.images * p.slabs);
    lk::run_norm(kernels.merge_second, p, p.tasks);
    lk::run_norm(kernels.dense_second, p, p.tasks * p.images * ((p.height + pool - 1) / pool));
  });
  return {d_gy, d_z, d_gamma};
}

}  // namespace

TORCH_LIBRARY(lambda_kernels, m) {
  // z [T, N, C, H, W], gamma and beta [1 or T, C] -> y, index [T, N, C, H / pool, W / pool], mean, rstd [T, C]
  m.def("norm_relu_pool(Tensor z, Tensor gamma, Tensor beta, float eps, int pool) -> (Tensor, Tensor, Tensor, Tensor)");
  // -> dz (empty unless need_z), dgamma, dbeta [T, C]
  m.def("norm_relu_pool_grad(Tensor gy, Tensor z, Tensor gamma, Tensor index, Tensor mean, Tensor rstd, int pool, "
        "bool need_z) -> (Tensor, Tensor, Tensor)");
  // The gradients of norm_relu_pool_grad's results in direction v [as z or None], v_gamma, v_beta [1 or T, C]
  // -> d_gy, d_z (empty unless need_z), d_gamma [T, C]
  m.def("norm_relu_pool_grad_grad(Tensor gy, Tensor z, Tensor gamma, Tensor index, Tensor mean, Tensor rstd, int pool, "
        "Tensor? v, Tensor v_gamma, Tensor v_beta, bool need_z) -> (Tensor, Tensor, Tensor)");
  // A block that nobody wants a gradient of: x [1 or T, N, C, H, W], weight [1 or T, O, C, kh, kw] -> y, mean, rstd
  m.def("frozen_block(Tensor x, Tensor weight, Tensor gamma, Tensor beta, int[] geometry, float eps) -> "
        "(Tensor, Tensor, Tensor)");
  // x [1 or T, N, C, H, W] -> moments [1 or T, K + 1, K + 1], float64; geometry: stride, padding, dilation (vertical,
  // horizontal each), pool
  m.def("image_moments(Tensor x, int[] kernel, int[] geometry) -> Tensor");
  // -> y, index [T, N, O, H', W'], mean, rstd [T, O]
  m.def("image_block(Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor moments, int[] geometry, float eps) -> "
        "(Tensor, Tensor, Tensor, Tensor)");
  // -> dweight [T, O, C, kh, kw], dgamma, dbeta [T, O]
  m.def("image_block_grad(Tensor gy, Tensor x, Tensor weight, Tensor gamma, Tensor index, Tensor rstd, Tensor moments, "
        "int[] geometry) -> (Tensor, Tensor, Tensor)");
  // Convolutions of 3x3 pixels, stride 1: x [1 or T, N, C, H, W], weight [1 or T, O, C, 3, 3] -> y [T, N, O, H', W']
  m.def("winograd(Tensor x, Tensor weight, int[] padding) -> Tensor");
  m.def("winograd_input_grad(Tensor gy, Tensor weight, int[] x, int[] padding) -> Tensor");    // sizes of x
  m.def("winograd_weight_grad(Tensor gy, Tensor x, int[] weight, int[] padding) -> Tensor");  // sizes of the weight
  // x [T, N, C, H, W] (without blocks [T, N, F]), labels [T, N]; parameters, each [1 or T, ...]: weight, gamma, beta a
  // block, then the linear layer's weight and bias; updated: which of them are, in place; geometry: 8 numbers a block
  // -> [steps + 1, T], float64: the support loss before each step, and 0 where the updated parameters are finite, else NaN
  m.def("inner_loop(Tensor x, Tensor labels, Tensor(a!)[] parameters, int[] updated, int[] geometry, float[] eps, "
        "int steps, float lr) -> Tensor");
  // The same with parameters [...] or [T, ...] that are left as they are -> and the updated ones' new values, [T, ...],
  // without the axis where T is 1 and the parameter came without
  m.def("adapted(Tensor x, Tensor labels, Tensor[] parameters, int[] updated, int[] geometry, float[] eps, int steps, "
        "float lr) -> (Tensor, Tensor[])");
  // The same -> and the logits [T, Q, ways] of query images [T, Q, ...], by each task's own parameters and statistics
  m.def("classified(Tensor x, Tensor labels, Tensor query, Tensor[] parameters, int[] updated, int[] geometry, float[] eps, "
        "int steps, float lr) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lambda_kernels, CPU, m) {
  m.impl("norm_relu_pool", &lk::norm_relu_pool);
  m.impl("norm_relu_pool_grad", &lk::norm_relu_pool_grad);
  m.impl("norm_relu_pool_grad_grad", &norm_relu_pool_grad_grad);
  m.impl("frozen_block", &lk::frozen_block);
  m.impl("image_moments", &lk::image_moments);
  m.impl("image_block", &lk::image_block);
  m.impl("image_block_grad", &lk::image_block_grad);
  m.impl("winograd", &lk::winograd);
  m.impl("winograd_input_grad", &lk::winograd_input_grad);
  m.impl("winograd_weight_grad", &lk::winograd_weight_grad);
  m.impl("inner_loop", &lk::inner_loop);
  m.impl("adapted", &lk::adapted);
  m.impl("classified", &lk::classified);
}

namespace {

// The classes of `objects`, and the addresses of all keys and values in `containers` (dicts and lists): equal to an
// earlier result as long as nothing in them was replaced, given that what was in them is kept alive.
pybind11::bytes addresses(const pybind11::list& objects, const pybind11::list& containers) {
  std::vector<const void*> found;
  found.reserve(2048);
  for (pybind11::handle object : objects) found.push_back(Py_TYPE(object.ptr()));
  for (pybind11::handle container : containers) {
    found.push_back(nullptr);  // where one ends and the next begins
    if (PyList_Check(container.ptr())) {
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(container.ptr()); ++i) found.push_back(PyList_GET_ITEM(container.ptr(), i));
    } else {
      PyObject *key, *value;
      for (Py_ssize_t at = 0; PyDict_Next(container.ptr(), &at, &key, &value);) {
        found.push_back(key);
        found.push_back(value);
      }
    }
  }
  return {reinterpret_cast<const char*>(found.data()), found.size() * sizeof(void*)};
}

}  // namespace

void bind_plan(pybind11::module_& m);  // plan.cpp

PYBIND11_MODULE(_C, m) {
  bind_plan(m);
  m.def("addresses", &addresses, "Bytes that change when a class of `objects` or an entry of the dicts or lists does.");
  m.def("kept_bytes", &lk::kept_bytes, "Bytes of scratch memory that wait for the next call.");
  m.def("isa", &lk::isa, "Instruction set of the CPU kernels: avx512, avx2 or generic (LAMBDA_KERNELS_ISA forces one).");
}
