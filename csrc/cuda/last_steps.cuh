// How the last block's steps are spread over blocks of threads, and what lies where in their memory.
#pragma once
#include "common.cuh"

namespace lk {
namespace {

constexpr int kStepThreads = 256, kStepWarps = kStepThreads / kWarp;

__host__ __device__ inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What one block of threads has of a task: all taps and inputs of `channels` output channels, for `images` images at
// most. Its features are [pooled, channels], those of its channels; without a convolution a slice of all.
struct Share {
  int taps, pixels, places, pooled, channels, images, features, ways;
  int inputs;   // rounded up to 8, the depth of a product
  int row;      // elements from pixel to pixel of x: 8 neighbours at 4 inputs lie in 32 banks
  int columns;  // elements from input to input of the weight: 4 neighbours at 8 channels do

  __host__ __device__ explicit Share(const LastSteps& p)
      : taps(int(p.kernel_height * p.kernel_width)), pixels(int(p.height * p.width)),
        places(int(p.out_height * p.out_width)), pooled(int((p.out_height / p.pool) * (p.out_width / p.pool))),
        channels(int(p.channels)), images(int((p.images + p.parts - 1) / p.parts)), ways(int(p.ways)),
        inputs(int(round_up(p.inputs, 8))), row(inputs + 4), columns(channels == 8 ? 8 : channels + 8) {
    features = p.outputs > 0 ? pooled * channels : int((p.features + p.groups - 1) / p.groups);
  }
  __host__ __device__ int64_t weights() const { return int64_t(taps) * inputs * columns; }
  __host__ __device__ int64_t exchanged() const { return int64_t(taps) * inputs * channels + int64_t(ways) * features; }
};

// Takes pieces of memory one behind another; each begins at a multiple of 16 bytes.
struct Memory {
  unsigned char* at;
  int64_t used = 0;

  __host__ __device__ explicit Memory(void* at) : at(static_cast<unsigned char*>(at)) {}
  template <typename T>
  __host__ __device__ T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(at + used);
    used += round_up(count * int64_t(sizeof(T)), 16);
    return piece;
  }
};

// A block's shared memory.
template <typename T>
struct Near {
  double* joined;    // [kStepThreads]
  double* sums;      // [2, channels]
  double* losses;    // [images of the task]
  T* affine;         // [2, channels]: gamma, beta
  T* norm;           // [3, channels]: mean, rstd, gamma rstd
  T* bias;           // [ways]
  T* logits;         // [images of the task, ways], then their gradient
  int* offsets;      // [taps, places]: of a place's tap in an image of x; -1 in the padding
  T* head;           // [ways, features]
  T* weight;         // [taps, inputs, columns]
  T* x;              // [images_at_once, pixels, row]
  T* zeros;          // [row], and a few more that are read and not used
  T* z = nullptr;    // [images, places, channels]: the convolution, then its gradient
  T* y = nullptr;    // [images, features]
  int64_t bytes;

  __host__ __device__ Near(const LastSteps& p, void* at) {
    const Share share(p);
    Memory memory(at);
    joined = memory.take<double>(kStepThreads);
    sums = memory.take<double>(2 * share.channels);
    losses = memory.take<double>(p.images);
    affine = memory.take<T>(2 * share.channels);
    norm = memory.take<T>(3 * share.channels);
    bias = memory.take<T>(share.ways);
    logits = memory.take<T>(p.images * share.ways);
    offsets = memory.take<int>(int64_t(share.taps) * share.places);
    head = memory.take<T>(int64_t(share.ways) * share.features);
    weight = memory.take<T>(share.weights());
    x = memory.take<T>(p.images_at_once * share.pixels * share.row);
    zeros = memory.take<T>(share.row + 8);
    if (p.keeps_z) z = memory.take<T>(int64_t(share.images) * share.places * share.channels);
    if (p.keeps_y) y = memory.take<T>(int64_t(share.images) * share.features);
    bytes = memory.used;
  }
};

// A task's memory beside it, through which its blocks exchange sums. No piece is written again before a barrier that
// stands behind its last reading.
template <typename T>
struct Far {
  double* moments;  // [groups, parts, 2, channels]: mean, sum of squared deviations
  double* sums;     // [groups, parts, 2, channels]: gradients of gamma and beta
  double* flags;    // [groups]
  T* logits;        // [steps, groups, images, ways]
  T* gradients;     // [groups, parts, exchanged]: of the weight and of the head, where there are several parts
  T* moved;         // [groups, exchanged]: their new values
  T* z;             // [groups, parts, images, places, channels], where it does not fit into shared memory
  T* y;             // [groups, parts, images, features]
  int64_t bytes;

  __host__ __device__ Far(const LastSteps& p, void* at) {
    const Share share(p);
    Memory memory(at);
    const int64_t blocks = p.groups * p.parts;
    moments = memory.take<double>(blocks * 2 * share.channels);
    sums = memory.take<double>(blocks * 2 * share.channels);
    flags = memory.take<double>(p.groups);
    logits = memory.take<T>(p.steps * p.groups * p.images * share.ways);
    gradients = memory.take<T>(p.parts > 1 ? blocks * share.exchanged() : 0);
    moved = memory.take<T>(p.parts > 1 ? p.groups * share.exchanged() : 0);
    z = memory.take<T>(p.keeps_z ? 0 : blocks * share.images * share.places * share.channels);
    y = memory.take<T>(p.keeps_y ? 0 : blocks * share.images * share.features);
    bytes = memory.used;
  }
};

// All blocks of a task come, `target` in all since the counter was 0; what they wrote before is seen after.
__device__ inline void meet(uint32_t* counter, uint32_t target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
    while (*static_cast<volatile uint32_t*>(counter) < target) __nanosleep(32);
    __threadfence();
  }
  __syncthreads();
}

// What a block of threads has of the last block's steps: its place in the task, its memory, sums over its threads. S is
// how tensors are stored, T what is computed in and kept from step to step.
template <typename S, int Eights>
class Station {
 public:
  using T = Wide<S>;

  __device__ Station(const LastSteps& p, int64_t task)
      : p(p), share(p), near(p, dynamic_shared()), far(p, static_cast<unsigned char*>(p.scratch) + task * p.scratch_bytes),
        task(task), me(int(threadIdx.x)), lane(me % kWarp), warp(me / kWarp) {
    const int block = int(blockIdx.x % (p.groups * p.parts));
    group = int(block / p.parts), part = int(block % p.parts);
    first_image = int(part_begin(p.images, part, p.parts));
    images = int(part_begin(p.images, part + 1, p.parts)) - first_image;
    first_channel = group * C;
    first_feature = Eights > 0 ? 0 : int(part_begin(p.features, group, p.groups));
    slice = Eights > 0 ? 0 : int(part_begin(p.features, group + 1, p.groups)) - first_feature;
    if (!p.keeps_z) near.z = far.z + int64_t(block) * share.images * share.places * C;
    if (!p.keeps_y) near.y = far.y + int64_t(block) * share.images * share.features;
  }

 protected:
  static constexpr int C = 8 * Eights;                             // channels
  static constexpr int kRows = Eights > 0 ? kStepThreads / C : 1;  // of threads over a block's channels

  template <typename Do>
  __device__ void each(int count, Do what) const {
#pragma unroll 1
    for (int i = me; i < count; i += kStepThreads) what(i);
  }

  // All blocks of the task come; what they wrote before is seen after.
  __device__ void meet() { lk::meet(p.counters + task, target += uint32_t(p.groups * p.parts)); }

  __device__ T from(int which, int64_t i) const {
    return wide(static_cast<const S*>(p.from[which])[task * p.from_task[which] + i]);
  }

  // Where the block's feature f stands among all; -1 where there is none.
  __device__ int64_t feature(int f) const {
    if constexpr (Eights > 0) {
      const int channel = first_channel + f % C;
      return channel < p.outputs ? int64_t(channel) * share.pooled + f / C : -1;
    }
    return f < slice ? first_feature + f : -1;
  }

  // A sum over the threads of a channel, in all of them.
  __device__ double joined(double v) {
    __syncthreads();
    near.joined[me] = v;
    for (int rows = kRows / 2; rows > 0; rows /= 2) {
      __syncthreads();
      if (me < rows * C) near.joined[me] += near.joined[me + rows * C];
    }
    __syncthreads();
    return near.joined[me % C];
  }

  const LastSteps& p;
  const Share share;
  Near<T> near;
  const Far<T> far;
  const int64_t task;
  const int me, lane, warp;
  int group, part, first_image, images, first_channel;
  int first_feature, slice;  // without a convolution
  uint32_t target = 0;
};

}  // namespace
}  // namespace lk
