// A fused block of a chain, with derivatives along a direction of its parameters: convolution, norm, ReLU and max-pool.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <type_traits>

#include "arena.h"
#include "image_block.h"
#include "norm_relu_pool.h"
#include "norm_tangent.h"
#include "outer/convolution_tangent.h"

namespace lk {

// Dense parameters of one task, or gradients of them: weight [O, C / groups, kh, kw], gamma and beta [O]; null for none.
template <typename T>
struct Parameters {
  T *weight, *gamma, *beta;
};

// What a forward pass leaves for the way back, in one piece of memory.
template <typename T>
struct Activations {
  T *z, *y, *mean, *rstd;  // z is null for a first block by its patches' moments
  uint8_t* index;
  double* moments;  // of a first block's patches, else null

  struct Counts {
    int64_t z, y, outputs, moments;  // values; 0 where there are none
  };

  // Lays them out from `memory` on (null to count alone) and returns the bytes that they take; what lies between them is
  // set to zero where they are not filled yet.
  int64_t lay_out(const Counts& counts, std::byte* memory, bool is_filled) {
    int64_t used = 0;
    const auto take = [&](auto*& to, int64_t count) {
      to = nullptr;
      if (count == 0) return;
      const int64_t own = count * int64_t(sizeof(*to)), whole = up(own + kLanes * int64_t(sizeof(*to)), 64);
      if (memory != nullptr) {
        to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(memory + used);
        if (!is_filled) std::fill(memory + used + own, memory + used + whole, std::byte(0));
      }
      used += whole;  // readable for 16 values beyond
    };
    take(z, counts.z), take(y, counts.y), take(mean, counts.outputs), take(rstd, counts.outputs), take(index, counts.y);
    take(moments, counts.moments);
    return used;
  }
};

// The images that a first block takes by their patches: where they lie.
template <typename T>
struct Images {
  const T* data;
  const int64_t* strides;  // of image, channel, row, column; elements
};

template <typename T>
class OuterBlock {
 public:
  // first: the images, where the block goes by their patches' moments
  OuterBlock(const Convolution& c, int64_t pool, double eps, const Images<T>* first, const at::TensorOptions& options,
             Arena& arena)
      : c_(c) {
    const int64_t pooled = c.images * (c.rows / pool) * (c.columns / pool) * c.outputs;
    const int64_t side = c.inputs * c.kernel[0] * c.kernel[1] + 1;
    const typename Activations<T>::Counts counts{first != nullptr ? 0 : c.pixels() * c.outputs, pooled, c.outputs,
                                                 first != nullptr ? side * side : 0};
    kept_.lay_out(counts, arena.take<std::byte>(kept_.lay_out(counts, nullptr, true)), false);
    const Activations<T>& kept = kept_;
    if (first != nullptr) {
      images_.emplace(c, pool, first->data, first->strides, arena);
      images_->moments(kept.moments, arena);
      patches_.emplace(c.inputs * c.kernel[0] * c.kernel[1], kept.moments);
    } else {
      convolution_ = convolution_tangent<T>(c, options);
    }
    norm_ = {};
    norm_.tasks = 1, norm_.images = c.images, norm_.channels = c.outputs, norm_.height = c.rows, norm_.width = c.columns;
    norm_.pool = pool, norm_.eps = eps;
    set_slabs(norm_);
    norm_.z = kept.z, norm_.y = kept.y, norm_.index = kept.index, norm_.mean = kept.mean, norm_.rstd = kept.rstd;
  }

  int64_t inputs() const { return c_.images * c_.height * c_.width * c_.inputs; }
  int64_t outputs() const { return c_.images * (norm_.height / norm_.pool) * (norm_.width / norm_.pool) * c_.outputs; }
  const T* y() const { return kept_.y; }
  const T* y_dot() const { return norm_.y_dot; }  // null where y does not move

  // x, its derivative (null for zeros) -> y and y_dot. Buffers of the derivative stay in the arena for the way back.
  void forward(Dual<const T> x, const Parameters<const T>& now, const Parameters<const T>& dot, Arena& arena) {
    x_ = x, now_ = now, dot_ = dot;
    norm_.gamma = now.gamma, norm_.beta = now.beta;
    const bool z_moves = !images_ && (x.dot != nullptr || dot.weight != nullptr);
    const bool moves = z_moves || dot.weight != nullptr || dot.gamma != nullptr || dot.beta != nullptr;
    norm_.y_dot = moves ? arena.take<T>(outputs()) : nullptr;
    if (images_) {
      images_->block(now.weight, now.gamma, now.beta, *patches_, norm_.eps, kept_.y, kept_.index, kept_.mean, kept_.rstd,
                     arena);
      if (moves) images_->follow(affine(now), affine(dot), kept_.rstd, kept_.index, *patches_, norm_.y_dot, arena);
      return;
    }
    T* const z_dot = z_moves ? arena.take<T>(c_.pixels() * c_.outputs) : nullptr;
    convolution_->forward(x, {now.weight, dot.weight}, {kept_.z, z_dot}, arena);
    norm_.z_dot = z_dot;
    moments_ = {arena.take<double>(c_.outputs), arena.take<double>(c_.outputs)};
    std::fill(moments_.mean, moments_.mean + c_.outputs, 0.0);
    std::fill(moments_.turn, moments_.turn + c_.outputs, 0.0);
    const Arena::Mark mark = arena.mark();
    norm_.partial = arena.take<double>(c_.images * norm_.slabs * 2 * c_.outputs);
    run_norm_relu_pool(static_cast<const NormReluPool<T>&>(norm_));
    arena.rewind(mark);
    if (moves) run_norm_tangent(norm_, dot.gamma, dot.beta, moments_, arena);
  }

  // gy and its derivative (null for none) -> gx unless it is null, with its derivative; slopes += scales times the gradients
  // of the parameters, along += their derivatives, each unless it is null.
  void backward(Dual<const T> gy, Dual<T> gx, const Parameters<T>& slopes, const Parameters<const T>& scales,
                const Parameters<T>& along, Arena& arena) {
    const Arena::Mark mark = arena.mark();
    const int64_t O = c_.outputs, taps = images_ ? c_.inputs * c_.kernel[0] * c_.kernel[1] : 0;
    T *const dgamma = arena.take<T>(O), *const dbeta = arena.take<T>(O);
    T *const dgamma_dot = arena.take<T>(O), *const dbeta_dot = arena.take<T>(O);
    if (images_) {
      T *const dweight = arena.take<T>(O * taps), *const dweight_dot = arena.take<T>(O * taps);
      if (gy.dot != nullptr)
        images_->block_grad(gy.value, gy.dot, affine(now_), affine(dot_), kept_.index, kept_.rstd, *patches_,
                            {dweight, dgamma, dbeta}, {dweight_dot, dgamma_dot, dbeta_dot}, arena);
      else
        images_->block_grad(gy.value, now_.weight, now_.gamma, kept_.index, kept_.rstd, *patches_, dweight, dgamma, dbeta,
                            arena);
      add(slopes.weight, scales.weight, dweight, O * taps);
      if (gy.dot != nullptr) add(along.weight, nullptr, dweight_dot, O * taps);
    } else {
      const int64_t values = c_.pixels() * O;
      const bool along_weight = along.weight != nullptr && gy.dot != nullptr;
      const bool dense = slopes.weight != nullptr || along_weight || gx.value != nullptr;
      norm_.gy = gy.value, norm_.gy_dot = gy.dot, norm_.dgamma = dgamma, norm_.dbeta = dbeta;
      norm_.dz = dense ? arena.take<T>(values) : nullptr;
      norm_.dz_dot = dense && gy.dot != nullptr ? arena.take<T>(values) : nullptr;
      if (gy.dot != nullptr) {
        run_norm_tangent_grad(norm_, dot_.gamma, moments_, dgamma_dot, dbeta_dot, arena);
      } else {
        norm_.partial = arena.take<double>(c_.images * norm_.slabs * 2 * O);
        run_norm_relu_pool_grad(static_cast<const NormReluPool<T>&>(norm_));
      }
      const Dual<const T> dz{norm_.dz, norm_.dz_dot};
      convolution_->weight_gradient(x_, dz, slopes.weight, scales.weight == nullptr ? T(1) : *scales.weight,
                                    along_weight ? along.weight : nullptr, arena);
      if (gx.value != nullptr) convolution_->input_gradient(dz, {now_.weight, dot_.weight}, gx, arena);
    }
    add(slopes.gamma, scales.gamma, dgamma, O), add(slopes.beta, scales.beta, dbeta, O);
    if (gy.dot != nullptr) add(along.gamma, nullptr, dgamma_dot, O), add(along.beta, nullptr, dbeta_dot, O);
    arena.rewind(mark);
  }

 private:
  using Affine = typename ImageConvolution<T>::Affine;
  static Affine affine(const Parameters<const T>& p) { return {p.weight, p.gamma, p.beta}; }

  // to += scale from; a scale of null is 1
  static void add(T* to, const T* scale, const T* from, int64_t count) {
    if (to == nullptr) return;
    const T factor = scale == nullptr ? T(1) : *scale;
    for (int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
  }

  Convolution c_;
  Activations<T> kept_;
  std::optional<ImageConvolution<T>> images_;
  std::optional<Patches> patches_;
  std::unique_ptr<ConvolutionTangent<T>> convolution_;
  NormTangent<T> norm_;
  NormMoments moments_{};
  Dual<const T> x_{};
  Parameters<const T> now_{}, dot_{};
};

}  // namespace lk
