// The inner loop of one task. The blocks ahead of the first updated one run once; the K steps reuse one layout of buffers,
// from an arena that later calls take over.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arena.h"
#include "checks.h"
#include "image_block.h"
#include "inner_loop/block.h"
#include "inner_loop/head.h"
#include "inner_loop/rates.h"
#include "interrupt.h"

namespace lk {

// One task's layers, with their parameters where the task keeps them.
template <typename T>
struct Chain {
  std::vector<Block<T>> blocks;
  at::Tensor weight;  // of the linear layer [ways, F]
  T* bias;  // [ways]
  bool update_weight, update_bias;

  // The linear layer's input channels for images x [N, C, H, W] or features [N, F].
  int64_t channels(const at::Tensor& x) const { return blocks.empty() ? x.size(1) : blocks.back().c.outputs; }
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

// The blocks up to `end` over images x [N, C, H, W], without a gradient: -> features of the last one, kept in the arena.
template <typename T>
const T* frozen_features(const at::Tensor& x, std::vector<Block<T>>& blocks, typename std::vector<Block<T>>::iterator end,
                         Arena& arena, Interrupt& interrupt) {
  T* const kept = arena.take<T>((end - 1)->outputs());
  const Arena::Mark mark = arena.mark();
  const T* a = ImageConvolution<T>::takes(blocks.front().c, blocks.front().pool) ? nullptr : dense<T>(x, arena);
  for (auto block = blocks.begin(); block != end; ++block) {
    interrupt.look();
    T* const y = block + 1 == end ? kept : arena.take<T>(block->outputs());
    block->run(a, block == blocks.begin() ? &x : nullptr, y, arena);
    a = y;
  }
  arena.rewind(mark);
  return kept;
}

// x [N, C, H, W] or [N, F] -> logits [N, ways]
template <typename T>
void classify(const at::Tensor& x, Chain<T>& chain, T* logits, Interrupt& interrupt) {
  const Borrowed arena;
  auto& blocks = chain.blocks;
  const at::Tensor features = blocks.empty() ? x.contiguous() : at::Tensor();
  const T* a = blocks.empty() ? features.const_data_ptr<T>() : frozen_features(x, blocks, blocks.end(), *arena, interrupt);
  Head<T>(chain.weight, chain.bias, x.size(0), chain.channels(x), false, false, false, *arena).classify(a, logits);
}

// x [N, C, H, W] or [N, F], labels [N]; updated parameters are changed in place. The loss before step k goes to
// losses[k * stride].
template <typename T>
void adapt(const at::Tensor& x, const int64_t* labels, Chain<T>& chain, const Rates<T>& rates, double* losses,
           int64_t stride, Interrupt& interrupt) {
  const Borrowed borrowed;
  Arena& arena = *borrowed;
  auto& blocks = chain.blocks;
  const auto first = std::find_if(blocks.begin(), blocks.end(), [](const Block<T>& b) { return b.updated(); });
  const T* a = x.const_data_ptr<T>();  // of the last frozen block, which the steps start from
  at::Tensor features;
  if (blocks.empty()) {
    features = x.contiguous();
    a = features.const_data_ptr<T>();
  } else if (first != blocks.begin()) {
    a = frozen_features(x, blocks, first, arena, interrupt);
  } else if (!ImageConvolution<T>::takes(first->c, first->pool)) {
    a = dense<T>(x, arena);
  }
  const auto place = [&](auto block) { return (block - blocks.begin()) * kPerBlock; };  // of its weight's rate
  int64_t most = 0;  // values of a z
  for (auto block = first; block != blocks.end(); ++block) {
    block->lay_out(block == blocks.begin() ? &x : nullptr, rates.steps(), rates.one(place(block)), arena);
    if (!block->images) most = std::max(most, block->c.pixels() * block->c.outputs);
  }
  T* const dz = arena.take<T>(most);
  const bool below = first != blocks.end();
  Head<T> head(chain.weight, chain.bias, x.size(0), chain.channels(x), chain.update_weight, chain.update_bias, below, arena);
  for (int64_t step = 0; step < rates.steps(); ++step) {
    const T* const now = rates.of(step);
    const T* y = a;
    interrupt.look();
    for (auto block = first; block != blocks.end(); ++block) y = block->forward(y, arena);
    losses[step * stride] = head.step(y, labels, now + place(blocks.end()));
    const T* g = head.gradient();
    for (auto block = blocks.end(); block != first;) {
      --block;
      interrupt.look();
      g = block->step(g, dz, now + place(block), arena);
    }
  }
  head.finish();
  for (auto block = first; block != blocks.end(); ++block) block->finish();
}

}  // namespace lk
