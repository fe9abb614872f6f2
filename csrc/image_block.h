// The images of one task and a convolution over them, for a first block that keeps no convolution output: its statistics
// come from the moments of the patches (Reference.image_moments in reference.py). On plain memory.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "arena.h"
#include "convolution.h"
#include "cpu/image_block.h"
#include "cpu/product.h"

namespace lk {

// second moments [K + 1, K + 1] -> average [K] and covariance [K, K] of the patches
struct Patches {
  int64_t taps;
  std::vector<double> average, covariance;

  Patches(int64_t taps, const double* moments) : taps(taps), average(taps), covariance(taps * taps) {
    const double count = moments[(taps + 1) * (taps + 1) - 1];
    for (int64_t i = 0; i < taps; ++i) average[i] = moments[i * (taps + 1) + taps] / count;
    for (int64_t i = 0; i < taps; ++i)
      for (int64_t j = 0; j < taps; ++j)
        covariance[i * taps + j] = moments[i * (taps + 1) + j] / count - average[i] * average[j];
  }

  // to [K] = covariance w
  template <typename T>
  void apply(const T* w, double* to) const {
    std::fill(to, to + taps, 0.0);
    for (int64_t i = 0; i < taps; ++i)
      for (int64_t j = 0; j < taps; ++j) to[j] += double(w[i]) * covariance[i * taps + j];
  }
};

template <typename T>
class ImageConvolution {
 public:
  static constexpr int64_t kMostTaps = 32;

  static bool takes(const Convolution& c, int64_t pool) {
    return c.groups == 1 && c.inputs * c.kernel[0] * c.kernel[1] <= kMostTaps && (pool == 1 || pool == 2);
  }

  // x [N, C, H, W] with the given strides; moved: so that each channel's mean over all images is zero
  ImageConvolution(const Convolution& c, int64_t pool, const T* x, const int64_t* strides, Arena& arena, bool moved = true)
      : c_(c), pool_(pool), taps_(c.inputs * c.kernel[0] * c.kernel[1]), height_(c.height + 2 * c.padding[0]),
        width_(c.width + 2 * c.padding[1]) {
    const int64_t row = width_ * c.inputs;
    // The norm takes back any constant: images far from zero lose nothing to rounding when they are moved there first.
    std::vector<T> level(c.inputs);
    T* const padded = arena.take<T>(c.images * height_ * row);
    const int64_t grain = 1 + kGrain / (height_ * row);
    std::vector<double> sums(c.images * c.inputs);
    at::parallel_for(0, moved ? c.images : 0, grain, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        for (int64_t k = 0; k < c.inputs; ++k) {
          double parts[kParts] = {};
          for (int64_t h = 0; h < c.height; ++h) {
            const T* from = x + n * strides[0] + k * strides[1] + h * strides[2];
            int64_t w = 0;
            for (; w + kParts <= c.width; w += kParts)
              for (int64_t i = 0; i < kParts; ++i) parts[i] += double(from[(w + i) * strides[3]]);
            for (; w < c.width; ++w) parts[0] += double(from[w * strides[3]]);
          }
          for (double part : parts) sums[n * c.inputs + k] += part;
        }
    });
    std::vector<T> border(row);  // a row of zeros, moved
    for (int64_t k = 0; k < c.inputs; ++k) {
      double sum = 0.0;
      for (int64_t n = 0; n < c.images; ++n) sum += sums[n * c.inputs + k];
      level[k] = T(sum / double(c.images * c.height * c.width));
      for (int64_t w = 0; w < width_; ++w) border[w * c.inputs + k] = -level[k];
    }
    at::parallel_for(0, c.images, grain, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        for (int64_t h = 0; h < height_; ++h) {
          T* const to = padded + (n * height_ + h) * row;
          std::copy(border.begin(), border.end(), to);
          const int64_t in = h - c.padding[0];
          if (in < 0 || in >= c.height) continue;
          for (int64_t k = 0; k < c.inputs; ++k) {
            const T* from = x + n * strides[0] + k * strides[1] + in * strides[2];
            T* const at = to + c.padding[1] * c.inputs + k;
            const int64_t step = c.inputs, across = strides[3];
            const T own = level[k];
            for (int64_t w = 0; w < c.width; ++w) at[w * step] = from[w * across] - own;
          }
        }
    });
    x_ = padded;
    offsets_.assign(up(taps_, kImageTaps), 0);
    for (int64_t k = 0; k < taps_; ++k) {
      const int64_t channel = k / (c.kernel[0] * c.kernel[1]), i = k / c.kernel[1] % c.kernel[0], j = k % c.kernel[1];
      levels_.push_back(double(level[channel]));
      offsets_[k] = (i * c.dilation[0] * width_ + j * c.dilation[1]) * c.inputs + channel;
    }
  }

  // Of some of the images.
  ImageConvolution part(int64_t first, int64_t count) const {
    ImageConvolution some = *this;
    some.x_ += first * height_ * width_ * c_.inputs, some.c_.images = count;
    return some;
  }

  // to [K + 1, K + 1]
  void moments(double* to, Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    const int64_t side = taps_ + 1;
    ImageBlock<T> p = describe(0);
    // Whole images, where they go by distance.
    p.slabs = by_distance(p) ? std::clamp<int64_t>(p.images, 1, kImageSlabs) : p.slabs;
    p.partial = arena.take<double>(p.slabs * side * side);
    p.scratch = by_distance(p) ? arena.take<double>(p.slabs * image_moments_scratch(p)) : nullptr;
    const auto& kernels = image_block_kernels<T>();
    const int64_t work = c_.pixels() * side * side / p.slabs;
    at::parallel_for(0, p.slabs, 1 + kGrain / (work + 1),
                     [&](int64_t begin, int64_t end) { kernels.moments(p, begin, end); });
    std::copy(p.partial, p.partial + side * side, to);
    for (int64_t slab = 1; slab < p.slabs; ++slab)
      for (int64_t i = 0; i < side * side; ++i) to[i] += p.partial[slab * side * side + i];
    // Back to where the images were: with q = p - level, p^T p = q^T q + level sum(q)^T + sum(q) level^T + M level level^T.
    double* sums = to + taps_ * side;
    const double count = sums[taps_];
    for (int64_t i = 0; i < taps_; ++i)
      for (int64_t j = 0; j < taps_; ++j)
        to[i * side + j] += levels_[i] * sums[j] + sums[i] * levels_[j] + count * levels_[i] * levels_[j];
    for (int64_t i = 0; i < taps_; ++i) to[i * side + taps_] = sums[i] += count * levels_[i];
    arena.rewind(mark);
  }

  // weight [O, K], gamma and beta [O] -> the filters of `apply`: rows of weight by tap, then mean, gamma rstd and beta, all
  // with the outputs rounded up; mean, rstd [O]
  const T* filters(const T* weight, const T* gamma, const T* beta, const Patches& patches, double eps, T* mean, T* rstd,
                   Arena& arena) const {
    const int64_t padded = up(c_.outputs, kLanes);
    T* const rows = arena.take<T>((taps_ + 3) * padded);
    std::fill(rows, rows + (taps_ + 3) * padded, T(0));
    std::vector<double> along(taps_);
    for (int64_t o = 0; o < c_.outputs; ++o, weight += taps_) {
      double m = 0.0, level = 0.0, variance = 0.0;
      patches.apply(weight, along.data());
      for (int64_t k = 0; k < taps_; ++k) {
        m += double(weight[k]) * patches.average[k];
        level += double(weight[k]) * (patches.average[k] - levels_[k]);
        variance += double(weight[k]) * along[k];
        rows[k * padded + o] = weight[k];
      }
      const double r = 1.0 / std::sqrt(std::max(variance, 0.0) + eps);
      mean[o] = T(m), rstd[o] = T(r);
      rows[taps_ * padded + o] = T(level);
      rows[(taps_ + 1) * padded + o] = gamma[o] * T(r);
      rows[(taps_ + 2) * padded + o] = beta[o];
    }
    return rows;
  }

  // -> y [N, rows, columns, O] of the pooled size, index as y
  void apply(const T* filters, T* y, uint8_t* index) const {
    ImageBlock<T> p = describe(c_.outputs);
    p.weight = filters, p.mean = p.weight + taps_ * p.padded_outputs;
    p.scale = p.mean + p.padded_outputs, p.beta = p.scale + p.padded_outputs;
    p.y = y, p.index = index;
    const int64_t work = p.columns * pool_ * pool_ * taps_ * c_.outputs;  // multiply-adds of an item
    at::parallel_for(0, p.images * p.rows, 1 + kGrain / (work + 1),
                     [&](int64_t begin, int64_t end) { image_block_kernels<T>().apply(p, begin, end); });
  }

  // weight [O, K], gamma and beta [O] -> y and index as `apply` gives them, mean, rstd [O]
  void block(const T* weight, const T* gamma, const T* beta, const Patches& patches, double eps, T* y, uint8_t* index,
             T* mean, T* rstd, Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    apply(filters(weight, gamma, beta, patches, eps, mean, rstd, arena), y, index);
    arena.rewind(mark);
  }

  // Values of the filters for `affine`, and these, of weight [O, K] and bias [O]: weight by tap, mean 0, scale 1, bias.
  static int64_t affine_filters(const Convolution& c) {
    return (c.inputs * c.kernel[0] * c.kernel[1] + 3) * up(c.outputs, kLanes);
  }
  static void affine_filters(const Convolution& c, const T* weight, const T* bias, T* rows) {
    const int64_t taps = c.inputs * c.kernel[0] * c.kernel[1], padded = up(c.outputs, kLanes);
    std::fill(rows, rows + (taps + 3) * padded, T(0));
    for (int64_t o = 0; o < c.outputs; ++o) {
      for (int64_t k = 0; k < taps; ++k) rows[k * padded + o] = weight[o * taps + k];
      rows[(taps + 1) * padded + o] = T(1);
      rows[(taps + 2) * padded + o] = bias[o];
    }
  }

  // Without moments, for one pass alone: the windows' maxima of z, of -z where `negative`, to y; mean and variance of z.
  // z is of the images as they were moved, so that both y and mean lack the same constant.
  void survey(const T* weight, const bool* negative, T* y, double* mean, double* variance, Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    ImageBlock<T> p = describe(c_.outputs);
    T* const rows = arena.take<T>(taps_ * p.padded_outputs);
    std::fill(rows, rows + taps_ * p.padded_outputs, T(0));
    for (int64_t o = 0; o < c_.outputs; ++o, weight += taps_)
      for (int64_t k = 0; k < taps_; ++k) rows[k * p.padded_outputs + o] = negative[o] ? -weight[k] : weight[k];
    p.weight = rows, p.y = y;
    p.partial = arena.take<double>(p.slabs * 2 * p.padded_outputs);
    const auto& kernels = image_block_kernels<T>();
    const int64_t work = c_.pixels() * taps_ * c_.outputs / p.slabs;
    at::parallel_for(0, p.slabs, 1 + kGrain / (work + 1),
                     [&](int64_t begin, int64_t end) { kernels.survey(p, begin, end); });
    const double pixels = double(c_.pixels());
    for (int64_t o = 0; o < c_.outputs; ++o) {
      double sum = 0.0, square = 0.0;
      for (int64_t slab = 0; slab < p.slabs; ++slab) {
        sum += p.partial[slab * 2 * p.padded_outputs + o];
        square += p.partial[(slab * 2 + 1) * p.padded_outputs + o];
      }
      mean[o] = (negative[o] ? -sum : sum) / pixels;
      variance[o] = std::max(square / pixels - mean[o] * mean[o], 0.0);
    }
    arena.rewind(mark);
  }

  // What a filter's z lacks, since the images were moved: w [K] level.
  double constant(const T* w) const {
    double sum = 0.0;
    for (int64_t k = 0; k < taps_; ++k) sum += double(w[k]) * levels_[k];
    return sum;
  }

  // Values of the sums that gradients are made of: [padded taps + 1, padded outputs].
  int64_t sums() const { return (int64_t(offsets_.size()) + 1) * up(c_.outputs, kLanes); }

  // to += the sums over the maxima of g patch, and below them of g; of a few images many times, or of all at once
  void add_sums(const T* gy, const uint8_t* index, double* to, Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    constexpr int64_t kRows = 8;  // of a slab at least: a slab's sums cost as much as a row's
    ImageBlock<T> p = describe(c_.outputs);
    p.slabs = std::clamp<int64_t>(p.images * p.rows / kRows, 1, kSlabs);
    p.gy = gy, p.index = const_cast<uint8_t*>(index);
    p.partial = arena.take<double>(p.slabs * sums());
    const int64_t work = p.images * p.rows * p.columns * pool_ * pool_ * taps_ * c_.outputs / p.slabs;
    at::parallel_for(0, p.slabs, 1 + kGrain / (work + 1),
                     [&](int64_t begin, int64_t end) { image_block_kernels<T>().reduce(p, begin, end); });
    for (int64_t slab = 0; slab < p.slabs; ++slab)
      for (int64_t i = 0; i < sums(); ++i) to[i] += p.partial[slab * sums() + i];
    arena.rewind(mark);
  }

  // From the sums over all images, which are changed: -> dweight [O, K], dgamma, dbeta [O]
  void gradients(double* sums, const T* weight, const T* gamma, const T* rstd, const Patches& patches, T* dweight, T* dgamma,
                 T* dbeta) const {
    const int64_t padded = up(c_.outputs, kLanes);
    centre(sums, patches);
    // With A = sum(g (p - average)): dbeta = sum(g), dgamma = rstd <w, A>, dw = gamma rstd (A - dgamma rstd covariance w)
    std::vector<double> along(taps_);
    for (int64_t o = 0; o < c_.outputs; ++o, weight += taps_, dweight += taps_) {
      const double r = double(rstd[o]), g = double(gamma[o]);
      double centred = 0.0;  // <w, A>
      patches.apply(weight, along.data());
      for (int64_t k = 0; k < taps_; ++k) centred += double(weight[k]) * sums[k * padded + o];
      const double slope = centred * r;
      for (int64_t k = 0; k < taps_; ++k) dweight[k] = T(g * r * (sums[k * padded + o] - slope * r * along[k]));
      dgamma[o] = T(slope), dbeta[o] = T(sums[int64_t(offsets_.size()) * padded + o]);
    }
  }

  // -> dweight [O, K], dgamma, dbeta [O]
  void block_grad(const T* gy, const T* weight, const T* gamma, const uint8_t* index, const T* rstd, const Patches& patches,
                  T* dweight, T* dgamma, T* dbeta, Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    gradients(all_sums(gy, index, arena), weight, gamma, rstd, patches, dweight, dgamma, dbeta);
    arena.rewind(mark);
  }

  // A block's parameters, or their derivatives (null for zeros): weight [O, K], gamma and beta [O]
  struct Affine {
    const T *weight, *gamma, *beta;
  };

  // The derivative of y along that of the parameters, at the maxima that `index` tells.
  void follow(const Affine& now, const Affine& dot, const T* rstd, const uint8_t* index, const Patches& patches, T* y_dot,
              Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    ImageBlock<T> p = describe(c_.outputs);
    T* const rows = arena.take<T>((taps_ + 2) * p.padded_outputs);
    std::fill(rows, rows + (taps_ + 2) * p.padded_outputs, T(0));
    std::vector<double> along(taps_);
    // y = gamma rstd <w, p - average> + beta moves as <f, p - average> + beta_dot: one filter f
    for (int64_t o = 0; o < c_.outputs; ++o) {
      const T *w = now.weight + o * taps_, *w_dot = dot.weight == nullptr ? nullptr : dot.weight + o * taps_;
      const double r = double(rstd[o]), g = double(now.gamma[o]);
      double of_w = dot.gamma == nullptr ? 0.0 : double(dot.gamma[o]) * r, level = 0.0;
      if (w_dot != nullptr) {
        double turn = 0.0;  // <w_dot, covariance w>
        patches.apply(w, along.data());
        for (int64_t k = 0; k < taps_; ++k) turn += double(w_dot[k]) * along[k];
        of_w -= g * r * r * r * turn;
      }
      for (int64_t k = 0; k < taps_; ++k) {
        const double f = of_w * double(w[k]) + (w_dot == nullptr ? 0.0 : g * r * double(w_dot[k]));
        level += f * (patches.average[k] - levels_[k]);
        rows[k * p.padded_outputs + o] = T(f);
      }
      rows[taps_ * p.padded_outputs + o] = T(level);
      rows[(taps_ + 1) * p.padded_outputs + o] = dot.beta == nullptr ? T(0) : dot.beta[o];
    }
    p.weight = rows, p.mean = rows + taps_ * p.padded_outputs, p.beta = p.mean + p.padded_outputs;
    p.y = y_dot, p.index = const_cast<uint8_t*>(index);
    const int64_t work = p.columns * pool_ * pool_ * taps_ * c_.outputs;  // multiply-adds of an item
    at::parallel_for(0, p.images * p.rows, 1 + kGrain / (work + 1),
                     [&](int64_t begin, int64_t end) { image_block_kernels<T>().follow(p, begin, end); });
    arena.rewind(mark);
  }

  // Where a block's gradients go: dweight [O, K], dgamma, dbeta [O]
  struct AffineGrad {
    T *weight, *gamma, *beta;
  };

  // The gradients as block_grad gives them, and their derivatives along that of gy and the parameters.
  void block_grad(const T* gy, const T* gy_dot, const Affine& now, const Affine& dot, const uint8_t* index, const T* rstd,
                  const Patches& patches, const AffineGrad& to, const AffineGrad& to_dot, Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    const int64_t padded = up(c_.outputs, kLanes), all = int64_t(offsets_.size()) * padded;
    double *const sums = all_sums(gy, index, arena), *const sums_dot = all_sums(gy_dot, index, arena);
    centre(sums, patches), centre(sums_dot, patches);
    std::vector<double> along(taps_), along_dot(taps_);  // covariance w, covariance w_dot
    for (int64_t o = 0; o < c_.outputs; ++o) {
      const T *w = now.weight + o * taps_, *w_dot = dot.weight == nullptr ? nullptr : dot.weight + o * taps_;
      const double r = double(rstd[o]), g = double(now.gamma[o]);
      const double g_dot = dot.gamma == nullptr ? 0.0 : double(dot.gamma[o]);
      patches.apply(w, along.data());
      if (w_dot != nullptr) patches.apply(w_dot, along_dot.data());
      double turn = 0.0, centred = 0.0, centred_dot = 0.0;  // <w_dot, covariance w>, <w, A> and its derivative
      for (int64_t k = 0; k < taps_; ++k) {
        const double a = sums[k * padded + o];
        centred += double(w[k]) * a;
        centred_dot += double(w[k]) * sums_dot[k * padded + o];
        if (w_dot != nullptr) turn += double(w_dot[k]) * along[k], centred_dot += double(w_dot[k]) * a;
      }
      const double r_dot = -r * r * r * turn, slope = centred * r, slope_dot = centred_dot * r + centred * r_dot;
      for (int64_t k = 0; k < taps_; ++k) {
        const double whole = sums[k * padded + o] - slope * r * along[k];
        const double whole_dot = sums_dot[k * padded + o] - (slope_dot * r + slope * r_dot) * along[k] -
                                 (w_dot == nullptr ? 0.0 : slope * r * along_dot[k]);
        to.weight[o * taps_ + k] = T(g * r * whole);
        to_dot.weight[o * taps_ + k] = T((g_dot * r + g * r_dot) * whole + g * r * whole_dot);
      }
      to.gamma[o] = T(slope), to.beta[o] = T(sums[all + o]);
      to_dot.gamma[o] = T(slope_dot), to_dot.beta[o] = T(sums_dot[all + o]);
    }
    arena.rewind(mark);
  }

 private:
  static constexpr int64_t kImageSlabs = 8;  // likewise, of whole images
  static constexpr int64_t kSlabs = 32;      // a sum's parts, whatever the number of threads, so that it has one order
  static constexpr int64_t kParts = 8;       // of a row's sum, which do not wait for one another
  static constexpr int64_t kGrain = 100000;  // multiply-adds that a thread must have before splitting pays

  double* all_sums(const T* gy, const uint8_t* index, Arena& arena) const {
    double* const to = arena.take<double>(sums());
    std::fill_n(to, sums(), 0.0);
    add_sums(gy, index, to, arena);
    return to;
  }

  // Sums of g patch to sums of g (patch - average).
  void centre(double* sums, const Patches& patches) const {
    const int64_t padded = up(c_.outputs, kLanes);
    const double* const total = sums + int64_t(offsets_.size()) * padded;
    for (int64_t k = 0; k < taps_; ++k)
      for (int64_t o = 0; o < c_.outputs; ++o) sums[k * padded + o] -= total[o] * (patches.average[k] - levels_[k]);
  }

  ImageBlock<T> describe(int64_t outputs) const {
    ImageBlock<T> p{};
    p.x = x_;
    p.images = c_.images, p.inputs = c_.inputs, p.height = height_, p.width = width_;
    p.taps = taps_, p.padded_taps = int64_t(offsets_.size()), p.offsets = offsets_.data();
    p.stride_y = c_.stride[0], p.stride_x = c_.stride[1], p.pool = pool_;
    p.kernel_y = c_.kernel[0], p.kernel_x = c_.kernel[1];
    p.dense = std::max({c_.stride[0], c_.stride[1], c_.dilation[0], c_.dilation[1]}) == 1;
    p.out_rows = c_.rows, p.out_columns = c_.columns, p.rows = c_.rows / pool_, p.columns = c_.columns / pool_;
    p.outputs = outputs, p.padded_outputs = up(outputs, kLanes);
    p.slabs = std::clamp<int64_t>(p.images * p.rows, 1, kSlabs);
    return p;
  }

  Convolution c_;
  int64_t pool_, taps_, height_, width_;  // height and width with the padding
  const T* x_;                            // [N, height, width, C], minus each channel's level
  std::vector<int64_t> offsets_;
  std::vector<double> levels_;  // [K]
};

}  // namespace lk
