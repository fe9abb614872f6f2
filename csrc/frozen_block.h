// A fused block without a gradient: convolution, norm, ReLU and max-pool in one pass over the images. The
// norm is monotonous in z, rising or, where gamma is negative, falling: so a window's maximum is known before the
// statistics are, and z itself is never written.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "arena.h"
#include "winograd.h"
#include "image_block.h"
#include "norm_relu_pool.h"

namespace lk {

inline bool frozen_block_takes(const Convolution& c, int64_t pool) {
  return ImageConvolution<float>::takes(c, pool) || (WinogradConvolution<float>::takes(c) && pool == 2);
}

template <typename T>
struct FrozenBlock {
  Convolution c;
  int64_t pool;
  double eps;
  const T* x;  // [images, inputs, height, width] with the strides; dense channels-last unless ImageConvolution takes it
  const int64_t* x_strides;
  const T* weight;
  const int64_t* weight_strides;
  const T *gamma, *beta;  // [outputs]
  T* y;                   // [images, rows / pool, columns / pool, outputs]
  T *mean, *rstd;         // [outputs]
};

template <typename T>
void run_frozen_block(const FrozenBlock<T>& b, Arena& arena) {
  const Arena::Mark mark = arena.mark();
  const int64_t outputs = b.c.outputs;
  bool* const negative = arena.take<bool>(outputs);
  double *const mean = arena.take<double>(outputs), *const variance = arena.take<double>(outputs);
  for (int64_t o = 0; o < outputs; ++o) negative[o] = b.gamma[o] < T(0);
  T* const level = arena.take<T>(outputs);  // the mean of what is in y
  if (ImageConvolution<T>::takes(b.c, b.pool)) {
    const int64_t taps = b.c.inputs * b.c.kernel[0] * b.c.kernel[1];
    const int64_t* s = b.weight_strides;
    T* const rows = arena.take<T>(outputs * taps);
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t j = k % b.c.kernel[1], i = k / b.c.kernel[1] % b.c.kernel[0], c = k / (b.c.kernel[0] * b.c.kernel[1]);
        rows[o * taps + k] = b.weight[o * s[0] + c * s[1] + i * s[2] + j * s[3]];
      }
    const ImageConvolution<T> images(b.c, b.pool, b.x, b.x_strides, arena);
    images.survey(rows, negative, b.y, mean, variance, arena);
    for (int64_t o = 0; o < outputs; ++o) {
      level[o] = T(mean[o]);
      b.mean[o] = T(mean[o] + images.constant(rows + o * taps));
    }
  } else {
    const WinogradConvolution<T> filter(b.c, const_cast<T*>(b.weight), b.weight_strides);
    double seen = 0.0;
    for (int64_t o = 0; o < outputs; ++o) mean[o] = variance[o] = 0.0;
    filter.survey(b.x, negative, b.y, seen, mean, variance, arena);
    for (int64_t o = 0; o < outputs; ++o) {
      b.mean[o] = level[o] = T(negative[o] ? -mean[o] : mean[o]);
      variance[o] = std::max(variance[o] / seen, 0.0);
    }
  }
  for (int64_t o = 0; o < outputs; ++o) b.rstd[o] = T(1.0 / std::sqrt(variance[o] + b.eps));
  NormReluPool<T> p{};
  p.tasks = 1, p.images = b.c.images, p.channels = outputs, p.height = b.c.rows, p.width = b.c.columns, p.pool = b.pool;
  p.gamma = b.gamma, p.beta = b.beta, p.mean = level, p.rstd = b.rstd, p.y = b.y;
  over_threads(norm_relu_pool_kernels<T>().settle, p, p.images * (p.height / p.pool));
  arena.rewind(mark);
}

}  // namespace lk
