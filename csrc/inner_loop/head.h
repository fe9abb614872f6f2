// The last layer of the inner loop: a linear layer and softmax cross-entropy.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "arena.h"
#include "convolution.h"
#include "product.h"

namespace lk {

// The linear layer and the loss, over features [N, F]; the task's weight [ways, F] counts them by (channel, pixel), the
// features themselves lie by (pixel, channel).
template <typename T>
class Head {
 public:
  Head(const at::Tensor& weight, T* bias, int64_t images, int64_t channels, bool update_weight, bool update_bias, bool below,
       Arena& arena)
      : home_(weight), bias_(bias), images_(images), ways_(weight.size(0)), features_(weight.size(1)), channels_(channels),
        padded_ways_(up(ways_, kLanes)), padded_(up(features_, kLanes)), update_weight_(update_weight),
        update_bias_(update_bias), turned_(arena.take<T>(features_ * padded_ways_)),
        g_(arena.take<T>(images * padded_ways_)) {
    std::fill(turned_, turned_ + features_ * padded_ways_, T(0));
    each([&](int64_t way, int64_t feature, T& home) { turned_[feature * padded_ways_ + way] = home; });
    if (below) {
      rows_ = arena.take<T>(ways_ * padded_);
      std::fill(rows_, rows_ + ways_ * padded_, T(0));
      each([&](int64_t way, int64_t feature, T& home) { rows_[way * padded_ + feature] = home; });
      wide_ = padded_ == features_ ? nullptr : arena.take<T>(images * padded_);
      gx_ = arena.take<T>(images * features_);
    }
  }

  // -> logits [N, ways]
  void classify(const T* x, T* to) {
    multiply(x);
    for (int64_t n = 0; n < images_; ++n)
      for (int64_t k = 0; k < ways_; ++k) to[n * ways_ + k] = g_[n * padded_ways_ + k] + bias_[k];
  }

  // One step over features x, with rates of the weight and the bias; returns the loss before it. gradient() then is that of x.
  double step(const T* x, const int64_t* labels, const T* rates) {
    multiply(x);
    const double loss = cross_entropy(labels);
    if (rows_ != nullptr) {
      T* const to = wide_ == nullptr ? gx_ : wide_;
      lk::multiply<T>({g_, padded_ways_, 1, rows_, padded_, to, padded_, images_, padded_, ways_, T(1), false});
      for (int64_t n = 0; wide_ != nullptr && n < images_; ++n)
        std::copy(wide_ + n * padded_, wide_ + n * padded_ + features_, gx_ + n * features_);
    }
    if (update_weight_ && rates[0] != T(0)) {
      lk::multiply<T>(
          {x, 1, features_, g_, padded_ways_, turned_, padded_ways_, features_, padded_ways_, images_, -rates[0], true});
      if (rows_ != nullptr)  // the last row reads on behind the features: into columns that nothing reads
        lk::multiply<T>({g_, 1, padded_ways_, x, features_, rows_, padded_, ways_, padded_, images_, -rates[0], true});
    }
    for (int64_t k = 0; update_bias_ && rates[1] != T(0) && k < ways_; ++k) {
      T sum = 0;
      for (int64_t n = 0; n < images_; ++n) sum += g_[n * padded_ways_ + k];
      bias_[k] -= rates[1] * sum;
    }
    return loss;
  }

  const T* gradient() const { return gx_; }

  void finish() {
    if (update_weight_) each([&](int64_t way, int64_t feature, T& home) { home = turned_[feature * padded_ways_ + way]; });
  }

 private:
  // x -> logits without the bias, in g_
  void multiply(const T* x) const {
    lk::multiply<T>(
        {x, features_, 1, turned_, padded_ways_, g_, padded_ways_, images_, padded_ways_, features_, T(1), false});
  }

  template <typename F>
  void each(const F& f) {
    const int64_t pixels = features_ / channels_;
    T* const home = const_cast<T*>(home_.const_data_ptr<T>());
    for (int64_t way = 0; way < ways_; ++way)
      for (int64_t c = 0; c < channels_; ++c)
        for (int64_t at = 0; at < pixels; ++at)
          f(way, at * channels_ + c, home[way * home_.stride(0) + (c * pixels + at) * home_.stride(1)]);
  }

  // logits in g_ without the bias -> d loss / d logits of the mean cross-entropy, 0 behind the ways; returns the loss
  double cross_entropy(const int64_t* labels) {
    double loss = 0.0;
    T* row = g_;
    for (int64_t n = 0; n < images_; ++n, row += padded_ways_) {
      for (int64_t k = 0; k < ways_; ++k) row[k] += bias_[k];
      const T top = *std::max_element(row, row + ways_), own = row[labels[n]];
      double sum = 0.0;
      for (int64_t k = 0; k < ways_; ++k) sum += std::exp(double(row[k] - top));
      loss += std::log(sum) - double(own - top);
      for (int64_t k = 0; k < ways_; ++k) row[k] = T(std::exp(double(row[k] - top)) / sum / double(images_));
      row[labels[n]] -= T(1) / T(images_);
      std::fill(row + ways_, row + padded_ways_, T(0));
    }
    return loss / double(images_);
  }

  at::Tensor home_;
  T* bias_;
  int64_t images_, ways_, features_, channels_, padded_ways_, padded_;
  bool update_weight_, update_bias_;
  T *turned_, *g_, *rows_ = nullptr, *wide_ = nullptr, *gx_ = nullptr;  // [F, ways], [N, ways], [ways, F], [N, F] twice
};

}  // namespace lk
