// A product of matrices over the threads, by the kernel of cpu/product.h.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "cpu/product.h"

namespace lk {

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

}  // namespace lk
