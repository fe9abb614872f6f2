// Images with a task axis as tensors, [tasks, images, C, H, W], channels-last in memory.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>

namespace lk {

inline at::Tensor empty_images(int64_t tasks, int64_t images, int64_t channels, int64_t height, int64_t width,
                               const at::TensorOptions& options) {
  return at::empty({tasks, images, height, width, channels}, options).permute({0, 1, 4, 2, 3});
}

// The images as dense rows of pixels, [tasks, images, H, W, C].
inline at::Tensor pixels_of(const at::Tensor& x) { return x.permute({0, 1, 3, 4, 2}).contiguous(); }

inline at::Tensor channels_last(const at::Tensor& x) { return pixels_of(x).permute({0, 1, 4, 2, 3}); }

}  // namespace lk
