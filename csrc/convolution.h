// Sizes of a convolution, for every way to compute it.
#pragma once
#include <cstdint>

namespace lk {

// Sizes of a convolution of dense channels-last images x [images, height, width, inputs] to [images, rows, columns, outputs].
struct Convolution {
  int64_t images, height, width, inputs, rows, columns, outputs;
  int64_t kernel[2], stride[2], padding[2], dilation[2], groups;

  // geometry: stride, padding, dilation, vertical and horizontal each. rows and columns follow from the others.
  static Convolution of(int64_t images, int64_t inputs, int64_t height, int64_t width, int64_t outputs,
                        const int64_t (&kernel)[2], const int64_t* geometry, int64_t groups = 1) {
    Convolution c{images, height, width, inputs, 0, 0, outputs};
    for (int axis : {0, 1}) {
      c.kernel[axis] = kernel[axis], c.stride[axis] = geometry[axis];
      c.padding[axis] = geometry[2 + axis], c.dilation[axis] = geometry[4 + axis];
    }
    const auto along = [&](int64_t size, int axis) {
      return (size + 2 * c.padding[axis] - c.dilation[axis] * (kernel[axis] - 1) - 1) / c.stride[axis] + 1;
    };
    c.rows = along(height, 0), c.columns = along(width, 1), c.groups = groups;
    return c;
  }

  int64_t pixels() const { return images * rows * columns; }
};

// `value` rounded up to whole multiples of `to`.
inline int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace lk
