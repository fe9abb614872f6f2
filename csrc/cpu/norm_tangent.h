// Norm, ReLU and max-pool of one task with derivatives along a direction: of the forward pass, and of its way back. The
// maxima stay where they are. Torch-free; the binding splits the item ranges over threads.
#pragma once
#include <cstdint>

#include "cpu/norm_relu_pool.h"

namespace lk {

// With d = z - mean, per channel; tasks is 1. What a kernel needs of sums over the images is in its coefficients.
template <typename T>
struct NormTangent : NormReluPool<T> {
  const T* z_dot;   // as z, or null for zeros
  T* y_dot;         // as y
  const T* gy_dot;  // as y
  T* dz_dot;        // as z
  // apply: y_dot = of_d d + of_z_dot z_dot + level at the maxima
  const T *of_d, *of_z_dot, *level;  // [channels]
  // dense: dz = of_g g - slope d - constant, with g = gy at the maxima, else 0;
  // dz_dot = g_turn g + of_g g_dot + d_turn d + z_dot_turn z_dot + constant_turn
  const T *of_g, *slope, *constant, *g_turn, *d_turn, *z_dot_turn, *constant_turn;  // [channels]
};

constexpr int64_t kForwardSums = 2;   // of z_dot, of z_dot d
constexpr int64_t kBackwardSums = 5;  // of g, of g d, of g_dot, of g_dot d, of g z_dot

// Items: (image, slab) for the sums, (image, row of y) for `apply`, (image, row of windows, the last one short where pool
// does not divide the height) for `dense`. partial: [images, slabs, sums, channels].
template <typename T>
struct NormTangentKernels {
  void (*forward_sums)(const NormTangent<T>&, int64_t begin, int64_t end);   // z, z_dot -> partial
  void (*apply)(const NormTangent<T>&, int64_t begin, int64_t end);          // z, z_dot, index -> y_dot
  void (*backward_sums)(const NormTangent<T>&, int64_t begin, int64_t end);  // gy, gy_dot, z, z_dot, index -> partial
  void (*dense)(const NormTangent<T>&, int64_t begin, int64_t end);          // the same -> dz unless null, dz_dot
};

template <typename T>
const NormTangentKernels<T>& norm_tangent_kernels();

}  // namespace lk
