// Sizes of a convolution, for every way to compute it.
#pragma once
#include <cstdint>

namespace lk {

// Sizes of a convolution of dense channels-last images x [images, height, width, inputs] to [images, rows, columns, outputs].
struct Convolution {
  int64_t images, height, width, inputs, rows, columns, outputs;
  int64_t kernel[2], stride[2], padding[2], dilation[2], groups;

  void size_output() {
    const auto along = [&](int64_t size, int axis) {
      return (size + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
    };
    rows = along(height, 0), columns = along(width, 1);
  }
  int64_t pixels() const { return images * rows * columns; }
};

// `value` rounded up to whole multiples of `to`.
inline int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace lk
