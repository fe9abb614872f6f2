// The operators, on tensors; binding.cpp says what each computes.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace lk {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_relu_pool(const at::Tensor& z, const at::Tensor& gamma,
                                                                          const at::Tensor& beta, double eps, int64_t pool);
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_relu_pool_grad(const at::Tensor& gy, const at::Tensor& z,
                                                                   const at::Tensor& gamma, const at::Tensor& index,
                                                                   const at::Tensor& mean, const at::Tensor& rstd,
                                                                   int64_t pool, bool need_z);

std::tuple<at::Tensor, at::Tensor, at::Tensor> frozen_block(const at::Tensor& x, const at::Tensor& weight,
                                                            const at::Tensor& gamma, const at::Tensor& beta,
                                                            at::IntArrayRef geometry, double eps);

at::Tensor image_moments(const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef geometry);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> image_block(const at::Tensor& x, const at::Tensor& weight,
                                                                       const at::Tensor& gamma, const at::Tensor& beta,
                                                                       const at::Tensor& moments,
                                                                       at::IntArrayRef geometry, double eps);
std::tuple<at::Tensor, at::Tensor, at::Tensor> image_block_grad(const at::Tensor& gy, const at::Tensor& x,
                                                                const at::Tensor& weight, const at::Tensor& gamma,
                                                                const at::Tensor& index, const at::Tensor& rstd,
                                                                const at::Tensor& moments, at::IntArrayRef geometry);

at::Tensor winograd(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef padding);
at::Tensor winograd_input_grad(const at::Tensor& gy, const at::Tensor& weight, at::IntArrayRef x, at::IntArrayRef padding);
at::Tensor winograd_weight_grad(const at::Tensor& gy, const at::Tensor& x, at::IntArrayRef weight, at::IntArrayRef padding);

at::Tensor inner_loop(const at::Tensor& x, const at::Tensor& labels, at::TensorList parameters, at::IntArrayRef updated,
                      at::IntArrayRef geometry, at::ArrayRef<double> eps, int64_t steps, double lr);
std::tuple<at::Tensor, std::vector<at::Tensor>> adapted(const at::Tensor& x, const at::Tensor& labels,
                                                        at::TensorList parameters, at::IntArrayRef updated,
                                                        at::IntArrayRef geometry, at::ArrayRef<double> eps, int64_t steps,
                                                        double lr);
std::tuple<at::Tensor, at::Tensor> classified(const at::Tensor& x, const at::Tensor& labels, const at::Tensor& query,
                                              at::TensorList parameters, at::IntArrayRef updated, at::IntArrayRef geometry,
                                              at::ArrayRef<double> eps, int64_t steps, double lr);

}  // namespace lk
