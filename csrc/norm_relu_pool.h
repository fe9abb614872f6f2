// The kernels of cpu/norm_relu_pool.h over the threads.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "cpu/norm_relu_pool.h"

namespace lk {

// Parts of an image's rows: a function of the sizes alone, so that sums are taken in one order whatever the number of
// threads.
template <typename T>
void set_slabs(NormReluPool<T>& p) {
  p.slabs = std::clamp<int64_t>(16 / (p.tasks * p.images), 1, std::max<int64_t>(1, p.height / p.pool));
}

template <typename P>
void over_threads(void (*kernel)(const P&, int64_t, int64_t), const P& p, int64_t items) {
  constexpr int64_t kGrain = 16384;  // elements that a thread must have before splitting pays
  const int64_t elements = p.tasks * p.images * p.channels * p.height * p.width;
  const int64_t grain = std::max<int64_t>(1, kGrain * items / elements);
  at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

// z, gamma, beta -> y, index, mean, rstd
template <typename T>
void run_norm_relu_pool(const NormReluPool<T>& p) {
  const auto& kernels = norm_relu_pool_kernels<T>();
  over_threads(kernels.moments, p, p.tasks * p.images * p.slabs);
  over_threads(kernels.merge_moments, p, p.tasks);
  over_threads(kernels.apply, p, p.tasks * p.images * (p.height / p.pool));
}

// gy and what the forward pass left -> dgamma, dbeta, and dz unless it is null
template <typename T>
void run_norm_relu_pool_grad(const NormReluPool<T>& p) {
  const auto& kernels = norm_relu_pool_kernels<T>();
  over_threads(kernels.reduce, p, p.tasks * p.images * p.slabs);
  over_threads(kernels.merge_reduce, p, p.tasks);
  if (p.dz != nullptr) over_threads(kernels.dense, p, p.tasks * p.images * ((p.height + p.pool - 1) / p.pool));
}

}  // namespace lk
