// The inner loop of first-order adaptation without autograd: all K steps of a chain of fused blocks that ends in a linear
// layer and softmax cross-entropy, for one task or for many, each with parameters of its own.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "block.h"

namespace lk {
namespace {

constexpr int64_t kPerBlock = 3;     // weight, gamma, beta
constexpr int64_t kGeometry = 8;     // stride, padding, dilation (vertical, horizontal each), groups, pool

struct Geometry {
  at::IntArrayRef stride, padding, dilation;  // vertical, horizontal
  int64_t groups;

  // Size of the result for images [N, C, H, W] and a weight [O, C / groups, kh, kw].
  std::pair<int64_t, int64_t> output(at::IntArrayRef x, at::IntArrayRef weight) const {
    const auto along = [&](int axis) {
      return (x[2 + axis] + 2 * padding[axis] - dilation[axis] * (weight[2 + axis] - 1) - 1) / stride[axis] + 1;
    };
    return {along(0), along(1)};
  }
};

constexpr int64_t kMostColumns = 1 << 18;  // numbers of a patch matrix that stays in the second-level cache

// A convolution of few pixels as matrix products over its patches [M, K], K = kh kw C: for these a call of the library's
// convolution takes longer than its arithmetic. The weight is kept as [K, O] over all steps.
class Columns {
 public:
  static bool takes(const at::Tensor& x, at::IntArrayRef weight, const Geometry& of) {
    const auto [rows, columns] = of.output(x.sizes(), weight);
    return of.groups == 1 && x.size(0) * rows * columns * weight[1] * weight[2] * weight[3] <= kMostColumns;
  }

  Columns(const at::Tensor& weight, const Geometry& of)
      : of_(of), kernel_(weight.sizes().vec()),
        weight_(weight.permute({2, 3, 1, 0}).reshape({-1, weight.size(0)}).clone()) {}

  // x [N, C, H, W] -> [N, O, H', W'], both channels-last
  at::Tensor forward(const at::Tensor& x) {
    const auto [rows, columns] = of_.output(x.sizes(), kernel_);
    if (!x.is_same(x_)) {
      x_ = x, rows_ = rows, columns_ = columns;
      patches_ = at::empty({x.size(0) * rows * columns, weight_.size(0)}, x.options());
      move<false>(x.permute({0, 2, 3, 1}).contiguous(), patches_);
    }
    return at::mm(patches_, weight_).view({x.size(0), rows, columns, kernel_[0]}).permute({0, 3, 1, 2});
  }

  at::Tensor input_gradient(const at::Tensor& dz) {
    const at::Tensor pixels = at::zeros({x_.size(0), x_.size(2), x_.size(3), x_.size(1)}, dz.options());
    move<true>(pixels, at::mm(rows_of(dz), weight_.t()));
    return pixels.permute({0, 3, 1, 2});
  }

  void descend(const at::Tensor& dz, double lr) { weight_.addmm_(patches_.t(), rows_of(dz), 1, -lr); }

  // The weight [O, C, kh, kw] as it is now.
  at::Tensor weight() const { return weight_.view({kernel_[2], kernel_[3], kernel_[1], kernel_[0]}).permute({3, 2, 0, 1}); }

 private:
  at::Tensor rows_of(const at::Tensor& dz) const { return dz.permute({0, 2, 3, 1}).reshape({-1, kernel_[0]}); }

  // Copies images [N, H, W, C] to patches, or adds patches to images.
  template <bool kBack>
  void move(const at::Tensor& images, const at::Tensor& patches) const {
    const int64_t height = images.size(1), width = images.size(2), C = images.size(3), K = weight_.size(0);
    AT_DISPATCH_FLOATING_TYPES(images.scalar_type(), "inner_loop", [&] {
      scalar_t* const image = images.mutable_data_ptr<scalar_t>();
      scalar_t* to = patches.mutable_data_ptr<scalar_t>();
      for (int64_t m = 0; m < patches.size(0); ++m, to += K) {
        const int64_t n = m / (rows_ * columns_), row = m / columns_ % rows_, column = m % columns_;
        for (int64_t i = 0; i < kernel_[2]; ++i)
          for (int64_t j = 0; j < kernel_[3]; ++j) {
            const int64_t h = row * of_.stride[0] - of_.padding[0] + i * of_.dilation[0];
            const int64_t w = column * of_.stride[1] - of_.padding[1] + j * of_.dilation[1];
            scalar_t* const own = to + (i * kernel_[3] + j) * C;
            const bool inside = h >= 0 && h < height && w >= 0 && w < width;
            scalar_t* const pixel = image + ((n * height + h) * width + w) * C;
            if (kBack && inside)
              for (int64_t c = 0; c < C; ++c) pixel[c] += own[c];
            else if (!kBack && inside)
              std::copy(pixel, pixel + C, own);
            else if (!kBack)
              std::fill(own, own + C, scalar_t(0));
          }
      }
    });
  }

  Geometry of_;
  std::vector<int64_t> kernel_;  // O, C, kh, kw
  at::Tensor weight_, x_, patches_;
  int64_t rows_ = 0, columns_ = 0;
};

struct Block {
  Geometry of;
  int64_t pool;
  double eps;
  bool update_weight, update_gamma, update_beta;
  bool below;  // an updated parameter lies in a block before this one, so the input gradient is needed
  at::Tensor weight, gamma, beta;         // this task's, [O, C / groups, kh, kw], [1, O], [1, O]
  at::Tensor x, z, index, mean, rstd;     // of the current step
  std::optional<Images> images;           // of a first block that is updated, in place of z
  at::Tensor moments;
  std::optional<Columns> columns;         // of a block with few pixels, in place of the library's convolution
};

// Replaces logits [N, ways] by d loss / d logits of the mean cross-entropy; returns the loss.
template <typename T>
double cross_entropy_(T* logits, const int64_t* labels, int64_t images, int64_t ways) {
  double loss = 0.0;
  for (int64_t n = 0; n < images; ++n, logits += ways) {
    TORCH_CHECK(labels[n] >= 0 && labels[n] < ways, "inner_loop: label ", labels[n], " is not one of 0 to ", ways - 1);
    T top = logits[0];
    for (int64_t k = 1; k < ways; ++k) top = logits[k] > top ? logits[k] : top;
    const T own = logits[labels[n]];
    double sum = 0.0;
    for (int64_t k = 0; k < ways; ++k) sum += std::exp(double(logits[k] - top));
    loss += std::log(sum) - double(own - top);
    for (int64_t k = 0; k < ways; ++k) logits[k] = T(std::exp(double(logits[k] - top)) / sum / double(images));
    logits[labels[n]] -= T(1) / T(images);
  }
  return loss / double(images);
}

// One task: x [N, C, H, W] or [N, F], labels [N]; updated parameters are changed in place.
void adapt(at::Tensor x, const at::Tensor& labels, std::vector<Block>& blocks, const at::Tensor& head, const at::Tensor& bias,
           bool update_head, bool update_bias, int64_t steps, double lr, double* losses, int64_t stride) {
  bool any_block = false;
  for (const Block& block : blocks) any_block |= block.update_weight || block.update_gamma || block.update_beta;
  if (!blocks.empty()) {
    Block& first = blocks.front();
    if ((first.update_weight || first.update_gamma || first.update_beta) &&
        Images::takes(first.weight.sizes(), first.of.groups, first.pool)) {
      first.images.emplace(x, first.weight.sizes().slice(2), first.of.stride, first.of.padding, first.of.dilation,
                           first.pool);
      first.moments = first.images->moments();
    }
  }
  at::Tensor fixed = blocks.empty() ? x.contiguous() : at::Tensor();
  for (int64_t step = 0; step < steps; ++step) {
    at::Tensor a = x;
    for (Block& block : blocks) {
      if (block.images) {
        std::tie(a, block.index, block.mean, block.rstd) =
            block.images->forward(block.weight, block.gamma[0], block.beta[0], block.moments, block.eps);
        continue;
      }
      block.x = a;
      if (step == 0 && Columns::takes(a, block.weight.sizes(), block.of))
        block.columns.emplace(block.weight, block.of);
      block.z = (block.columns ? block.columns->forward(a)
                               : at::convolution(a, block.weight, {}, block.of.stride, block.of.padding, block.of.dilation,
                                                 false, {0, 0}, block.of.groups))
                    .unsqueeze(0);
      at::Tensor y;
      std::tie(y, block.index, block.mean, block.rstd) =
          norm_relu_pool(block.z, block.gamma, block.beta, block.eps, block.pool);
      a = y.squeeze(0);
    }
    const at::Tensor features = blocks.empty() ? fixed : a.flatten(1);
    at::Tensor g = at::addmm(bias, features, head.t());
    AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "inner_loop", [&] {
      losses[step * stride] = cross_entropy_(g.mutable_data_ptr<scalar_t>(), labels.const_data_ptr<int64_t>(), g.size(0),
                                             g.size(1));
    });
    at::Tensor ga = any_block ? at::mm(g, head).view(a.sizes()) : at::Tensor();
    if (update_head) head.addmm_(g.t(), features, 1, -lr);
    if (update_bias) bias.add_(g.sum(0), -lr);
    bool go_on = any_block;
    for (auto block = blocks.rbegin(); go_on && block != blocks.rend(); ++block) {
      if (block->images) {
        const auto [gw, dgamma, dbeta] = block->images->backward(ga, block->weight, block->gamma[0], block->index,
                                                                 block->mean, block->rstd, block->moments);
        if (block->update_weight) block->weight.add_(gw, -lr);
        if (block->update_gamma) block->gamma.add_(dgamma, -lr);
        if (block->update_beta) block->beta.add_(dbeta, -lr);
        break;
      }
      const bool need_z = block->update_weight || block->below;
      const auto [dz_, dgamma, dbeta] = norm_relu_pool_grad(ga.unsqueeze(0), block->z, block->gamma, block->index,
                                                            block->mean, block->rstd, block->pool, need_z);
      if (block->update_gamma) block->gamma.add_(dgamma, -lr);
      if (block->update_beta) block->beta.add_(dbeta, -lr);
      if (need_z) {
        const at::Tensor dz = dz_.squeeze(0);
        if (block->columns) {
          if (block->below) ga = block->columns->input_gradient(dz);
          if (block->update_weight) block->columns->descend(dz, lr);
          go_on = block->below;
          continue;
        }
        const auto [gx, gw, _] = at::convolution_backward(dz, block->x, block->weight, {}, block->of.stride, block->of.padding,
                                                          block->of.dilation, false, {0, 0}, block->of.groups,
                                                          {block->below, block->update_weight, false});
        if (block->update_weight) block->weight.add_(gw, -lr);
        ga = gx;
      }
      go_on = block->below;
    }
  }
  for (const Block& block : blocks)
    if (block.columns && block.update_weight) block.weight.copy_(block.columns->weight());
}

}  // namespace

at::Tensor inner_loop(const at::Tensor& x, const at::Tensor& labels, at::TensorList parameters, at::IntArrayRef updated,
                      at::IntArrayRef geometry, at::ArrayRef<double> eps, int64_t steps, double lr) {
  const int64_t blocks = int64_t(eps.size()), tasks = labels.size(0);
  TORCH_CHECK(int64_t(parameters.size()) == kPerBlock * blocks + 2 && parameters.size() == updated.size() &&
                  int64_t(geometry.size()) == kGeometry * blocks,
              "inner_loop: ", blocks, " blocks need ", kPerBlock * blocks + 2, " parameters and flags and ",
              kGeometry * blocks, " numbers, got ", parameters.size(), ", ", updated.size(), " and ", geometry.size());
  TORCH_CHECK(x.dim() == (blocks > 0 ? 5 : 3) && x.size(0) == tasks && labels.dim() == 2 && labels.size(1) == x.size(1),
              "inner_loop: x ", x.sizes(), " does not fit labels ", labels.sizes());
  TORCH_CHECK(labels.scalar_type() == at::kLong, "inner_loop: labels must be int64, got ", labels.scalar_type());
  for (size_t i = 0; i < parameters.size(); ++i)
    TORCH_CHECK(parameters[i].scalar_type() == x.scalar_type() &&
                    (parameters[i].size(0) == tasks || (parameters[i].size(0) == 1 && !updated[i])),
                "inner_loop: parameter ", i, " ", parameters[i].sizes(), " ", parameters[i].scalar_type(), " does not fit ",
                tasks, " tasks in ", x.scalar_type());
  const at::Tensor losses = at::empty({steps, tasks}, x.options().dtype(at::kDouble));
  double* out = losses.mutable_data_ptr<double>();
  const at::Tensor rows = labels.contiguous();
  const bool parallel = tasks >= at::get_num_threads();  // else the operators use the threads inside a task
  at::parallel_for(0, tasks, parallel ? 1 : tasks, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
#ifdef _OPENMP
    // oneDNN keeps its primitives by the number of threads: one made for two of them waits forever inside a parallel
    // region, where it gets one. This holds for the present region only.
    // torch sets a thread's number when it first asks for it, here and in its own library: ask before.
    if (parallel && at::in_parallel_region()) {
      at::internal::lazy_init_num_threads();
      at::get_num_threads();
      omp_set_num_threads(1);
    }
#endif
    for (int64_t task = begin; task < end; ++task) {
      const auto own = [&](int64_t i) { return parameters[i].select(0, parameters[i].size(0) == 1 ? 0 : task); };
      std::vector<Block> chain;
      bool below = false;
      for (int64_t b = 0; b < blocks; ++b) {
        const at::IntArrayRef numbers = geometry.slice(b * kGeometry, kGeometry);
        const int64_t first = b * kPerBlock;
        Block block{{numbers.slice(0, 2), numbers.slice(2, 2), numbers.slice(4, 2), numbers[6]}, numbers[7], eps[b],
                    updated[first] != 0, updated[first + 1] != 0, updated[first + 2] != 0, below,
                    own(first), own(first + 1).unsqueeze(0), own(first + 2).unsqueeze(0), {}, {}, {}, {}, {}, {}, {}, {}};
        below = below || block.update_weight || block.update_gamma || block.update_beta;
        chain.push_back(std::move(block));
      }
      const int64_t head = blocks * kPerBlock;
      adapt(x[task], rows[task], chain, own(head), own(head + 1), updated[head] != 0, updated[head + 1] != 0, steps, lr,
            out + task, tasks);
    }
  });
  return losses;
}

}  // namespace lk
