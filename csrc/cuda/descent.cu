// The two ends of an inner step: the gradient of the cross-entropy, and the update of all parameters by one launch.
#include "common.cuh"

namespace lk {
namespace {

constexpr int kRowThreads = 256;

// A block a task, a warp a row of logits [ways], rows in turn.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 2) cross_entropy(const CrossEntropy p) {
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

constexpr int kSgdElements = 4096;  // of a block

// The kernel's table: tensor i has the blocks [first[i], first[i + 1]).
struct SgdBlocks {
  int first[kSgdTensors + 1];
};

template <typename T>
__device__ inline T descend(T parameter, T gradient, Wide<T> alpha) {
  return narrow<T>(wide(parameter) + alpha * wide(gradient));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sgd(const __grid_constant__ Sgd p, const __grid_constant__ SgdBlocks blocks) {
  constexpr int V = 16 / sizeof(T);
  int tensor = 0, beyond = int(p.count);
  while (beyond - tensor > 1) {
    const int middle = (tensor + beyond) / 2;
    if (int(blockIdx.x) < blocks.first[middle])
      beyond = middle;
    else
      tensor = middle;
  }
  const int64_t begin = int64_t(int(blockIdx.x) - blocks.first[tensor]) * kSgdElements;
  const int64_t left = p.sizes[tensor] - begin;
  const int count = left < kSgdElements ? int(left) : kSgdElements;
  T* parameter = static_cast<T*>(p.parameters[tensor]) + begin;
  const T* gradient = static_cast<const T*>(p.gradients[tensor]) + begin;
  const Wide<T> alpha = Wide<T>(-p.lr);
  int done = 0;
  if ((reinterpret_cast<uintptr_t>(parameter) | reinterpret_cast<uintptr_t>(gradient)) % 16 == 0) {
    done = count / V * V;
#pragma unroll 4
    for (int i = int(threadIdx.x) * V; i < done; i += kThreads * V) {
      Pack<T, V> a = load<V>(parameter + i);
      const Pack<T, V> g = load<V>(gradient + i);
#pragma unroll
      for (int v = 0; v < V; ++v) a.at[v] = descend(a.at[v], g.at[v], alpha);
      store(parameter + i, a);
    }
  }
  for (int i = done + int(threadIdx.x); i < count; i += kThreads)
    parameter[i] = descend(parameter[i], gradient[i], alpha);
}

}  // namespace
}  // namespace lk

LK_EXPORT int lk_cross_entropy_grad(const lk::CrossEntropy* p, int dtype, void* stream) {
  if (p->tasks < 0 || p->images <= 0 || p->ways <= 0) return cudaErrorInvalidConfiguration;
  return lk::with_dtype(dtype, [&]<typename T>() {
    return lk::launch(lk::cross_entropy<T>, p->tasks, dim3(lk::kRowThreads), stream, *p);
  });
}

LK_EXPORT int lk_sgd(const lk::Sgd* p, int dtype, void* stream) {
  if (p->count < 0 || p->count > lk::kSgdTensors) return cudaErrorInvalidConfiguration;
  lk::SgdBlocks blocks{};
  for (int64_t i = 0; i < p->count; ++i) {
    const int64_t next = blocks.first[i] + (p->sizes[i] + lk::kSgdElements - 1) / lk::kSgdElements;
    if (next > 0x7fffffff) return cudaErrorInvalidConfiguration;
    blocks.first[i + 1] = int(next);
  }
  return lk::with_dtype(dtype, [&]<typename T>() {
    return lk::launch(lk::sgd<T>, blocks.first[p->count], dim3(lk::kThreads), stream, *p, blocks);
  });
}
