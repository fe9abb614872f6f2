// One step of gradient descent on all parameters by one launch.
#include "common.cuh"

namespace lk {
namespace {

constexpr int kSgdElements = 4096;  // of a block

// The kernel's table: tensor i has the blocks [first[i], first[i + 1]).
struct SgdBlocks {
  int first[kSgdTensors + 1];
};

template <typename T>
__device__ inline T moved(T parameter, T gradient, Wide<T> alpha) {
  return narrow<T>(wide(parameter) + alpha * wide(gradient));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sgd(const __grid_constant__ Sgd p, const __grid_constant__ SgdBlocks blocks) {
  wait_for_launch_before();
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
  const Wide<T> alpha = Wide<T>(-p.rates[tensor]);
  int done = 0;
  if ((reinterpret_cast<uintptr_t>(parameter) | reinterpret_cast<uintptr_t>(gradient)) % 16 == 0) {
    done = count / V * V;
#pragma unroll 4
    for (int i = int(threadIdx.x) * V; i < done; i += kThreads * V) {
      Pack<T, V> a = load<V>(parameter + i);
      const Pack<T, V> g = load<V>(gradient + i);
#pragma unroll
      for (int v = 0; v < V; ++v) a.at[v] = moved(a.at[v], g.at[v], alpha);
      store(parameter + i, a);
    }
  }
  for (int i = done + int(threadIdx.x); i < count; i += kThreads) parameter[i] = moved(parameter[i], gradient[i], alpha);
}

}  // namespace
}  // namespace lk

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
