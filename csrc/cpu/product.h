// Products of small matrices. Torch-free.
#pragma once
#include <cstdint>

namespace lk {

constexpr int64_t kLanes = 16;  // columns and channels are rounded up to whole ones, which any vector divides

// c [rows, columns] = scale a b, plus c where `add`; b and c are padded to whole vectors of columns.
template <typename T>
struct Product {
  const T* a;
  int64_t a_row, a_depth;  // elements to the next row, and to the next term of the sum
  const T* b;
  int64_t b_row;
  T* c;
  int64_t c_row;
  int64_t rows, columns, depth;
  T scale;
  bool add;
};

template <typename T>
struct ProductKernels {
  void (*product)(const Product<T>&);
};

template <typename T>
const ProductKernels<T>& product_kernels();

}  // namespace lk
