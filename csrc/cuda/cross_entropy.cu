// The mean cross-entropy of each task and its gradient.
#include "common.cuh"

namespace lk {
namespace {

constexpr int kRowThreads = 256;

// One block per task, one warp per row of logits [ways], rows in turn.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 2) cross_entropy(const CrossEntropy p) {
  wait_for_launch_before();
  using A = Wide<T>;
  constexpr int kWarps = kRowThreads / kWarp;
  __shared__ double shares[kWarps];
  const int64_t task = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const T* logits = static_cast<const T*>(p.logits) + task * p.logits_task;
  T* gradient = static_cast<T*>(p.gradient) + task * p.images * p.ways;
  double loss = 0;
  for (int64_t row = warp; row < p.images; row += kWarps) {
    const T* from = logits + row * p.ways;
    const int64_t label = p.labels[task * p.labels_task + row];
    A most = -INFINITY;
    for (int64_t i = lane; i < p.ways; i += kWarp) {
      const A v = wide(from[i]);
      if (v > most) most = v;
    }
#pragma unroll
    for (int other = kWarp / 2; other > 0; other /= 2) {
      const A v = __shfl_xor_sync(0xffffffffu, most, other);
      if (v > most) most = v;
    }
    A sum = 0;
    for (int64_t i = lane; i < p.ways; i += kWarp) sum += exp(wide(from[i]) - most);
#pragma unroll
    for (int other = kWarp / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    const A level = log(sum);
    for (int64_t i = lane; i < p.ways; i += kWarp) {
      const A p_i = exp(wide(from[i]) - most - level);
      gradient[row * p.ways + i] = narrow<T>((p_i - (i == label ? A(1) : A(0))) / A(p.images));
    }
    const bool known = label >= 0 && label < p.ways;
    loss += known ? double(level) - (double(wide(from[label])) - double(most)) : double(NAN);
  }
  if (lane == 0) shares[warp] = loss;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int other = 1; other < kWarps; ++other) loss += shares[other];
  static_cast<A*>(p.loss)[task] = A(loss / double(p.images));
}

}  // namespace
}  // namespace lk

LK_EXPORT int lk_cross_entropy_grad(const lk::CrossEntropy* p, int dtype, void* stream) {
  if (p->tasks < 0 || p->images <= 0 || p->ways <= 0) return cudaErrorInvalidConfiguration;
  return lk::with_dtype(dtype, [&]<typename T>() {
    return lk::launch(lk::cross_entropy<T>, p->tasks, dim3(lk::kRowThreads), stream, *p);
  });
}
