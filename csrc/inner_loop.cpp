// First-order adaptation of a chain of fused blocks that ends in a linear layer and softmax cross-entropy, without
// autograd: for one task or for many, each with parameters of its own. The blocks ahead of the first updated one run
// once; the K steps reuse one layout of buffers, from an arena that later calls take over.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "arena.h"
#include "block.h"
#include "cpu/product.h"
#include "filter.h"
#include "frozen.h"
#include "images.h"
#include "norm.h"

namespace lk {
namespace {

constexpr int64_t kPerBlock = 3;  // weight, gamma, beta
constexpr int64_t kGeometry = 8;  // stride, padding, dilation (vertical, horizontal each), groups, pool

template <typename T>
void multiply(const Product<T>& p) {
  constexpr int64_t kGrain = 500000, kRows = 48;  // multiply-adds of a thread; rows that go together
  const int64_t grain = std::max<int64_t>(1, kGrain / (kRows * p.columns * p.depth));
  at::parallel_for(0, (p.rows + kRows - 1) / kRows, grain, [&](int64_t begin, int64_t end) {
    Product<T> part = p;
    part.a += begin * kRows * p.a_row, part.c += begin * kRows * p.c_row;
    part.rows = std::min(end * kRows, p.rows) - begin * kRows;
    product_kernels<T>().product(part);
  });
}

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
struct Layer {
  virtual ~Layer() = default;
  virtual const T* forward(const T* x) = 0;                   // -> z, kept until the next call
  virtual void input_gradient(const T* dz, T* gx) = 0;        // at the weight of the last forward
  virtual void descend(const T* dz, T lr) = 0;                // weight -= lr times its gradient
  virtual void finish() {}                                    // writes the weight where the task keeps it
};

template <typename T>
class WinogradLayer : public Layer<T> {
 public:
  WinogradLayer(const Convolution& c, T* weight, const int64_t* strides, bool updated, Arena& arena)
      : arena_(arena), weight_(c, weight, strides, updated, arena), filter_(c, weight_.data(), weight_.strides()),
        updated_(updated), z_(arena.take<T>(c.pixels() * c.outputs)) {}

  const T* forward(const T* x) override {
    x_ = x;
    filter_.forward(x, z_, arena_);
    return z_;
  }
  void input_gradient(const T* dz, T* gx) override { filter_.input_gradient(dz, gx, arena_); }
  void descend(const T* dz, T lr) override { filter_.descend(x_, dz, -lr, arena_); }
  void finish() override {
    if (updated_) weight_.write_back();
  }

 private:
  Arena& arena_;
  Weight<T> weight_;
  Filter<T> filter_;
  bool updated_;
  T* z_;
  const T* x_ = nullptr;
};

// A convolution whose x stays, in the space of its few pixels: with patches P [M, K] of x, z = P w and w descends by
// lr P^T dz, so that z descends by lr (P P^T) dz. All steps need P P^T once, and the weight is made at the end.
template <typename T>
class PixelLayer : public Layer<T> {
 public:
  // Where `steps` steps take fewer multiply-adds than z = P w and P^T dz in each of them.
  static bool takes(const Convolution& c, int64_t steps) {
    const int64_t M = c.pixels(), K = c.inputs * c.kernel[0] * c.kernel[1], O = c.outputs;
    const double plain = Filter<T>::takes(c) ? 1.5 : 2.0;  // what Winograd's algorithm leaves of two products
    return c.groups == 1 && O % kLanes == 0 && M <= kMostPixels &&
           double(2 * M * K * O + M * M * K + steps * M * M * O) < plain * double(steps * M * K * O);
  }

  PixelLayer(const Convolution& c, T* weight, const int64_t* strides, int64_t steps, Arena& arena)
      : c_(c), weight_(c, weight, strides, true, arena), pixels_(c.pixels()), padded_(up(pixels_, kLanes)),
        depth_(c.inputs * c.kernel[0] * c.kernel[1]), left_(steps), patches_(arena.take<T>(pixels_ * depth_)),
        turned_(arena.take<T>(depth_ * padded_)), gram_(arena.take<T>(pixels_ * padded_)),
        z_(arena.take<T>(pixels_ * c.outputs)), sum_(arena.take<T>(pixels_ * c.outputs)) {}

  const T* forward(const T* x) override {
    if (!ready_) {
      gather(x);
      multiply<T>({patches_, depth_, 1, weight_.data(), c_.outputs, z_, c_.outputs, pixels_, c_.outputs, depth_, T(1), false});
      if (left_ > 1) multiply<T>({patches_, depth_, 1, turned_, padded_, gram_, padded_, pixels_, padded_, depth_, T(1), false});
      ready_ = true;
    }
    return z_;
  }
  void input_gradient(const T*, T*) override { TORCH_INTERNAL_ASSERT(false, "nothing below this block is updated"); }
  void descend(const T* dz, T lr) override {
    const int64_t values = pixels_ * c_.outputs;
    if (any_)
      for (int64_t i = 0; i < values; ++i) sum_[i] += dz[i];
    else
      std::copy(dz, dz + values, sum_);
    any_ = true, lr_ = lr;
    if (--left_ > 0) multiply<T>({gram_, padded_, 1, dz, c_.outputs, z_, c_.outputs, pixels_, c_.outputs, pixels_, -lr, true});
  }
  void finish() override {
    if (any_)
      multiply<T>({patches_, 1, depth_, sum_, c_.outputs, weight_.data(), c_.outputs, depth_, c_.outputs, pixels_, -lr_, true});
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
  int64_t pixels_, padded_, depth_, left_;
  T *patches_, *turned_, *gram_, *z_, *sum_;
  T lr_ = 0;
  bool ready_ = false, any_ = false;
};

// Any other convolution, by torch's library.
template <typename T>
class LibraryLayer : public Layer<T> {
 public:
  LibraryLayer(const Convolution& c, const at::Tensor& weight, bool updated, bool below)
      : c_(c), weight_(weight), updated_(updated), below_(below) {}

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
  void descend(const T* dz, T lr) override {
    if (!below_)
      gw_ = std::get<1>(at::convolution_backward(images(dz, c_.outputs, c_.rows, c_.columns), x_, weight_, {}, c_.stride,
                                                 c_.padding, c_.dilation, false, {0, 0}, c_.groups, {false, true, false}));
    weight_.add_(gw_, -double(lr));
  }

 private:
  at::Tensor images(const T* data, int64_t channels, int64_t height, int64_t width) const {
    const int64_t sizes[] = {c_.images, channels, height, width};
    const int64_t strides[] = {height * width * channels, 1, width * channels, channels};
    return at::from_blob(const_cast<T*>(data), sizes, strides, weight_.options());
  }

  Convolution c_;
  at::Tensor weight_, x_, z_, gx_, gw_;
  bool updated_, below_;
};

// One task's parameters of a block. Vectors are dense.
template <typename T>
struct Block {
  Convolution c;
  int64_t pool;
  double eps;
  bool update_weight, update_gamma, update_beta;
  bool below;  // an updated parameter lies in a block before this one, so the input gradient is needed
  at::Tensor weight;
  T *gamma, *beta;

  std::unique_ptr<Layer<T>> layer;
  std::optional<Images<T>> images;   // in place of the layer: of a first block
  std::optional<Patches> patches;    // of the images
  T *dense_weight, *dweight;         // [O, K], with the images
  NormReluPool<T> norm;
  T* gx;                             // as the input, where there is a block below

  bool updated() const { return update_weight || update_gamma || update_beta; }
  int64_t inputs() const { return c.images * c.height * c.width * c.inputs; }
  int64_t outputs() const { return c.images * (c.rows / pool) * (c.columns / pool) * c.outputs; }

  // What a forward pass needs, and with `steps` > 0 a backward pass. x: of the images where this is the first block.
  void lay_out(const at::Tensor* x, int64_t steps, Arena& arena) {
    if (x != nullptr && Images<T>::takes(c, pool)) {
      const int64_t taps = c.inputs * c.kernel[0] * c.kernel[1];
      images.emplace(c, pool, x->const_data_ptr<T>(), x->strides().data(), arena);
      double* const moments = arena.take<double>((taps + 1) * (taps + 1));
      images->moments(moments, arena);
      patches.emplace(taps, moments);
      dense_weight = arena.take<T>(c.outputs * taps), dweight = arena.take<T>(c.outputs * taps);
      home().copy_(weight);
    } else {
      T* const data = const_cast<T*>(weight.const_data_ptr<T>());
      const int64_t* strides = weight.strides().data();
      if (update_weight && !below && PixelLayer<T>::takes(c, steps)) {
        layer = std::make_unique<PixelLayer<T>>(c, data, strides, steps, arena);
      } else if (Filter<T>::takes(c)) {
        layer = std::make_unique<WinogradLayer<T>>(c, data, strides, update_weight, arena);
      } else {
        layer = std::make_unique<LibraryLayer<T>>(c, weight, update_weight, below);
      }
    }
    norm = {};
    norm.tasks = 1, norm.images = c.images, norm.channels = c.outputs, norm.height = c.rows, norm.width = c.columns;
    norm.pool = pool, norm.eps = eps, norm.gamma = gamma, norm.beta = beta;
    set_slabs(norm);
    norm.y = arena.take<T>(outputs()), norm.index = arena.take<uint8_t>(outputs());
    norm.mean = arena.take<T>(c.outputs), norm.rstd = arena.take<T>(c.outputs);
    norm.dgamma = arena.take<T>(c.outputs), norm.dbeta = arena.take<T>(c.outputs);
    norm.partial = arena.take<double>(c.images * norm.slabs * 2 * c.outputs);
    gx = below ? arena.take<T>(inputs()) : nullptr;
  }

  // Without a gradient: x [N, H, W, C] (given: the images, where this is the first block) -> y
  void run(const T* x, const at::Tensor* given, T* y, Arena& arena) {
    const Arena::Mark mark = arena.mark();
    if (frozen_takes(c, pool)) {
      const bool strided = given != nullptr && Images<T>::takes(c, pool);
      const int64_t own[] = {c.height * c.width * c.inputs, 1, c.width * c.inputs, c.inputs};
      frozen_forward<T>({c, pool, eps, strided ? given->const_data_ptr<T>() : x, strided ? given->strides().data() : own,
                         weight.const_data_ptr<T>(), weight.strides().data(), gamma, beta, y, arena.take<T>(c.outputs),
                         arena.take<T>(c.outputs)}, arena);
    } else {
      lay_out(nullptr, 0, arena);
      norm.y = y;
      forward(x, arena);
      layer.reset();
    }
    arena.rewind(mark);
  }

  const T* forward(const T* x, Arena& arena) {
    if (images) {
      images->forward(dense_weight, gamma, beta, *patches, eps, norm.y, norm.index, norm.mean, norm.rstd, arena);
    } else {
      norm.z = layer->forward(x);
      norm_forward(norm);
    }
    return norm.y;
  }

  // A step of this block's parameters; -> gx. dz: as z, scratch.
  const T* descend(const T* gy, T* dz, T lr, Arena& arena) {
    if (images) {
      images->backward(gy, dense_weight, gamma, norm.index, norm.rstd, *patches, dweight, norm.dgamma, norm.dbeta, arena);
      const int64_t values = weight.numel();
      for (int64_t i = 0; update_weight && i < values; ++i) dense_weight[i] -= lr * dweight[i];
    } else {
      norm.gy = gy, norm.dz = update_weight || below ? dz : nullptr;
      norm_backward(norm);
      if (below) layer->input_gradient(dz, gx);
      if (update_weight) layer->descend(dz, lr);
    }
    for (int64_t o = 0; update_gamma && o < c.outputs; ++o) gamma[o] -= lr * norm.dgamma[o];
    for (int64_t o = 0; update_beta && o < c.outputs; ++o) beta[o] -= lr * norm.dbeta[o];
    return gx;
  }

  void finish() {
    if (layer) layer->finish();
    if (images && update_weight) weight.copy_(home());
  }

 private:
  at::Tensor home() const { return at::from_blob(dense_weight, weight.sizes(), weight.options()); }
};

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

  // One step over features x; returns the loss before it. gradient() then is that of x.
  double descend(const T* x, const int64_t* labels, T lr) {
    multiply(x);
    const double loss = cross_entropy(labels);
    if (rows_ != nullptr) {
      T* const to = wide_ == nullptr ? gx_ : wide_;
      lk::multiply<T>({g_, padded_ways_, 1, rows_, padded_, to, padded_, images_, padded_, ways_, T(1), false});
      for (int64_t n = 0; wide_ != nullptr && n < images_; ++n)
        std::copy(wide_ + n * padded_, wide_ + n * padded_ + features_, gx_ + n * features_);
    }
    if (update_weight_) {
      lk::multiply<T>({x, 1, features_, g_, padded_ways_, turned_, padded_ways_, features_, padded_ways_, images_, -lr, true});
      if (rows_ != nullptr)  // the last row reads on behind the features: into columns that nothing reads
        lk::multiply<T>({g_, 1, padded_ways_, x, features_, rows_, padded_, ways_, padded_, images_, -lr, true});
    }
    for (int64_t k = 0; update_bias_ && k < ways_; ++k) {
      T sum = 0;
      for (int64_t n = 0; n < images_; ++n) sum += g_[n * padded_ways_ + k];
      bias_[k] -= lr * sum;
    }
    return loss;
  }

  const T* gradient() const { return gx_; }

  void finish() {
    if (update_weight_) each([&](int64_t way, int64_t feature, T& home) { home = turned_[feature * padded_ways_ + way]; });
  }

 private:
  // x -> logits less the bias in g_
  void multiply(const T* x) const {
    lk::multiply<T>({x, features_, 1, turned_, padded_ways_, g_, padded_ways_, images_, padded_ways_, features_, T(1), false});
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

  // logits in g_, less the bias -> d loss / d logits of the mean cross-entropy, zeros behind the ways; returns the loss
  double cross_entropy(const int64_t* labels) {
    double loss = 0.0;
    T* row = g_;
    for (int64_t n = 0; n < images_; ++n, row += padded_ways_) {
      TORCH_CHECK(labels[n] >= 0 && labels[n] < ways_, "inner_loop: label ", labels[n], " is not one of 0 to ", ways_ - 1);
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

// A task's images as dense channels-last memory.
template <typename T>
const T* dense(const at::Tensor& x, Arena& arena) {
  const at::Tensor rows = x.permute({0, 2, 3, 1});
  if (rows.is_contiguous()) return x.const_data_ptr<T>();
  T* const to = arena.take<T>(x.numel());
  at::from_blob(to, rows.sizes(), rows.options()).copy_(rows);
  return to;
}

// 0 where all of `count` values are finite, else NaN.
template <typename T>
double defect(const T* values, int64_t count) {
  T sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) sums[l] += values[i + l] * T(0);
  for (; i < count; ++i) sums[0] += values[i] * T(0);
  double sum = 0.0;
  for (T part : sums) sum += double(part);
  return sum;
}

template <typename T>
using Blocks = std::vector<Block<T>>;

// The blocks up to `end` over images x [N, C, H, W], without a gradient: -> features of the last one, kept in the arena.
template <typename T>
const T* run(const at::Tensor& x, Blocks<T>& blocks, typename Blocks<T>::iterator end, Arena& arena) {
  T* const kept = arena.take<T>((end - 1)->outputs());
  const Arena::Mark mark = arena.mark();
  const T* a = Images<T>::takes(blocks.front().c, blocks.front().pool) ? nullptr : dense<T>(x, arena);
  for (auto block = blocks.begin(); block != end; ++block) {
    T* const y = block + 1 == end ? kept : arena.take<T>(block->outputs());
    block->run(a, block == blocks.begin() ? &x : nullptr, y, arena);
    a = y;
  }
  arena.rewind(mark);
  return kept;
}

// x [N, C, H, W] or [N, F] -> logits [N, ways], by one task's parameters
template <typename T>
void classify(const at::Tensor& x, Blocks<T>& blocks, const at::Tensor& head, T* bias, T* logits) {
  const Borrowed arena;
  const at::Tensor features = blocks.empty() ? x.contiguous() : at::Tensor();
  const T* a = blocks.empty() ? features.const_data_ptr<T>() : run(x, blocks, blocks.end(), *arena);
  const int64_t channels = blocks.empty() ? x.size(1) : blocks.back().c.outputs;
  Head<T>(head, bias, x.size(0), channels, false, false, false, *arena).classify(a, logits);
}

// One task: x [N, C, H, W] or [N, F], labels [N]; updated parameters are changed in place.
template <typename T>
void adapt(const at::Tensor& x, const int64_t* labels, Blocks<T>& blocks, const at::Tensor& head, T* bias, bool update_head,
           bool update_bias, int64_t steps, double lr, double* losses, int64_t stride) {
  const Borrowed borrowed;
  Arena& arena = *borrowed;
  const auto first = std::find_if(blocks.begin(), blocks.end(), [](const Block<T>& b) { return b.updated(); });
  const T* a = x.const_data_ptr<T>();  // of the last frozen block, which the steps start from
  at::Tensor features;
  if (blocks.empty()) {
    features = x.contiguous();
    a = features.const_data_ptr<T>();
  } else if (first != blocks.begin()) {
    a = run(x, blocks, first, arena);
  } else if (!Images<T>::takes(first->c, first->pool)) {
    a = dense<T>(x, arena);
  }
  const int64_t features_of_image = (blocks.empty() ? x.numel() : blocks.back().outputs()) / x.size(0);
  TORCH_CHECK(head.size(1) == features_of_image, "inner_loop: the linear layer takes ", head.size(1), " features, gets ",
              features_of_image);
  int64_t most = 0;  // values of a z
  for (auto block = first; block != blocks.end(); ++block) {
    block->lay_out(block == blocks.begin() ? &x : nullptr, steps, arena);
    if (!block->images) most = std::max(most, block->c.pixels() * block->c.outputs);
  }
  T* const dz = arena.take<T>(most);
  const bool below = first != blocks.end();
  Head<T> linear(head, bias, x.size(0), blocks.empty() ? x.size(1) : blocks.back().c.outputs, update_head, update_bias,
                 below, arena);
  for (int64_t step = 0; step < steps; ++step) {
    const T* now = a;
    for (auto block = first; block != blocks.end(); ++block) now = block->forward(now, arena);
    losses[step * stride] = linear.descend(now, labels, T(lr));
    const T* g = linear.gradient();
    for (auto block = blocks.end(); block != first;) g = (--block)->descend(g, dz, T(lr), arena);
  }
  linear.finish();
  for (auto block = first; block != blocks.end(); ++block) block->finish();
}

// The inner loop of every task, and where there are query images [T, Q, ...], their logits [T, Q, ways].
at::Tensor descend(const at::Tensor& x, const at::Tensor& labels, at::TensorList parameters, at::IntArrayRef updated,
                   at::IntArrayRef geometry, at::ArrayRef<double> eps, int64_t steps, double lr, const at::Tensor& query,
                   const at::Tensor& logits) {
  const int64_t blocks = int64_t(eps.size()), tasks = labels.size(0);
  TORCH_CHECK(int64_t(parameters.size()) == kPerBlock * blocks + 2 && parameters.size() == updated.size() &&
                  int64_t(geometry.size()) == kGeometry * blocks,
              "inner_loop: ", blocks, " blocks need ", kPerBlock * blocks + 2, " parameters and flags and ",
              kGeometry * blocks, " numbers, got ", parameters.size(), ", ", updated.size(), " and ", geometry.size());
  TORCH_CHECK(x.dim() == (blocks > 0 ? 5 : 3) && x.size(0) == tasks && labels.dim() == 2 && labels.size(1) == x.size(1),
              "inner_loop: x ", x.sizes(), " does not fit labels ", labels.sizes());
  TORCH_CHECK(labels.scalar_type() == at::kLong, "inner_loop: labels must be int64, got ", labels.scalar_type());
  std::vector<at::Tensor> own(parameters.begin(), parameters.end());
  for (size_t i = 0; i < own.size(); ++i) {
    TORCH_CHECK(own[i].scalar_type() == x.scalar_type() && (own[i].size(0) == tasks || (own[i].size(0) == 1 && !updated[i])),
                "inner_loop: parameter ", i, " ", own[i].sizes(), " ", own[i].scalar_type(), " does not fit ", tasks,
                " tasks in ", x.scalar_type());
    if (own[i].dim() == 2 && own[i].stride(1) != 1) {  // gamma, beta, bias
      TORCH_CHECK(!updated[i], "inner_loop: parameter ", i, " is updated in place and must be dense, got strides ",
                  own[i].strides());
      own[i] = own[i].contiguous();
    }
  }
  for (int64_t b = 0, inputs = x.size(2); b <= blocks; ++b) {
    const at::Tensor *const at = &own[b * kPerBlock], &weight = at[0];
    const int64_t outputs = weight.size(1);
    bool fits = weight.dim() == (b < blocks ? 5 : 3) && at[1].dim() == 2 && at[1].size(1) == outputs;
    if (b < blocks) {
      fits = fits && at[2].dim() == 2 && at[2].size(1) == outputs && weight.size(2) * geometry[b * kGeometry + 6] == inputs;
      inputs = outputs;
    }
    TORCH_CHECK(fits, "inner_loop: the parameters of layer ", b, " do not fit ", inputs, " inputs: ", weight.sizes(), " and ",
                at[1].sizes());
  }
  const at::Tensor losses = at::empty({steps + 1, tasks}, x.options().dtype(at::kDouble));
  double* out = losses.mutable_data_ptr<double>();
  const at::Tensor rows = labels.contiguous();
  const bool parallel = tasks >= at::get_num_threads();  // else the kernels use the threads inside a task
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "inner_loop", [&] {
    const auto vector = [&](int64_t i, int64_t task) {
      return const_cast<scalar_t*>(own[i].const_data_ptr<scalar_t>()) + (own[i].size(0) == 1 ? 0 : task * own[i].stride(0));
    };
    const auto tensor = [&](int64_t i, int64_t task) { return own[i].select(0, own[i].size(0) == 1 ? 0 : task); };
    const auto chain = [&](const at::Tensor& images, int64_t task) {
      Blocks<scalar_t> made;
      bool below = false;
      int64_t channels = images.size(2), height = blocks > 0 ? images.size(3) : 0, width = blocks > 0 ? images.size(4) : 0;
      for (int64_t b = 0; b < blocks; ++b) {
        const at::IntArrayRef g = geometry.slice(b * kGeometry, kGeometry);
        const int64_t at = b * kPerBlock;
        Block<scalar_t> block{};
        block.weight = tensor(at, task), block.gamma = vector(at + 1, task), block.beta = vector(at + 2, task);
        block.c = {images.size(1), height, width, channels, 0, 0, block.weight.size(0),
                   {block.weight.size(2), block.weight.size(3)}, {g[0], g[1]}, {g[2], g[3]}, {g[4], g[5]}, g[6]};
        block.c.size_output();
        block.pool = g[7], block.eps = eps[b], block.below = below;
        block.update_weight = updated[at], block.update_gamma = updated[at + 1], block.update_beta = updated[at + 2];
        below = below || block.updated();
        channels = block.c.outputs, height = block.c.rows / block.pool, width = block.c.columns / block.pool;
        made.push_back(std::move(block));
      }
      return made;
    };
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
        Blocks<scalar_t> support = chain(x, task);
        const int64_t head = blocks * kPerBlock;
        adapt(x[task], rows.const_data_ptr<int64_t>() + task * rows.size(1), support, tensor(head, task),
              vector(head + 1, task), updated[head] != 0, updated[head + 1] != 0, steps, lr, out + task, tasks);
        double& last = out[steps * tasks + task];
        last = 0.0;
        for (int64_t i = 0; i < head + 2; ++i)
          if (updated[i]) last += defect(vector(i, task), own[i].numel() / own[i].size(0));
        if (!query.defined()) continue;
        Blocks<scalar_t> all = chain(query, task);
        classify(query[task], all, tensor(head, task), vector(head + 1, task), logits[task].mutable_data_ptr<scalar_t>());
      }
    });
  });
  return losses;
}

// Parameters [...] or [T, ...] with a task axis, new ones in place of those that are updated.
std::vector<at::Tensor> copies(at::TensorList parameters, at::IntArrayRef updated, int64_t tasks) {
  std::vector<at::Tensor> own;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor& p = parameters[i];
    const int64_t axes = i % kPerBlock > 0 || i + 1 == parameters.size() ? 1 : i + 2 == parameters.size() ? 2 : 4;
    own.push_back(p.dim() == axes ? p.unsqueeze(0) : p);
    if (i >= updated.size() || !updated[i]) continue;
    std::vector<int64_t> sizes = own.back().sizes().vec();
    sizes[0] = tasks;
    own.back() = at::empty(sizes, p.options()).copy_(own.back().expand(sizes));
  }
  return own;
}

}  // namespace

at::Tensor inner_loop(const at::Tensor& x, const at::Tensor& labels, at::TensorList parameters, at::IntArrayRef updated,
                      at::IntArrayRef geometry, at::ArrayRef<double> eps, int64_t steps, double lr) {
  return descend(x, labels, parameters, updated, geometry, eps, steps, lr, {}, {});
}

std::tuple<at::Tensor, std::vector<at::Tensor>> adapted(const at::Tensor& x, const at::Tensor& labels,
                                                        at::TensorList parameters, at::IntArrayRef updated,
                                                        at::IntArrayRef geometry, at::ArrayRef<double> eps, int64_t steps,
                                                        double lr) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const std::vector<at::Tensor> own = copies(parameters, updated, labels.size(0));
  at::Tensor rows = descend(x, labels, own, updated, geometry, eps, steps, lr, {}, {});
  std::vector<at::Tensor> results;
  for (size_t i = 0; i < own.size(); ++i)
    if (updated[i]) results.push_back(own[i].size(0) == 1 && own[i].dim() > parameters[i].dim() ? own[i][0] : own[i]);
  return {std::move(rows), std::move(results)};
}

std::tuple<at::Tensor, at::Tensor> classified(const at::Tensor& x, const at::Tensor& labels, const at::Tensor& query,
                                              at::TensorList parameters, at::IntArrayRef updated, at::IntArrayRef geometry,
                                              at::ArrayRef<double> eps, int64_t steps, double lr) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  TORCH_CHECK(query.dim() == x.dim() && query.size(0) == x.size(0) && query.sizes().slice(2) == x.sizes().slice(2) &&
                  query.scalar_type() == x.scalar_type() && query.numel() > 0 && parameters.size() >= 2,
              "classified: query images ", query.sizes(), " ", query.scalar_type(), " do not fit support images ", x.sizes());
  const std::vector<at::Tensor> own = copies(parameters, updated, labels.size(0));
  const at::Tensor logits = at::empty({query.size(0), query.size(1), own.back().size(1)}, x.options());
  at::Tensor rows = descend(x, labels, own, updated, geometry, eps, steps, lr, query, logits);
  return {std::move(rows), logits};
}

}  // namespace lk
