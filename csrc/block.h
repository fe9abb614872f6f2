// The fused block's kernels on tensors, for the operators and for the inner loop.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace lk {

// z [T, N, C, H, W], gamma and beta [1 or T, C] -> y, index [T, N, C, H / pool, W / pool], mean, rstd [T, C]
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_relu_pool(const at::Tensor& z, const at::Tensor& gamma,
                                                                          const at::Tensor& beta, double eps, int64_t pool);

// -> dz (empty unless need_z), dgamma, dbeta [T, C]
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_relu_pool_grad(const at::Tensor& gy, const at::Tensor& z,
                                                                   const at::Tensor& gamma, const at::Tensor& index,
                                                                   const at::Tensor& mean, const at::Tensor& rstd,
                                                                   int64_t pool, bool need_z);

// The images of one task x [N, C, H, W] and a convolution over them, for a first block that keeps no convolution output:
// its statistics come from the moments of the patches (Reference.image_moments in reference.py).
class Images {
 public:
  static bool takes(at::IntArrayRef weight, int64_t groups, int64_t pool);  // weight [O, C / groups, kh, kw]

  Images(const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
         at::IntArrayRef dilation, int64_t pool);

  // [K + 1, K + 1] float64
  at::Tensor moments() const;
  // weight [O, C, kh, kw], gamma and beta [O] -> y, index [N, O, H', W'], mean, rstd [O]
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& weight, const at::Tensor& gamma,
                                                                     const at::Tensor& beta, const at::Tensor& moments,
                                                                     double eps) const;
  // -> dweight, dgamma, dbeta
  std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& gy, const at::Tensor& weight,
                                                          const at::Tensor& gamma, const at::Tensor& index,
                                                          const at::Tensor& mean, const at::Tensor& rstd,
                                                          const at::Tensor& moments) const;

 private:
  template <typename P>
  void describe(P& p, int64_t outputs) const;

  at::Tensor padded_;  // [N, C, H + 2 padding, W + 2 padding] channels-last, less each channel's level
  std::vector<int64_t> stride_, offsets_;
  std::vector<double> levels_;  // [K]
  int64_t pool_, taps_, out_rows_, out_columns_;
};

// K steps of first-order adaptation of a chain of blocks and a linear layer; see inner_loop.cpp.
at::Tensor inner_loop(const at::Tensor& x, const at::Tensor& labels, at::TensorList parameters, at::IntArrayRef updated,
                      at::IntArrayRef geometry, at::ArrayRef<double> eps, int64_t steps, double lr);

}  // namespace lk
