// Batch-statistics norm, ReLU and max-pool of one convolution output, forward and backward, task by task.
// Torch-free: the binding lays out the memory and splits the item ranges over threads.
#pragma once
#include <cstdint>

namespace lk {

// Every image is dense NHWC (channels-last); images of one task lie one after another.
template <typename T>
struct NormReluPool {
  int64_t tasks, images;            // images: per task
  int64_t channels, height, width;  // of z
  int64_t pool;                     // window and stride, 1 (no pooling) or 2
  int64_t slabs;                    // parts of an image's rows that are reduced apart
  double eps;

  const T* z;      // [tasks, images, height, width, channels]
  const T* gamma;  // [channels], task t at gamma + t * gamma_task
  const T* beta;   // [channels], task t at beta + t * beta_task
  int64_t gamma_task, beta_task;  // elements; 0 when all tasks share them
  T* mean;         // [tasks, channels]
  T* rstd;         // [tasks, channels]
  T* y;            // [tasks, images, height / pool, width / pool, channels]
  uint8_t* index;  // as y: place of the maximum in its window, row-major; pool * pool where the ReLU is shut

  const T* gy;     // as y
  T* dgamma;       // [tasks, channels]
  T* dbeta;        // [tasks, channels]
  T* dz;           // as z
  double* partial; // [tasks, images, slabs, 2 (grad_grad: 5), channels] scratch of the reductions
};

// The derivative of (dz, dgamma, dbeta) in direction (v, v_gamma, v_beta), taken back to gy, z and gamma.
template <typename T>
struct NormReluPoolGradGrad : NormReluPool<T> {
  const T* v;        // as z, or null for zeros
  const T* v_gamma;  // [tasks, channels]
  const T* v_beta;   // [tasks, channels]
  double* sums;      // [tasks, 5, channels]: of v, v (z - mean), g, g (z - mean), v g; g is gy at the maxima, else 0
  T* d_gy;           // as gy
  T* d_z;            // as z, or null
  T* d_gamma;        // [tasks, channels]
};

// Items: (task, image, slab) for the reductions, tasks for the merges, (task, image, row of y) for `apply`,
// (task, image, row of windows, the last one short where pool does not divide the height) for `dense` and `dense_grad_grad`.
template <typename T>
struct NormReluPoolKernels {
  void (*moments)(const NormReluPool<T>&, int64_t begin, int64_t end);        // z -> partial
  void (*merge_moments)(const NormReluPool<T>&, int64_t begin, int64_t end);  // partial -> mean, rstd
  void (*apply)(const NormReluPool<T>&, int64_t begin, int64_t end);          // z, mean, rstd -> y, index
  // (task, image, row of y): maxima of a window's z, of -z where gamma is negative -> y, in place
  void (*settle)(const NormReluPool<T>&, int64_t begin, int64_t end);
  void (*reduce)(const NormReluPool<T>&, int64_t begin, int64_t end);         // gy, z, index -> partial
  void (*merge_reduce)(const NormReluPool<T>&, int64_t begin, int64_t end);   // partial -> dgamma, dbeta
  void (*dense)(const NormReluPool<T>&, int64_t begin, int64_t end);          // gy, z, dgamma, dbeta -> dz
  void (*reduce_grad_grad)(const NormReluPoolGradGrad<T>&, int64_t begin, int64_t end);  // v, gy, z -> partial
  void (*merge_grad_grad)(const NormReluPoolGradGrad<T>&, int64_t begin, int64_t end);   // partial -> sums, d_gamma
  void (*dense_grad_grad)(const NormReluPoolGradGrad<T>&, int64_t begin, int64_t end);   // v, gy, z, sums -> d_gy, d_z
};

template <typename T>
const NormReluPoolKernels<T>& norm_relu_pool_kernels();

}  // namespace lk
