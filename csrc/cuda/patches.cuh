// The patches of images: what a convolution multiplies its weight with, K = inputs kernel_height kernel_width <= 32
// numbers each.
#pragma once
#include "common.cuh"

namespace lk {
namespace {

constexpr int kMostTaps = 32;  // K, and the lanes of a warp

struct Tap {
  int y, x;       // from the top left pixel of a patch
  int64_t input;  // channel
};

// What a patch is, the same for all kernels.
struct Patches {
  int taps;  // K
  int kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, height, width;
  int64_t inputs, x_task;

  explicit Patches(const ImageBlock& p)
      : taps(int(p.inputs * p.kernel_height * p.kernel_width)), kernel_height(int(p.kernel_height)),
        kernel_width(int(p.kernel_width)), stride_y(int(p.stride_y)), stride_x(int(p.stride_x)), padding_y(int(p.padding_y)),
        padding_x(int(p.padding_x)), dilation_y(int(p.dilation_y)), dilation_x(int(p.dilation_x)), height(int(p.height)),
        width(int(p.width)), inputs(p.inputs), x_task(p.x_task) {}

  __device__ Tap tap(int k) const {
    const int rest = k % (kernel_height * kernel_width);
    return {rest / kernel_width * dilation_y, rest % kernel_width * dilation_x, k / (kernel_height * kernel_width)};
  }
};

// The top left pixel of a patch, which may lie in the padding; image < 0 where there is no patch.
struct Corner {
  int64_t image;
  int y, x;
};

__device__ inline Corner corner(const Patches& patches, int64_t image, int row, int column) {
  return {image, row * patches.stride_y - patches.padding_y, column * patches.stride_x - patches.padding_x};
}

// x of a task [images, height, width, inputs] at one tap of a patch, 0 in the padding.
template <typename T>
__device__ inline Wide<T> pixel(const T* x, const Patches& patches, const Corner& from, const Tap& tap) {
  const int y = from.y + tap.y, column = from.x + tap.x;
  const bool inside = unsigned(y) < unsigned(patches.height) && unsigned(column) < unsigned(patches.width);
  if (from.image < 0 || !inside) return 0;
  return wide(x[((from.image * patches.height + y) * patches.width + column) * patches.inputs + tap.input]);
}

inline bool fits(const ImageBlock& p) {
  const int64_t taps = p.inputs * p.kernel_height * p.kernel_width;
  return p.tasks >= 0 && p.images > 0 && taps > 0 && taps <= kMostTaps && p.outputs > 0 && p.parts > 0 &&
         (p.pool == 1 || p.pool == 2) && p.out_height >= p.pool && p.out_width >= p.pool &&
         p.out_height * p.out_width < kMostRelative && p.height * p.width < kMostRelative &&
         p.images * p.out_height * p.out_width / p.parts < kMostRelative;
}

}  // namespace
}  // namespace lk
