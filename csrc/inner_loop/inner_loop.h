// The operator inner_loop, on tensors.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace lk {

// K steps of gradient descent on the mean cross-entropy of each task, for a chain of fused blocks and a linear layer.
//
// x [T, N, C, H, W] (without blocks [T, N, F]); labels [T, N]; parameters, each [...] or [T, ...]: weight, gamma and beta
// per block, then the linear layer's weight and bias; updated: one flag per parameter; geometry: stride, padding, dilation
// (vertical, horizontal each), groups and pool per block; eps: one per block; rates: one number for all, or one per step
// and updated parameter, step by step; query [T, Q, ...].
//
// -> rows [steps + 1, T], float64: the loss before each step, and 0 where all of a task's updated parameters are finite,
// else NaN; the updated parameters' new values, [T, ...], without the axis where T is 1 and they came without; the query
// images' logits [T, Q, ways], or [0] without a query.
[[gnu::visibility("default")]]
std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor> inner_loop(const at::Tensor& x, const at::Tensor& labels,
                                                                       at::TensorList parameters, at::IntArrayRef updated,
                                                                       at::IntArrayRef geometry, at::ArrayRef<double> eps,
                                                                       int64_t steps, at::ArrayRef<double> rates,
                                                                       const std::optional<at::Tensor>& query);

}  // namespace lk
