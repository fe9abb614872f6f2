// What the launchers of the CUDA library take: plain structs of 8-byte fields, as
// lambda_kernels/backends/cuda/library.py has them too. Torch-free. Each launcher queues its kernels on `stream` (a
// cudaStream_t) and returns the launch's cudaError_t; it allocates nothing and waits for nothing, so that a CUDA graph
// can hold it.
#pragma once
#include <cstdint>

#define LK_EXPORT extern "C" __attribute__((visibility("default")))

namespace lk {

// Storage; sums and statistics are computed in float, or in double for kFloat64 ("wide" below).
enum Dtype : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Batch-statistics norm, ReLU and max-pool of z, forward and backward, task by task. Images are dense channels-last;
// the images of one task lie one after another. Strides are in elements, 0 where all tasks share the operand.
struct NormReluPool {
  const void* z;      // [tasks, images, height, width, channels]
  const void* gamma;  // [tasks, channels]
  const void* beta;   // [tasks, channels]
  void* mean;         // [tasks, channels] wide
  void* rstd;         // [tasks, channels] wide
  void* y;            // [tasks, images, height / pool, width / pool, channels]
  uint8_t* index;     // as y: place of the maximum in its window, row-major; pool * pool where the ReLU is shut
  const void* gy;     // as y
  void* dgamma;       // [tasks, channels] as gamma
  void* dbeta;        // [tasks, channels] as gamma
  void* dz;           // as z, with a task axis of its own; or null
  double* partial;    // [tasks, parts, 2, channels] scratch
  double* sums;       // [tasks, 2, channels] scratch of the backward pass: dgamma, dbeta
  int64_t tasks, images, channels, height, width;  // of z; images: per task
  int64_t pool;                                    // window and stride, 1 (no pooling) or 2
  int64_t parts;                                   // of a task's pixels (backward: windows), reduced apart
  int64_t z_task, gamma_task, beta_task;           // strides
  int64_t wide_parameters;                         // 1: gamma, beta and their gradients are wide, 0: stored as z is
  double eps;
};

// The first block of a network: convolution (K = inputs kernel_height kernel_width <= 32), norm, ReLU and max-pool
// without a stored convolution output. A patch is what the convolution multiplies its weight with, in its order.
struct ImageBlock {
  const void* x;          // [tasks, images, height, width, inputs]
  const void* weight;     // [tasks, outputs, K]
  const void* gamma;      // [tasks, outputs]
  const void* beta;       // [tasks, outputs]
  double* moments;        // [tasks, K + 1, K + 1]: of the patches with a 1 behind them
  void* mean;             // [tasks, outputs] wide
  void* rstd;             // [tasks, outputs] wide
  void* y;                // [tasks, images, out_height / pool, out_width / pool, outputs]
  uint8_t* index;         // as y, as in NormReluPool; forward: or null
  const void* gy;         // as y
  void* dweight;          // [tasks, outputs, K]
  void* dgamma;           // [tasks, outputs] as gamma
  void* dbeta;            // [tasks, outputs] as gamma
  double* partial;        // moments: [tasks, parts, K + 1, K + 1]; backward: [tasks, parts, outputs, K + 1]; scratch
  double* distances;      // moments: [tasks, distance_parts, (kernel_height (2 kernel_width - 1) inputs + 1) inputs],
                          // scratch
  int64_t tasks, images;  // images: per task
  int64_t inputs, height, width, outputs, kernel_height, kernel_width;
  int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  int64_t out_height, out_width;  // of the convolution
  int64_t pool;                   // 1 or 2
  int64_t parts;                  // of a task's patches (backward: windows), reduced apart
  int64_t distance_parts;         // moments: of what is multiplied by distance; or 0
  int64_t x_task, weight_task, gamma_task, beta_task, moments_task;  // strides, 0 where tasks share
  int64_t wide_parameters;                                           // as in NormReluPool
  int64_t tf32;  // forward: 1: products may be rounded to TF32; not for float64
  double eps;
};

// Mean cross-entropy of each task and its gradient.
struct CrossEntropy {
  const void* logits;     // [tasks, images, ways]
  const int64_t* labels;  // [tasks, images]
  void* loss;             // [tasks] wide
  void* gradient;         // as logits
  int64_t tasks, images, ways;
  int64_t logits_task, labels_task;  // strides, 0 where tasks share
};

constexpr int kSgdTensors = 96;  // the kernel's parameters stay below 4 KiB

// parameter <- parameter - rate gradient, for `count` pairs of dense tensors of one dtype.
struct Sgd {
  void* parameters[kSgdTensors];
  const void* gradients[kSgdTensors];
  int64_t sizes[kSgdTensors];  // elements
  double rates[kSgdTensors];
  int64_t count;
};

constexpr int kMostSteps = 32;
enum Moved : int { kWeight, kGamma, kBeta, kHead, kBias, kMoved };

// All steps of an inner loop of which only the last block (convolution, norm, ReLU, max-pool) and the linear layer
// behind it take part, or the linear layer alone (outputs 0; x are its features). In half precision the steps are
// of floats.
//
// A task's blocks share its output channels (`groups`) and its images (`parts`); they exchange sums through `scratch`.
struct LastSteps {
  const void* x;           // [tasks, images, height, width, inputs], or [tasks, images, features]
  const int64_t* labels;   // [tasks, images]
  const void* from[kMoved];  // weight [tasks, outputs, inputs, kernel_height, kernel_width], gamma and beta
                             // [tasks, outputs], head [tasks, ways, features], bias [tasks, ways]
  void* to[kMoved];          // the values after the steps, each task's own; null where a parameter stays
  void* rows;                // [steps + 1, tasks] wide: losses before each step; 0 where the values are finite, else NaN
  void* scratch;             // [tasks, scratch_bytes]
  uint32_t* counters;        // [tasks] scratch
  int64_t tasks, images;     // images: per task
  int64_t inputs, height, width, outputs, kernel_height, kernel_width;
  int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  int64_t out_height, out_width;  // of the convolution
  int64_t pool;                   // 1 or 2
  int64_t ways, features, steps;
  int64_t x_task, labels_task, from_task[kMoved];  // strides, 0 where tasks share
  int64_t tf32;  // 1: the convolution's products of float32 are rounded to TF32; 0: they are exact to float32's digits
  // What lk_last_steps_plan fills in.
  int64_t channels, groups, parts;  // channels: of a block
  int64_t images_at_once;           // that lie in shared memory
  int64_t keeps_z, keeps_y;         // whether these lie there
  int64_t shared_bytes, scratch_bytes, tasks_at_once;
  double eps;
  double rates[kMostSteps][kMoved];  // 0: the parameter stays in that step
};

}  // namespace lk
