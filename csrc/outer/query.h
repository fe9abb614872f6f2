// A chain's pass over one task's query images, and its way back, that keep little: what a block makes of a few images is
// made anew where it is needed again, a part of the images after another.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "arena.h"
#include "image_block.h"
#include "norm_relu_pool.h"
#include "outer/block.h"
#include "outer/chain.h"
#include "outer/convolution_tangent.h"
#include "outer/head.h"
#include "winograd.h"

namespace lk {

// How a block is computed, and what of it the way back reads.
enum class Way {
  kImages,  // a first block by its patches' moments: nothing but these, or y and index
  kPooled,  // the windows' maxima of z (of -z where gamma is negative), y and index; z is made anew (frozen_block.h)
  kWhole,   // z, y and index
};

template <typename T>
class QueryBlock {
 public:
  // next: the convolution behind it, or null
  QueryBlock(const Convolution& c, int64_t pool, double eps, bool by_moments, const Convolution* next)
      : c_(c), pool_(pool), eps_(eps), rows_(c.rows / pool), columns_(c.columns / pool) {
    way_ = by_moments ? Way::kImages : pool == 2 && WinogradConvolution<T>::takes(c) ? Way::kPooled : Way::kWhole;
    keeps_y_ = !by_moments || next == nullptr;
  }

  // Lays out what the forward pass keeps, from `memory` on (null to count alone), and returns its bytes.
  int64_t lay_out(std::byte* memory, bool is_filled) {
    const int64_t side = taps() + 1, y = keeps_y_ ? c_.images * per_y() : 0;
    const int64_t z = way_ == Way::kImages ? 0 : way_ == Way::kPooled ? y : c_.images * per_z();
    return kept_.lay_out({z, y, c_.outputs, way_ == Way::kImages ? side * side : 0}, memory, is_filled);
  }

  // first: the images, of a block by their patches
  void set(const Images<T>& first, const Parameters<const T>& now, bool is_filled, const at::TensorOptions& options,
           Arena& arena) {
    now_ = now, options_ = options;
    if (way_ == Way::kImages) {
      images_.emplace(c_, pool_, first.data, first.strides, arena);
      if (!is_filled) images_->moments(kept_.moments, arena);
      patches_.emplace(taps(), kept_.moments);
      T* const mean = is_filled ? arena.take<T>(c_.outputs) : kept_.mean;
      T* const rstd = is_filled ? arena.take<T>(c_.outputs) : kept_.rstd;
      filters_ = images_->filters(now.weight, now.gamma, now.beta, *patches_, eps_, mean, rstd, arena);
      return;
    }
    sign_ = arena.take<T>(c_.outputs), size_ = arena.take<T>(c_.outputs);
    for (int64_t o = 0; o < c_.outputs; ++o) {
      sign_[o] = way_ == Way::kPooled && now.gamma[o] < T(0) ? T(-1) : T(1);
      size_[o] = sign_[o] * now.gamma[o];
    }
  }

  Way way() const { return way_; }
  bool keeps_y() const { return keeps_y_; }
  const T* y() const { return kept_.y; }
  int64_t images() const { return c_.images; }
  int64_t per_x() const { return c_.height * c_.width * c_.inputs; }  // values of an image
  int64_t per_y() const { return rows_ * columns_ * c_.outputs; }

  // Images of a part: so many that their z lies in the second-level cache; a function of the sizes alone.
  int64_t part() const {
    const int64_t most = std::clamp<int64_t>(kPart / per_z(), 1, c_.images);
    const int64_t parts = (c_.images + most - 1) / most;
    return (c_.images + parts - 1) / parts;
  }

  // A block by patches: y and index of some images. They are kept, or made from the arena.
  struct Made {
    const T* y;
    const uint8_t* index;
  };
  Made made(int64_t first, int64_t count, Arena& arena) const {
    if (keeps_y_) return {kept_.y + first * per_y(), kept_.index + first * per_y()};
    T* const y = arena.take<T>(count * per_y());
    uint8_t* const index = arena.take<uint8_t>(count * per_y());
    images_->part(first, count).apply(filters_, y, index);
    return {y, index};
  }

  // x(first, count, arena): some images of what the block gets.
  template <typename X>
  void forward(const X& x, Arena& arena) {
    const Arena::Mark mark = arena.mark();
    if (way_ == Way::kImages) {
      if (keeps_y_) images_->apply(filters_, kept_.y, kept_.index);
    } else if (way_ == Way::kPooled) {
      bool* const negative = arena.take<bool>(c_.outputs);
      double *const mean = arena.take<double>(c_.outputs), *const squares = arena.take<double>(c_.outputs), seen = 0.0;
      for (int64_t o = 0; o < c_.outputs; ++o) negative[o] = sign_[o] < T(0), mean[o] = squares[o] = 0.0;
      const int64_t strides[] = {c_.inputs * 9, 9, 3, 1};
      const WinogradConvolution<T> filter(c_, const_cast<T*>(now_.weight), strides);
      const T* const u = filter.surveyed(negative, arena);
      each_part(
          [&](int64_t first, int64_t count) {
            filter.part(count).survey(x(first, count, arena), u, kept_.z + first * per_y(), seen, mean, squares, arena);
          },
          arena);
      for (int64_t o = 0; o < c_.outputs; ++o) {
        kept_.mean[o] = T(mean[o]);
        kept_.rstd[o] = T(1.0 / std::sqrt(std::max(squares[o] / seen, 0.0) + eps_));
      }
      const NormReluPool<T> p = norm(0, c_.images, true);
      over_threads(norm_relu_pool_kernels<T>().apply, p, p.images * p.height);
    } else {
      const std::unique_ptr<ConvolutionParts<T>> filter = parts(nullptr, arena);
      each_part([&](int64_t first,
                    int64_t count) { filter->forward(count, x(first, count, arena), kept_.z + first * per_z(), arena); },
                arena);
      NormReluPool<T> p = norm(0, c_.images, false);
      p.partial = arena.take<double>(p.images * p.slabs * 2 * c_.outputs);
      run_norm_relu_pool(p);
    }
    arena.rewind(mark);
  }

  // A block by patches: values of the sums that its gradients are made of, what some images' gy, whose index is given,
  // adds to them, and slopes += the gradients that they make.
  int64_t sums() const { return images_->sums(); }
  void add_sums(int64_t first, int64_t count, const T* gy, const uint8_t* index, double* to, Arena& arena) const {
    images_->part(first, count).add_sums(gy, index, to, arena);
  }
  void add_gradients(double* sums, const Parameters<T>& slopes, Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    const int64_t O = c_.outputs;
    T *const weight = arena.take<T>(O * taps()), *const gamma = arena.take<T>(O), *const beta = arena.take<T>(O);
    images_->gradients(sums, now_.weight, now_.gamma, kept_.rstd, *patches_, weight, gamma, beta);
    add(slopes.weight, weight, O * taps()), add(slopes.gamma, gamma, O), add(slopes.beta, beta, O);
    arena.rewind(mark);
  }

  // Of gy: slopes += the gradients. to(first, count, arena): where the gradient of some images of x goes, or null;
  // done(first, count, gx, arena) follows. x as in `forward`.
  template <typename X, typename To, typename Done>
  void backward(const T* gy, const Parameters<T>& slopes, const X& x, bool wants_x, const To& to, const Done& done,
                Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    const int64_t O = c_.outputs;
    T *const dgamma = arena.take<T>(O), *const dbeta = arena.take<T>(O);
    NormReluPool<T> p = norm(0, c_.images, way_ == Way::kPooled);
    p.gy = gy, p.dgamma = dgamma, p.dbeta = dbeta;
    p.partial = arena.take<double>(p.images * p.slabs * 2 * O);
    run_norm_relu_pool_grad(p);
    for (int64_t o = 0; o < O; ++o) dgamma[o] *= sign_[o];
    add(slopes.gamma, dgamma, O), add(slopes.beta, dbeta, O);
    if (slopes.weight == nullptr && !wants_x) return arena.rewind(mark);
    T *const mean = arena.take<T>(O), *const gamma_part = arena.take<T>(O), *const beta_part = arena.take<T>(O);
    for (int64_t o = 0; o < O; ++o) mean[o] = sign_[o] * kept_.mean[o];
    const std::unique_ptr<ConvolutionParts<T>> filter = parts(slopes.weight, arena);
    each_part(
        [&](int64_t first, int64_t count) {
          const auto images = x(first, count, arena);
          NormReluPool<T> part = norm(first, count, false);
          part.gy = gy + first * per_y(), part.dgamma = gamma_part, part.dbeta = beta_part;
          // `dense` takes averages over the part's images, whose sums these are not.
          const double share = double(count) / double(c_.images);
          for (int64_t o = 0; o < O; ++o) gamma_part[o] = T(share * dgamma[o]), beta_part[o] = T(share * dbeta[o]);
          T* const dz = arena.take<T>(count * per_z());
          if (way_ == Way::kPooled) {
            filter->forward(count, images, dz, arena);
            part.z = dz, part.y = arena.take<T>(count * per_y()), part.index = arena.take<uint8_t>(count * per_y());
            part.mean = mean;
            over_threads(norm_relu_pool_kernels<T>().apply, part, count * (c_.rows / pool_));
          }
          part.dz = dz;  // in the place of z, each value after it was read
          over_threads(norm_relu_pool_kernels<T>().dense, part, count * ((c_.rows + pool_ - 1) / pool_));
          if (slopes.weight != nullptr) filter->weight_gradient(count, images, dz, arena);
          if (!wants_x) return;
          T* const gx = to(first, count, arena);
          filter->input_gradient(count, dz, gx, arena);
          done(first, count, gx, arena);
        },
        arena);
    if (slopes.weight != nullptr) filter->finish();
    arena.rewind(mark);
  }

 private:
  static constexpr int64_t kPart = int64_t(1) << 16;  // values of z

  int64_t taps() const { return c_.inputs * c_.kernel[0] * c_.kernel[1]; }
  int64_t per_z() const { return c_.rows * c_.columns * c_.outputs; }

  Convolution of(int64_t count) const {
    Convolution part = c_;
    part.images = count;
    return part;
  }
  // to: where the weight's gradient goes, or null
  std::unique_ptr<ConvolutionParts<T>> parts(T* to, Arena& arena) const {
    return convolution_parts<T>(of(part()), now_.weight, to, options_, arena);
  }

  template <typename F>
  void each_part(const F& f, Arena& arena) const {
    for (int64_t first = 0; first < c_.images; first += part()) {
      const Arena::Mark mark = arena.mark();
      f(first, std::min(part(), c_.images - first));
      arena.rewind(mark);
    }
  }

  // The norm of some images; pooled: of the windows' maxima, as if z had these alone, by the size of gamma.
  NormReluPool<T> norm(int64_t first, int64_t count, bool pooled) const {
    NormReluPool<T> p{};
    p.tasks = 1, p.images = count, p.channels = c_.outputs, p.eps = eps_;
    p.height = pooled ? rows_ : c_.rows, p.width = pooled ? columns_ : c_.columns, p.pool = pooled ? 1 : pool_;
    set_slabs(p);
    p.gamma = pooled ? size_ : now_.gamma, p.beta = now_.beta;
    p.z = way_ == Way::kWhole || pooled ? kept_.z + first * (pooled ? per_y() : per_z()) : nullptr;
    p.y = kept_.y + first * per_y(), p.index = kept_.index + first * per_y();
    p.mean = kept_.mean, p.rstd = kept_.rstd;
    return p;
  }

  static void add(T* to, const T* from, int64_t count) {
    for (int64_t i = 0; to != nullptr && i < count; ++i) to[i] += from[i];
  }

  Convolution c_;
  int64_t pool_;
  double eps_;
  int64_t rows_, columns_;  // of y
  Way way_;
  bool keeps_y_;
  Activations<T> kept_;  // kPooled: z, mean and index are of the windows' maxima, mean times the sign of gamma
  Parameters<const T> now_{};
  T *sign_ = nullptr, *size_ = nullptr;  // of gamma [outputs]; sign 1 where all of z is kept
  at::TensorOptions options_;
  std::optional<ImageConvolution<T>> images_;
  std::optional<Patches> patches_;
  const T* filters_ = nullptr;  // of a block by patches
};

template <typename T>
class QueryChain {
 public:
  // kept: memory of `bytes` that a forward pass fills; filled: by an earlier call.
  QueryChain(const ChainShape& shape, const at::Tensor& x, const Places<const T>& now, std::byte* kept, bool is_filled,
             Arena& arena)
      : shape_(shape), now_(now), blocks_(blocks_of(shape)) {
    if (shape.ways > 0) head_.emplace(shape.images, shape.ways, shape.channels, shape.height * shape.width, arena);
    const Images<T> images{x.const_data_ptr<T>(), x.strides().data()};
    for (size_t b = 0; b < blocks_.size(); ++b) {
      kept += blocks_[b].lay_out(kept, is_filled);
      blocks_[b].set(images, parameters(now, b), is_filled, x.options(), arena);
    }
    if (blocks_.empty()) {
      rows_ = x.contiguous();
      x_ = rows_.const_data_ptr<T>();
    } else {
      x_ = shape.by_moments ? nullptr : dense<T>(x, arena);
    }
  }

  // Bytes that a forward pass leaves for the way back.
  static int64_t bytes(const ChainShape& shape) {
    int64_t all = 0;
    for (QueryBlock<T>& block : blocks_of(shape)) all += block.lay_out(nullptr, true);
    return all;
  }

  // -> logits [N, ways], or, without a linear layer, the last block's features as they lie
  void forward(T* to, Arena& arena) {
    for (size_t b = 0; b < blocks_.size(); ++b)
      blocks_[b].forward([&](int64_t first, int64_t count, Arena& from) { return input(b, first, count, from).y; }, arena);
    if (!head_) {
      std::copy_n(features(), shape_.images * blocks_.back().per_y(), to);
      return;
    }
    const int64_t at = shape_.head();
    head_->forward({features(), nullptr}, {now_[at], nullptr}, {now_[at + 1], nullptr});
    head_->logits(to);
  }

  // gradient: of the logits, or of the features. slopes += the gradients, each unless it is null; gx: of x, dense
  // channels-last, unless it is null.
  void backward(const T* gradient, const Places<T>& slopes, T* gx, Arena& arena) {
    const int64_t at = shape_.head(), blocks = int64_t(blocks_.size());
    if (head_) {
      head_->resume(features(), now_[at], gradient);
      head_->parameters(slopes[at], T(1), slopes[at + 1], T(1), nullptr, nullptr, arena);
    }
    int64_t lowest = gx != nullptr ? 0 : blocks;
    for (int64_t place = at - 1; place >= 0; --place)
      if (slopes[place] != nullptr) lowest = std::min(lowest, shape_.block_of(place));
    if (lowest == blocks && gx == nullptr) return;
    const T* g = head_ ? head_->input_gradient(arena).value : gradient;
    double* sums = nullptr;  // of a first block by patches
    if (lowest == 0 && !blocks_.empty() && blocks_[0].way() == Way::kImages) {
      sums = arena.take<double>(blocks_[0].sums());
      std::fill_n(sums, blocks_[0].sums(), 0.0);
    }
    if (blocks == 0) std::copy_n(g, shape_.images * shape_.channels, gx);
    for (int64_t b = blocks - 1; b >= lowest; --b) {
      const QueryBlock<T>& block = blocks_[b];
      if (block.way() == Way::kImages) {
        block.add_sums(0, block.images(), g, block.made(0, block.images(), arena).index, sums, arena);
        break;
      }
      // A first block by patches takes the gradient part by part.
      const bool at_once = b == 1 && blocks_[0].way() == Way::kImages, wants_x = b > lowest || gx != nullptr;
      T* const below = b == 0 ? gx : at_once || !wants_x ? nullptr : arena.take<T>(shape_.images * block.per_x());
      const uint8_t* index = nullptr;  // of the present part
      block.backward(
          g, parameters(slopes, b),
          [&](int64_t first, int64_t count, Arena& from) {
            const auto made = input(b, first, count, from);
            index = made.index;
            return made.y;
          },
          wants_x,
          [&](int64_t first, int64_t count, Arena& from) {
            return at_once ? from.take<T>(count * block.per_x()) : below + first * block.per_x();
          },
          [&](int64_t first, int64_t count, const T* part, Arena& from) {
            if (at_once) blocks_[0].add_sums(first, count, part, index, sums, from);
          },
          arena);
      if (at_once) break;
      g = below;
    }
    if (sums != nullptr) blocks_[0].add_gradients(sums, parameters(slopes, 0), arena);
  }

 private:
  using Made = typename QueryBlock<T>::Made;

  static std::vector<QueryBlock<T>> blocks_of(const ChainShape& shape) {
    std::vector<QueryBlock<T>> blocks;
    for (size_t b = 0; b < shape.blocks.size(); ++b)
      blocks.emplace_back(shape.blocks[b], shape.pools[b], shape.eps[b], b == 0 && shape.by_moments,
                          b + 1 < shape.blocks.size() ? &shape.blocks[b + 1] : nullptr);
    return blocks;
  }

  template <typename P>
  static Parameters<P> parameters(const Places<P>& places, int64_t block) {
    return {places[block * kPerBlock], places[block * kPerBlock + 1], places[block * kPerBlock + 2]};
  }

  // Some images of what a block gets, and the index below it where that is a block by patches.
  Made input(int64_t b, int64_t first, int64_t count, Arena& arena) const {
    if (b == 0) return {x_ + first * blocks_[0].per_x(), nullptr};
    const QueryBlock<T>& below = blocks_[b - 1];
    if (below.way() == Way::kImages) return below.made(first, count, arena);
    return {below.y() + first * below.per_y(), nullptr};
  }

  const T* features() const { return blocks_.empty() ? x_ : blocks_.back().y(); }

  const ChainShape& shape_;
  const Places<const T>& now_;
  std::vector<QueryBlock<T>> blocks_;
  std::optional<OuterHead<T>> head_;
  at::Tensor rows_;
  const T* x_;  // dense channels-last, or features; null where the first block has the images itself
};

}  // namespace lk
