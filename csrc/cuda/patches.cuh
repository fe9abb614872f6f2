// The patches of images: what a convolution multiplies its weight with, K = inputs kernel_height kernel_width <= 32
// numbers each.
#pragma once
#include "common.cuh"

namespace lk {
namespace {

constexpr int kMostTaps = 32;  // K, and the lanes of a warp

struct Tap {
  int y, x;        // from the top left pixel of a patch
  int64_t input;   // channel
  int64_t offset;  // from that pixel's first channel, in elements of x
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

  // The channel `input` at the place number `place` of the kernel.
  __device__ Tap tap(int place, int input) const {
    const int y = place / kernel_width * dilation_y, x = place % kernel_width * dilation_x;
    return {y, x, input, (int64_t(y) * width + x) * inputs + input};
  }
  __device__ Tap tap(int k) const { return tap(k % (kernel_height * kernel_width), k / (kernel_height * kernel_width)); }
};

// The top left pixel of a patch, which may lie in the padding.
struct Corner {
  int64_t at;  // its first channel, in elements of a task's x
  int y, x;
  bool whole;  // the patch lies within the image
};

__device__ inline Corner corner(const Patches& patches, int64_t image, int row, int column) {
  const int y = row * patches.stride_y - patches.padding_y, x = column * patches.stride_x - patches.padding_x;
  const bool whole = y >= 0 && y + (patches.kernel_height - 1) * patches.dilation_y < patches.height && x >= 0 &&
                     x + (patches.kernel_width - 1) * patches.dilation_x < patches.width;
  return {((image * patches.height + y) * patches.width + x) * patches.inputs, y, x, whole};
}

// Of no patch: all its taps are 0.
__device__ inline Corner no_corner() { return {0, -(1 << 30), -(1 << 30), false}; }

// x of a task [images, height, width, inputs] at one tap of a patch, 0 in the padding.
template <typename T>
__device__ inline Wide<T> pixel(const T* x, const Patches& patches, const Corner& from, const Tap& tap) {
  // Without branches, so that several loads are on their way at a time.
  const bool row = unsigned(from.y + tap.y) < unsigned(patches.height);
  const bool column = unsigned(from.x + tap.x) < unsigned(patches.width);
  const bool inside = from.whole | (row & column);
  return inside ? wide(x[from.at + tap.offset]) : Wide<T>(0);
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
