// The convolution of one block of the inner loop, three ways: Winograd's algorithm, the space of its few pixels, and torch's
// library.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "arena.h"
#include "convolution.h"
#include "product.h"
#include "winograd.h"

namespace lk {

// A convolution's weight [O, C, kh, kw] where the task keeps it, and as the kernels like it: [kh, kw, C, O].
template <typename T>
class Weight {
 public:
  Weight(const Convolution& c, T* weight, const int64_t* strides, bool updated, Arena& arena)
      : sizes_{c.outputs, c.inputs, c.kernel[0], c.kernel[1]}, home_(weight) {
    std::copy(strides, strides + 4, home_strides_);
    if (!updated) {
      data_ = weight;
      std::copy(strides, strides + 4, strides_);
      return;
    }
    const int64_t row = c.inputs * c.outputs, own[] = {1, c.outputs, c.kernel[1] * row, row};
    std::copy(own, own + 4, strides_);
    data_ = arena.take<T>(c.kernel[0] * c.kernel[1] * row);
    each([&](T& here, T& home) { here = home; });
  }

  T* data() const { return data_; }
  const int64_t* strides() const { return strides_; }
  void write_back() {
    each([&](T& here, T& home) { home = here; });
  }

 private:
  template <typename F>
  void each(const F& f) {
    const int64_t blocks = sizes_[2] * sizes_[3] * sizes_[1];
    at::parallel_for(0, blocks, 1 + 8192 / sizes_[0], [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t c = at % sizes_[1], j = at / sizes_[1] % sizes_[3], i = at / sizes_[1] / sizes_[3];
        T* const here = data_ + i * strides_[2] + j * strides_[3] + c * strides_[1];
        T* const home = home_ + i * home_strides_[2] + j * home_strides_[3] + c * home_strides_[1];
        for (int64_t o = 0; o < sizes_[0]; ++o) f(here[o], home[o * home_strides_[0]]);
      }
    });
  }

  int64_t sizes_[4];
  T *home_, *data_;
  int64_t home_strides_[4], strides_[4];
};

// The convolution of one block, on dense channels-last images.
template <typename T>
struct ConvolutionLayer {
  virtual ~ConvolutionLayer() = default;
  virtual const T* forward(const T* x) = 0;  // -> z, kept until the next call; once per step
  virtual void input_gradient(const T* dz, T* gx) = 0;  // at the weight of the last forward
  virtual void update(const T* dz, T rate) = 0;  // weight -= rate times its gradient
  virtual void finish() {}  // writes the weight where the task keeps it
};

template <typename T>
class WinogradLayer : public ConvolutionLayer<T> {
 public:
  WinogradLayer(const Convolution& c, T* weight, const int64_t* strides, bool updated, Arena& arena)
      : arena_(arena), weight_(c, weight, strides, updated, arena), convolution_(c, weight_.data(), weight_.strides()),
        updated_(updated), z_(arena.take<T>(c.pixels() * c.outputs)) {}

  const T* forward(const T* x) override {
    x_ = x;
    convolution_.forward(x, z_, arena_);
    return z_;
  }
  void input_gradient(const T* dz, T* gx) override { convolution_.input_gradient(dz, gx, arena_); }
  void update(const T* dz, T rate) override { convolution_.add_weight_gradient(x_, dz, -rate, arena_); }
  void finish() override {
    if (updated_) weight_.write_back();
  }

 private:
  Arena& arena_;
  Weight<T> weight_;
  WinogradConvolution<T> convolution_;
  bool updated_;
  T* z_;
  const T* x_ = nullptr;
};

// A convolution whose x stays, in the space of its few pixels: with patches P [M, K] of x, z = P w. A step
// takes rate P^T dz from w, and so rate (P P^T) dz from z. All steps need P P^T once, and the weight is made at the end from
// the sum of the steps' dz, which is scaled once where all steps have one rate, else step by step.
template <typename T>
class PixelLayer : public ConvolutionLayer<T> {
 public:
  // Where `steps` steps take fewer multiply-adds than z = P w and P^T dz in each of them.
  static bool takes(const Convolution& c, int64_t steps) {
    const int64_t M = c.pixels(), K = c.inputs * c.kernel[0] * c.kernel[1], O = c.outputs;
    const double plain = WinogradConvolution<T>::takes(c) ? 1.5 : 2.0;  // what Winograd's algorithm leaves of two products
    return c.groups == 1 && O % kLanes == 0 && M <= kMostPixels &&
           double(2 * M * K * O + M * M * K + steps * M * M * O) < plain * double(steps * M * K * O);
  }

  PixelLayer(const Convolution& c, T* weight, const int64_t* strides, int64_t steps, bool one_rate, Arena& arena)
      : c_(c), weight_(c, weight, strides, true, arena), pixels_(c.pixels()), padded_(up(pixels_, kLanes)),
        depth_(c.inputs * c.kernel[0] * c.kernel[1]), left_(steps), one_rate_(one_rate),
        patches_(arena.take<T>(pixels_ * depth_)), turned_(arena.take<T>(depth_ * padded_)),
        gram_(arena.take<T>(pixels_ * padded_)), z_(arena.take<T>(pixels_ * c.outputs)),
        sum_(arena.take<T>(pixels_ * c.outputs)) {}

  const T* forward(const T* x) override {
    --left_;
    if (!ready_) {
      gather(x);
      multiply<T>(
          {patches_, depth_, 1, weight_.data(), c_.outputs, z_, c_.outputs, pixels_, c_.outputs, depth_, T(1), false});
      if (left_ > 0)
        multiply<T>({patches_, depth_, 1, turned_, padded_, gram_, padded_, pixels_, padded_, depth_, T(1), false});
      ready_ = true;
    }
    return z_;
  }
  void input_gradient(const T*, T*) override { TORCH_INTERNAL_ASSERT(false, "nothing below this block is updated"); }
  void update(const T* dz, T rate) override {
    const int64_t values = pixels_ * c_.outputs;
    if (!any_) {
      for (int64_t i = 0; i < values; ++i) sum_[i] = one_rate_ ? dz[i] : rate * dz[i];
    } else if (one_rate_) {
      for (int64_t i = 0; i < values; ++i) sum_[i] += dz[i];
    } else {
      for (int64_t i = 0; i < values; ++i) sum_[i] += rate * dz[i];
    }
    any_ = true, scale_ = one_rate_ ? -rate : T(-1);
    if (left_ > 0)
      multiply<T>({gram_, padded_, 1, dz, c_.outputs, z_, c_.outputs, pixels_, c_.outputs, pixels_, -rate, true});
  }
  void finish() override {
    if (any_)
      multiply<T>(
          {patches_, 1, depth_, sum_, c_.outputs, weight_.data(), c_.outputs, depth_, c_.outputs, pixels_, scale_, true});
    weight_.write_back();
  }

 private:
  static constexpr int64_t kMostPixels = 1024;

  // x -> P [M, K] and P^T, in rows of `padded_`
  void gather(const T* x) {
    const int64_t C = c_.inputs;
    std::fill(turned_, turned_ + depth_ * padded_, T(0));
    at::parallel_for(0, pixels_, 1 + 16384 / depth_, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const int64_t n = m / (c_.rows * c_.columns), row = m / c_.columns % c_.rows, column = m % c_.columns;
        T* to = patches_ + m * depth_;
        for (int64_t i = 0; i < c_.kernel[0]; ++i)
          for (int64_t j = 0; j < c_.kernel[1]; ++j, to += C) {
            const int64_t h = row * c_.stride[0] - c_.padding[0] + i * c_.dilation[0];
            const int64_t w = column * c_.stride[1] - c_.padding[1] + j * c_.dilation[1];
            const T* const from = x + ((n * c_.height + h) * c_.width + w) * C;
            if (h >= 0 && h < c_.height && w >= 0 && w < c_.width)
              std::copy(from, from + C, to);
            else
              std::fill(to, to + C, T(0));
          }
      }
    });
    at::parallel_for(0, depth_, 1 + 16384 / pixels_, [&](int64_t begin, int64_t end) {
      for (int64_t m = 0; m < pixels_; ++m)
        for (int64_t k = begin; k < end; ++k) turned_[k * padded_ + m] = patches_[m * depth_ + k];
    });
  }

  Convolution c_;
  Weight<T> weight_;
  int64_t pixels_, padded_, depth_, left_;  // left_: steps after this one
  bool one_rate_;
  T *patches_, *turned_, *gram_, *z_, *sum_;
  T scale_ = 0;  // of the sum
  bool ready_ = false, any_ = false;
};

// Any other convolution, by torch's library.
template <typename T>
class LibraryLayer : public ConvolutionLayer<T> {
 public:
  LibraryLayer(const Convolution& c, const at::Tensor& weight, bool updated, bool below)
      : c_(c), weight_(weight), updated_(updated), below_(below) {
    if (weight.size(1) == 1 && weight.is_contiguous()) weight_ = weight.view({-1}).view(weight.sizes());  // as images()
  }

  const T* forward(const T* x) override {
    x_ = images(x, c_.inputs, c_.height, c_.width);
    z_ = at::convolution(x_, weight_, {}, c_.stride, c_.padding, c_.dilation, false, {0, 0}, c_.groups)
             .permute({0, 2, 3, 1})
             .contiguous();
    return z_.template const_data_ptr<T>();
  }
  void input_gradient(const T* dz, T* gx) override {
    std::tie(gx_, gw_, std::ignore) =
        at::convolution_backward(images(dz, c_.outputs, c_.rows, c_.columns), x_, weight_, {}, c_.stride, c_.padding,
                                 c_.dilation, false, {0, 0}, c_.groups, {true, updated_, false});
    images(gx, c_.inputs, c_.height, c_.width).copy_(gx_);
  }
  void update(const T* dz, T rate) override {
    if (!below_)
      gw_ = std::get<1>(at::convolution_backward(images(dz, c_.outputs, c_.rows, c_.columns), x_, weight_, {}, c_.stride,
                                                 c_.padding, c_.dilation, false, {0, 0}, c_.groups, {false, true, false}));
    weight_.add_(gw_, -double(rate));
  }

 private:
  at::Tensor images(const T* data, int64_t channels, int64_t height, int64_t width) const {
    const int64_t sizes[] = {c_.images, channels, height, width};
    // Of one channel by the strides of contiguous memory: see _in_order in reference.py.
    const int64_t strides[] = {height * width * channels, channels == 1 ? height * width : 1, width * channels, channels};
    return at::from_blob(const_cast<T*>(data), sizes, strides, weight_.options());
  }

  Convolution c_;
  at::Tensor weight_, x_, z_, gx_, gw_;
  bool updated_, below_;
};

}  // namespace lk
