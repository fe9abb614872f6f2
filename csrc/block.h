// The fused block's kernels on tensors, for the operators and for the inner loop.
#pragma once
#include <ATen/core/Tensor.h>

#include <tuple>

namespace lk {

// z [T, N, C, H, W], gamma and beta [1 or T, C] -> y, index [T, N, C, H / pool, W / pool], mean, rstd [T, C]
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_relu_pool(const at::Tensor& z, const at::Tensor& gamma,
                                                                          const at::Tensor& beta, double eps, int64_t pool);

// -> dz (empty unless need_z), dgamma, dbeta [T, C]
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_relu_pool_grad(const at::Tensor& gy, const at::Tensor& z,
                                                                   const at::Tensor& gamma, const at::Tensor& index,
                                                                   const at::Tensor& mean, const at::Tensor& rstd,
                                                                   int64_t pool, bool need_z);

// K steps of first-order adaptation of a chain of blocks and a linear layer; see inner_loop.cpp.
at::Tensor inner_loop(const at::Tensor& x, const at::Tensor& labels, at::TensorList parameters, at::IntArrayRef updated,
                      at::IntArrayRef geometry, at::ArrayRef<double> eps, int64_t steps, double lr);

}  // namespace lk
