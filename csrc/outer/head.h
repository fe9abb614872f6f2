// The linear layer of a chain and softmax cross-entropy, with derivatives along a direction.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "arena.h"
#include "convolution.h"
#include "outer/convolution_tangent.h"
#include "product.h"

namespace lk {

// Over features [N, F], which lie by (pixel, channel); the weight [ways, F] counts them by (channel, pixel). Dense.
template <typename T>
class OuterHead {
 public:
  OuterHead(int64_t images, int64_t ways, int64_t channels, int64_t pixels, Arena& arena)
      : images_(images), ways_(ways), channels_(channels), pixels_(pixels), features_(channels * pixels),
        padded_(up(features_, kLanes)), wide_(up(ways, kLanes)), logits_(arena.take<T>(images * wide_)),
        logits_dot_(arena.take<T>(images * wide_)), turned_(arena.take<T>(features_ * wide_)) {}

  // x, weight and bias, with their derivatives (null for zeros) -> logits
  void forward(Dual<const T> x, Dual<const T> weight, Dual<const T> bias) {
    x_ = x, weight_ = weight;
    moves_ = x.dot != nullptr || weight.dot != nullptr || bias.dot != nullptr;
    turn(weight.value);
    multiply_features(x.value, logits_, false);
    if (x.dot != nullptr) multiply_features(x.dot, logits_dot_, false);
    if (weight.dot != nullptr) {
      turn(weight.dot);
      multiply_features(x.value, logits_dot_, x.dot != nullptr);
    }
    for (int64_t n = 0; n < images_; ++n)
      for (int64_t k = 0; k < ways_; ++k) {
        logits_[n * wide_ + k] += bias.value[k];
        T& dot = logits_dot_[n * wide_ + k];
        if (x.dot == nullptr && weight.dot == nullptr) dot = T(0);
        if (bias.dot != nullptr) dot += bias.dot[k];
      }
  }

  // -> [N, ways]
  void logits(T* to) const {
    for (int64_t n = 0; n < images_; ++n) std::copy(logits_ + n * wide_, logits_ + n * wide_ + ways_, to + n * ways_);
  }

  // The gradient of the mean cross-entropy in place of the logits, with its derivative; returns the loss.
  double cross_entropy(const int64_t* labels) {
    double loss = 0.0;
    for (int64_t n = 0; n < images_; ++n) {
      T *row = logits_ + n * wide_, *dot = logits_dot_ + n * wide_;
      const T top = *std::max_element(row, row + ways_), own = row[labels[n]];
      double sum = 0.0, along = 0.0;
      for (int64_t k = 0; k < ways_; ++k) sum += std::exp(double(row[k] - top));
      loss += std::log(sum) - double(own - top);
      for (int64_t k = 0; k < ways_; ++k) row[k] = T(std::exp(double(row[k] - top)) / sum);
      for (int64_t k = 0; k < ways_; ++k) along += double(row[k]) * double(dot[k]);
      // g = (p - target) / N, and p moves with the logits l as p (l_dot - <p, l_dot>)
      for (int64_t k = 0; k < ways_; ++k) dot[k] = T(double(row[k]) * (double(dot[k]) - along) / double(images_));
      for (int64_t k = 0; k < ways_; ++k) row[k] = T(double(row[k]) / double(images_));
      row[labels[n]] -= T(1) / T(images_);
      std::fill(row + ways_, row + wide_, T(0)), std::fill(dot + ways_, dot + wide_, T(0));
    }
    return loss / double(images_);
  }

  // After a forward pass in an earlier call: x, the weight, and the gradient of the logits [N, ways].
  void resume(const T* x, const T* weight, const T* gradient) {
    x_ = {x, nullptr}, weight_ = {weight, nullptr}, moves_ = false;
    for (int64_t n = 0; n < images_; ++n) {
      std::copy(gradient + n * ways_, gradient + (n + 1) * ways_, logits_ + n * wide_);
      std::fill(logits_ + n * wide_ + ways_, logits_ + (n + 1) * wide_, T(0));
    }
  }

  bool moves() const { return moves_; }

  // to_weight += scale times its gradient, to_bias likewise; along_... += the derivatives; each unless it is null
  void parameters(T* to_weight, T scale, T* to_bias, T bias_scale, T* along_weight, T* along_bias, Arena& arena) {
    const Arena::Mark mark = arena.mark();
    T* const whole = arena.take<T>(features_ * wide_);
    const auto product = [&](const T* x, const T* g, bool add) {
      multiply<T>({x, 1, features_, g, wide_, whole, wide_, features_, wide_, images_, T(1), add});
    };
    if (to_weight != nullptr) {
      product(x_.value, logits_, false);
      each([&](int64_t way, int64_t feature, int64_t home) { to_weight[home] += scale * whole[feature * wide_ + way]; });
    }
    if (along_weight != nullptr && moves_) {
      product(x_.value, logits_dot_, false);
      if (x_.dot != nullptr) product(x_.dot, logits_, true);
      each([&](int64_t way, int64_t feature, int64_t home) { along_weight[home] += whole[feature * wide_ + way]; });
    }
    const auto add_rows = [&](const T* g, T factor, T* to) {
      for (int64_t k = 0; k < ways_; ++k) {
        T sum = 0;
        for (int64_t n = 0; n < images_; ++n) sum += g[n * wide_ + k];
        to[k] += factor * sum;
      }
    };
    if (to_bias != nullptr) add_rows(logits_, bias_scale, to_bias);
    if (along_bias != nullptr && moves_) add_rows(logits_dot_, T(1), along_bias);
    arena.rewind(mark);
  }

  // The gradient of x and, unless null, its derivative; [N, F], from the arena.
  Dual<const T> input_gradient(Arena& arena) {
    T* const rows = arena.take<T>(ways_ * padded_);
    std::fill(rows, rows + ways_ * padded_, T(0));
    const auto fill = [&](const T* weight) {
      each([&](int64_t way, int64_t feature, int64_t home) { rows[way * padded_ + feature] = weight[home]; });
    };
    T *const g = arena.take<T>(images_ * padded_), *const g_dot = moves_ ? arena.take<T>(images_ * padded_) : nullptr;
    const auto product = [&](const T* of_logits, T* to, bool add) {
      multiply<T>({of_logits, wide_, 1, rows, padded_, to, padded_, images_, padded_, ways_, T(1), add});
    };
    fill(weight_.value);
    product(logits_, g, false);
    if (moves_) product(logits_dot_, g_dot, false);
    if (moves_ && weight_.dot != nullptr) {
      fill(weight_.dot);
      product(logits_, g_dot, true);
    }
    return {packed(g), g_dot == nullptr ? nullptr : packed(g_dot)};
  }

 private:
  // f(way, feature as it lies, place in the weight)
  template <typename F>
  void each(const F& f) const {
    for (int64_t way = 0; way < ways_; ++way)
      for (int64_t c = 0; c < channels_; ++c)
        for (int64_t at = 0; at < pixels_; ++at) f(way, at * channels_ + c, way * features_ + c * pixels_ + at);
  }

  void turn(const T* weight) {
    std::fill(turned_, turned_ + features_ * wide_, T(0));
    each([&](int64_t way, int64_t feature, int64_t home) { turned_[feature * wide_ + way] = weight[home]; });
  }

  void multiply_features(const T* x, T* to, bool add) const {
    multiply<T>({x, features_, 1, turned_, wide_, to, wide_, images_, wide_, features_, T(1), add});
  }

  // Rows of `padded_` values to rows of `features_`, in place.
  T* packed(T* rows) const {
    for (int64_t n = 1; padded_ != features_ && n < images_; ++n)
      std::copy(rows + n * padded_, rows + n * padded_ + features_, rows + n * features_);
    return rows;
  }

  int64_t images_, ways_, channels_, pixels_, features_, padded_, wide_;
  T *logits_, *logits_dot_, *turned_;  // [N, ways] twice, then their gradients; [F, ways]
  Dual<const T> x_{}, weight_{};
  bool moves_ = false;
};

}  // namespace lk
