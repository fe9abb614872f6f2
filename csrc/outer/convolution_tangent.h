// The convolution of a block with derivatives along a direction, on dense channels-last images: by Winograd's algorithm,
// or by torch's library.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/from_blob.h>

#include <cstdint>
#include <memory>
#include <tuple>

#include "arena.h"
#include "convolution.h"
#include "winograd.h"

namespace lk {

// A value, or a gradient, and its derivative along the direction: null where that is zero.
template <typename T>
struct Dual {
  T *value, *dot;
};

// A pass whose derivative is null is done without one. Weights are dense [O, C / groups, kh, kw].
template <typename T>
struct ConvolutionTangent {
  virtual ~ConvolutionTangent() = default;
  // z and, unless it is null, z_dot, of which x_dot or weight_dot is a cause
  virtual void forward(Dual<const T> x, Dual<const T> weight, Dual<T> z, Arena& arena) = 0;
  virtual void input_gradient(Dual<const T> dz, Dual<const T> weight, Dual<T> gx, Arena& arena) = 0;
  // to += scale times the gradient, to_dot += its derivative; each unless it is null
  virtual void weight_gradient(Dual<const T> x, Dual<const T> dz, T* to, T scale, T* to_dot, Arena& arena) = 0;
};

// The convolution of the same block, of parts of its images one after another, all with one weight: what is made of the
// weight is made once, and what its gradient is made of may be summed over the parts.
template <typename T>
struct ConvolutionParts {
  virtual ~ConvolutionParts() = default;
  virtual void forward(int64_t images, const T* x, T* z, Arena& arena) = 0;
  virtual void input_gradient(int64_t images, const T* dz, T* gx, Arena& arena) = 0;
  virtual void weight_gradient(int64_t images, const T* x, const T* dz, Arena& arena) = 0;
  virtual void finish() = 0;  // to += the gradient of all parts
};

template <typename T>
class WinogradTangentConvolution : public ConvolutionTangent<T> {
 public:
  explicit WinogradTangentConvolution(const Convolution& c) : c_(c), strides_{c.inputs * 9, 9, 3, 1} {}

  void forward(Dual<const T> x, Dual<const T> weight, Dual<T> z, Arena& arena) override {
    const WinogradConvolution<T> filter = of(weight.value), along = of(weight.dot);
    if (z.dot == nullptr)
      filter.forward(x.value, z.value, arena);
    else
      filter.forward(x.value, x.dot, weight.dot == nullptr ? nullptr : &along, z.value, z.dot, arena);
  }
  void input_gradient(Dual<const T> dz, Dual<const T> weight, Dual<T> gx, Arena& arena) override {
    const WinogradConvolution<T> filter = of(weight.value), along = of(weight.dot);
    if (gx.dot == nullptr)
      filter.input_gradient(dz.value, gx.value, arena);
    else
      filter.input_gradient(dz.value, dz.dot, weight.dot == nullptr ? nullptr : &along, gx.value, gx.dot, arena);
  }
  void weight_gradient(Dual<const T> x, Dual<const T> dz, T* to, T scale, T* to_dot, Arena& arena) override {
    const WinogradConvolution<T> filter = of(to), along = of(to_dot);
    if (to_dot != nullptr)
      along.add_weight_gradient(x.value, x.dot, dz.value, dz.dot, to == nullptr ? nullptr : &filter, scale, arena);
    else if (to != nullptr)
      filter.add_weight_gradient(x.value, dz.value, scale, arena);
  }

 private:
  WinogradConvolution<T> of(const T* weight) const { return {c_, const_cast<T*>(weight), strides_}; }

  Convolution c_;
  int64_t strides_[4];
};

template <typename T>
class WinogradParts : public ConvolutionParts<T> {
 public:
  // c: of the first part, which is the largest; to: where the weight's gradient goes, or null
  WinogradParts(const Convolution& c, const T* weight, T* to, Arena& arena)
      : strides_{c.inputs * 9, 9, 3, 1}, filter_(c, const_cast<T*>(weight), strides_), gradient_(c, to, strides_) {
    filter_.prepare(arena);
    if (to != nullptr) sums_ = gradient_.take_sums(arena);
  }

  void forward(int64_t images, const T* x, T* z, Arena& arena) override { filter_.part(images).forward(x, z, arena); }
  void input_gradient(int64_t images, const T* dz, T* gx, Arena& arena) override {
    filter_.part(images).input_gradient(dz, gx, arena);
  }
  void weight_gradient(int64_t images, const T* x, const T* dz, Arena& arena) override {
    gradient_.part(images).add_part(x, dz, sums_, arena);
  }
  void finish() override { gradient_.add_sums(sums_); }

 private:
  int64_t strides_[4];
  WinogradConvolution<T> filter_, gradient_;
  typename WinogradConvolution<T>::Sums sums_{};
};

template <typename T>
class LibraryTangentConvolution : public ConvolutionTangent<T> {
 public:
  LibraryTangentConvolution(const Convolution& c, const at::TensorOptions& options) : c_(c), options_(options) {}

  void forward(Dual<const T> x, Dual<const T> weight, Dual<T> z, Arena&) override {
    const auto convolve = [&](const T* images, const T* filter) {
      return at::convolution(below(images), weights(filter), {}, c_.stride, c_.padding, c_.dilation, false, {0, 0},
                             c_.groups);
    };
    above(z.value).copy_(convolve(x.value, weight.value));
    if (z.dot == nullptr) return;
    const at::Tensor to = above(z.dot);
    if (x.dot != nullptr) to.copy_(convolve(x.dot, weight.value));
    if (weight.dot == nullptr) return;
    const at::Tensor turn = convolve(x.value, weight.dot);
    x.dot == nullptr ? to.copy_(turn) : to.add_(turn);
  }
  void input_gradient(Dual<const T> dz, Dual<const T> weight, Dual<T> gx, Arena&) override {
    const auto back = [&](const T* gradient, const T* filter) {
      // of the images only the sizes are read
      return std::get<0>(at::convolution_backward(above(gradient), below(gx.value), weights(filter), {}, c_.stride,
                                                  c_.padding, c_.dilation, false, {0, 0}, c_.groups, {true, false, false}));
    };
    const at::Tensor turn = gx.dot != nullptr ? back(dz.dot, weight.value) : at::Tensor();
    below(gx.value).copy_(back(dz.value, weight.value));
    if (gx.dot == nullptr) return;
    below(gx.dot).copy_(turn);
    if (weight.dot != nullptr) below(gx.dot).add_(back(dz.value, weight.dot));
  }
  void weight_gradient(Dual<const T> x, Dual<const T> dz, T* to, T scale, T* to_dot, Arena&) override {
    const auto gradient = [&](const T* images, const T* of_z, const T* like) {
      return std::get<1>(at::convolution_backward(above(of_z), below(images), weights(like), {}, c_.stride, c_.padding,
                                                  c_.dilation, false, {0, 0}, c_.groups, {false, true, false}));
    };
    if (to != nullptr) weights(to).add_(gradient(x.value, dz.value, to), double(scale));
    if (to_dot == nullptr) return;
    weights(to_dot).add_(gradient(x.value, dz.dot, to_dot));
    if (x.dot != nullptr) weights(to_dot).add_(gradient(x.dot, dz.value, to_dot));
  }

 private:
  at::Tensor images(const T* data, int64_t channels, int64_t height, int64_t width) const {
    const int64_t sizes[] = {c_.images, channels, height, width};
    // Of one channel by the strides of contiguous memory: see _in_order in reference.py.
    const int64_t strides[] = {height * width * channels, channels == 1 ? height * width : 1, width * channels, channels};
    return at::from_blob(const_cast<T*>(data), sizes, strides, options_);
  }
  at::Tensor below(const T* x) const { return images(x, c_.inputs, c_.height, c_.width); }
  at::Tensor above(const T* z) const { return images(z, c_.outputs, c_.rows, c_.columns); }
  at::Tensor weights(const T* data) const {
    const int64_t sizes[] = {c_.outputs, c_.inputs / c_.groups, c_.kernel[0], c_.kernel[1]};
    return at::from_blob(const_cast<T*>(data), sizes, options_);
  }

  Convolution c_;
  at::TensorOptions options_;
};

template <typename T>
class LibraryParts : public ConvolutionParts<T> {
 public:
  LibraryParts(const Convolution& c, const T* weight, T* to, const at::TensorOptions& options)
      : c_(c), options_(options), weight_(weight), to_(to) {}

  void forward(int64_t images, const T* x, T* z, Arena& arena) override {
    of(images).forward({x, nullptr}, {weight_, nullptr}, {z, nullptr}, arena);
  }
  void input_gradient(int64_t images, const T* dz, T* gx, Arena& arena) override {
    of(images).input_gradient({dz, nullptr}, {weight_, nullptr}, {gx, nullptr}, arena);
  }
  void weight_gradient(int64_t images, const T* x, const T* dz, Arena& arena) override {
    of(images).weight_gradient({x, nullptr}, {dz, nullptr}, to_, T(1), nullptr, arena);
  }
  void finish() override {}

 private:
  LibraryTangentConvolution<T> of(int64_t images) const {
    Convolution part = c_;
    part.images = images;
    return {part, options_};
  }

  Convolution c_;
  at::TensorOptions options_;
  const T* weight_;
  T* to_;
};

template <typename T>
std::unique_ptr<ConvolutionParts<T>> convolution_parts(const Convolution& c, const T* weight, T* to,
                                                       const at::TensorOptions& options, Arena& arena) {
  if (WinogradConvolution<T>::takes(c)) return std::make_unique<WinogradParts<T>>(c, weight, to, arena);
  return std::make_unique<LibraryParts<T>>(c, weight, to, options);
}

template <typename T>
std::unique_ptr<ConvolutionTangent<T>> convolution_tangent(const Convolution& c, const at::TensorOptions& options) {
  if (WinogradConvolution<T>::takes(c)) return std::make_unique<WinogradTangentConvolution<T>>(c);
  return std::make_unique<LibraryTangentConvolution<T>>(c, options);
}

}  // namespace lk
