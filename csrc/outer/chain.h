// A chain of fused blocks and a linear layer over one task's images, with derivatives along a direction: the inner steps.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "arena.h"
#include "convolution.h"
#include "image_block.h"
#include "inner_loop/task.h"
#include "outer/block.h"
#include "outer/head.h"

namespace lk {

// Sizes of a chain, the same for all tasks.
struct ChainShape {
  std::vector<Convolution> blocks;
  std::vector<int64_t> pools;
  std::vector<double> eps;
  int64_t images, ways = 0;          // ways: 0 without a linear layer
  int64_t channels, height, width;  // of an image's features
  bool by_moments;                   // whether the first block goes by its patches' moments

  int64_t parameters() const { return int64_t(blocks.size()) * kPerBlock + (ways > 0 ? 2 : 0); }
  int64_t head() const { return int64_t(blocks.size()) * kPerBlock; }  // place of the linear layer's weight
  int64_t block_of(int64_t place) const { return place / kPerBlock; }  // the linear layer is behind the last block
};

// One task's dense parameters, or gradients of them, by place: weight, gamma, beta per block, then the linear layer's weight
// and bias. Null for none.
template <typename T>
using Places = std::vector<T*>;

template <typename T>
class OuterChain {
 public:
  OuterChain(const ChainShape& shape, const at::Tensor& x, Arena& arena) : shape_(shape) {
    head_.emplace(shape.images, shape.ways, shape.channels, shape.height * shape.width, arena);
    const at::TensorOptions options = x.options();
    const Images<T> images{x.const_data_ptr<T>(), x.strides().data()};
    const int64_t blocks = int64_t(shape.blocks.size());
    blocks_.reserve(blocks);
    for (int64_t b = 0; b < blocks; ++b) {
      const bool by_moments = b == 0 && shape.by_moments;
      blocks_.emplace_back(shape.blocks[b], shape.pools[b], shape.eps[b], by_moments ? &images : nullptr, options, arena);
    }
    if (blocks == 0) {
      rows_ = x.contiguous();
      x_ = rows_.const_data_ptr<T>();
    } else {
      x_ = shape.by_moments ? nullptr : dense<T>(x, arena);
    }
  }

  OuterHead<T>& head() { return *head_; }

  // The logits, and their derivative along that of the parameters; `head` has them.
  void forward(const Places<const T>& now, const Places<const T>& dot, Arena& arena) {
    Dual<const T> y{x_, nullptr};
    for (size_t b = 0; b < blocks_.size(); ++b) {
      blocks_[b].forward(y, of(now, b), of(dot, b), arena);
      y = {blocks_[b].y(), blocks_[b].y_dot()};
    }
    const int64_t at = shape_.head();
    head_->forward(y, {now[at], dot[at]}, {now[at + 1], dot[at + 1]});
  }

  // From the gradient of the logits, which `head` has: slopes += scales times the gradients, along += their derivatives;
  // gx: of x, dense channels-last, with its derivative, unless null.
  void backward(const Places<T>& slopes, const T* scales, const Places<T>& along, Dual<T> gx, Arena& arena) {
    const Arena::Mark mark = arena.mark();
    const int64_t at = shape_.head(), blocks = int64_t(blocks_.size());
    const T one = T(1);
    const auto scale = [&](int64_t place) { return scales == nullptr ? one : scales[place]; };
    head_->parameters(slopes[at], scale(at), slopes[at + 1], scale(at + 1), along[at], along[at + 1], arena);
    int64_t lowest = gx.value != nullptr ? 0 : blocks;
    for (int64_t place = at - 1; place >= 0; --place)
      if (slopes[place] != nullptr || along[place] != nullptr) lowest = std::min(lowest, shape_.block_of(place));
    if (lowest == blocks && gx.value == nullptr) return arena.rewind(mark);
    Dual<const T> g = head_->input_gradient(arena);
    for (int64_t b = blocks - 1; b >= lowest; --b) {
      Dual<T> below = b == 0 ? Dual<T>{gx.value, g.dot == nullptr ? nullptr : gx.dot} : Dual<T>{};
      if (b > lowest) {
        const int64_t values = blocks_[b].inputs();
        below = {arena.take<T>(values), g.dot == nullptr ? nullptr : arena.take<T>(values)};
      }
      const Parameters<const T> factors = scales == nullptr ? Parameters<const T>{} : of(scales, b);
      blocks_[b].backward(g, below, of(slopes, b), factors, of(along, b), arena);
      g = {below.value, below.dot};
    }
    if (blocks == 0 && gx.value != nullptr) {
      std::copy(g.value, g.value + shape_.images * shape_.channels, gx.value);
      if (gx.dot != nullptr && g.dot != nullptr) std::copy(g.dot, g.dot + shape_.images * shape_.channels, gx.dot);
    }
    arena.rewind(mark);
  }

 private:
  template <typename P>
  static Parameters<P> of(const Places<P>& places, int64_t block) {
    return {places[block * kPerBlock], places[block * kPerBlock + 1], places[block * kPerBlock + 2]};
  }
  static Parameters<const T> of(const T* scales, int64_t block) {
    return {scales + block * kPerBlock, scales + block * kPerBlock + 1, scales + block * kPerBlock + 2};
  }

  const ChainShape& shape_;
  std::vector<OuterBlock<T>> blocks_;
  std::optional<OuterHead<T>> head_;
  at::Tensor rows_;
  const T* x_;  // dense channels-last, or features; null where the first block has the images itself
};

}  // namespace lk
