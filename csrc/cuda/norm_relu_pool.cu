// Batch-statistics norm, ReLU and max-pool. A thread keeps to its channels, a pack of neighbours in memory, and walks
// over pixels or windows; sums go from short runs in the wide type to doubles, from threads to parts to tasks, in one
// order.
#include "windows.cuh"

namespace lk {
namespace {

// Joins (count, mean, m2), m2 being the sum of squared deviations (Chan, Golub, LeVeque 1983).
__device__ inline void join_moments(double& mean, double& m2, double seen, double mean_of, double m2_of, double count) {
  const double weight = count / (seen + count), delta = mean_of - mean;
  mean += delta * weight;
  m2 += m2_of + delta * delta * (seen * weight);
}

// Joins `Run` packs of pixels, z [Run] -> mean, m2 [V].
template <int Run, typename T, int V>
__device__ inline void add_run(const Pack<T, V> (&z)[Run], double& seen, double (&mean)[V], double (&m2)[V]) {
  const double weight = Run / (seen + Run), cross = seen * weight;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    Wide<T> middle = 0, rest = 0, square = 0;
#pragma unroll
    for (int r = 0; r < Run; ++r) middle += wide(z[r].at[v]);
    middle *= Wide<T>(1) / Run;
#pragma unroll
    for (int r = 0; r < Run; ++r) {
      const Wide<T> d = wide(z[r].at[v]) - middle;
      rest += d;
      square += d * d;
    }
    // The run's mean is middle + rest / Run, `rest` being what rounding left.
    const double shift = double(rest) * (1.0 / Run), delta = double(middle) + shift - mean[v];
    mean[v] += delta * weight;
    m2[v] += double(square) - double(rest) * shift + delta * delta * cross;
  }
  seen += Run;
}

// z -> partial: mean and m2 of each part's pixels.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2) moments(const NormReluPool p, const Cover cover) {
  wait_for_launch_before();
  constexpr int kRun = V > 4 ? 4 : 8;
  const Work work(cover);
  const int64_t pixels = p.images * p.height * p.width, step = blockDim.y;
  const int64_t end = part_begin(pixels, work.part + 1, p.parts);
  double seen = 0, mean[V] = {}, m2[V] = {};
  if (!work.idle) {
    const T* z = static_cast<const T*>(p.z) + work.task * p.z_task + work.pack * V;
    int64_t i = part_begin(pixels, work.part, p.parts) + threadIdx.y;
    for (; i + (kRun - 1) * step < end; i += kRun * step) {
      Pack<T, V> run[kRun];
#pragma unroll
      for (int r = 0; r < kRun; ++r) run[r] = load<V>(z + (i + r * step) * p.channels);
      add_run(run, seen, mean, m2);
    }
    for (; i < end; i += step) {
      const Pack<T, V> one[1] = {load<V>(z + i * p.channels)};
      add_run(one, seen, mean, m2);
    }
  }
  __shared__ double counts[kThreads], means[V][kThreads], squares[V][kThreads];
  const int me = threadIdx.y * blockDim.x + threadIdx.x;
  counts[me] = seen;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    means[v][me] = mean[v];
    squares[v][me] = m2[v];
  }
  join_rows([&](int other) {
    if (counts[other] == 0) return;
#pragma unroll
    for (int v = 0; v < V; ++v)
      join_moments(means[v][me], squares[v][me], counts[me], means[v][other], squares[v][other], counts[other]);
    counts[me] += counts[other];
  });
  if (threadIdx.y == 0 && !work.idle) {
    double* partial = p.partial + (work.task * p.parts + work.part) * 2 * p.channels + work.pack * V;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      partial[v] = means[v][me];
      partial[p.channels + v] = squares[v][me];
    }
  }
}

// partial -> mean, rstd. blockIdx.x: (task, kMergeChannels channels); threadIdx.y walks over the parts.
template <typename A>
__global__ void __launch_bounds__(kThreads) merge_moments(const NormReluPool p) {
  wait_for_launch_before();
  const int64_t chunks = (p.channels + kMergeChannels - 1) / kMergeChannels;
  const int64_t task = blockIdx.x / chunks, channel = blockIdx.x % chunks * kMergeChannels + threadIdx.x;
  const int64_t pixels = p.images * p.height * p.width;
  double seen = 0, mean = 0, m2 = 0;
  if (channel < p.channels) {
    for (int64_t part = threadIdx.y; part < p.parts; part += kMergeRows) {
      const double count = double(part_begin(pixels, part + 1, p.parts) - part_begin(pixels, part, p.parts));
      const double* partial = p.partial + (task * p.parts + part) * 2 * p.channels + channel;
      join_moments(mean, m2, seen, partial[0], partial[p.channels], count);
      seen += count;
    }
  }
  __shared__ double counts[kThreads], means[kThreads], squares[kThreads];
  const int me = threadIdx.y * blockDim.x + threadIdx.x;
  counts[me] = seen, means[me] = mean, squares[me] = m2;
  join_rows([&](int other) {
    if (counts[other] == 0) return;
    join_moments(means[me], squares[me], counts[me], means[other], squares[other], counts[other]);
    counts[me] += counts[other];
  });
  if (threadIdx.y == 0 && channel < p.channels) {
    static_cast<A*>(p.mean)[task * p.channels + channel] = A(means[me]);
    static_cast<A*>(p.rstd)[task * p.channels + channel] = A(1.0 / sqrt(squares[me] / double(pixels) + p.eps));
  }
}

// z, mean, rstd -> y, index. A thread reads `Windows` windows at a time.
template <typename T, int V, int P>
__global__ void __launch_bounds__(kThreads, 2) apply(const NormReluPool p, const Cover cover, const Grid grid) {
  wait_for_launch_before();
  using A = Wide<T>;
  constexpr int kPlaces = P * P, kWindows = 4 / kPlaces;
  const Work work(cover);
  if (work.idle) return;
  const int64_t windows = p.images * grid.places, first = work.pack * V;
  const int64_t begin = part_begin(windows, work.part, cover.parts);
  const int64_t end = part_begin(windows, work.part + 1, cover.parts);
  const int64_t step = blockDim.y;
  const Places places(grid, begin);
  const T* z = static_cast<const T*>(p.z) + work.task * p.z_task + first;
  const int64_t out = work.task * windows * p.channels + first;
  A mean[V], scale[V], beta[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    mean[v] = static_cast<const A*>(p.mean)[work.task * p.channels + first + v];
    const A rstd = static_cast<const A*>(p.rstd)[work.task * p.channels + first + v];
    scale[v] = read_parameter<T>(p.gamma, work.task * p.gamma_task + first + v, p.wide_parameters) * rstd;
    beta[v] = read_parameter<T>(p.beta, work.task * p.beta_task + first + v, p.wide_parameters);
  }
  for (int64_t i = begin + threadIdx.y; i < end; i += kWindows * step) {
    Pack<T, V> tile[kWindows][kPlaces];
#pragma unroll
    for (int w = 0; w < kWindows; ++w) {
      if (i + w * step >= end) break;
      const Place at = places[i + w * step];
      const T* from = z + first_place<P>(p, at);
#pragma unroll
      for (int k = 0; k < kPlaces; ++k) tile[w][k] = load<V>(from + place_offset<P>(k, p.width, p.channels));
    }
#pragma unroll
    for (int w = 0; w < kWindows; ++w) {
      if (i + w * step >= end) break;
      Pack<T, V> y;
      Pack<uint8_t, V> index;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        A best = (wide(tile[w][0].at[v]) - mean[v]) * scale[v] + beta[v];
        int at = 0;
#pragma unroll
        for (int k = 1; k < kPlaces; ++k) {
          const A a = (wide(tile[w][k].at[v]) - mean[v]) * scale[v] + beta[v];
          if (a > best || a != a) best = a, at = k;  // a NaN is a maximum, as in torch
        }
        y.at[v] = narrow<T>(best < A(0) ? A(0) : best);
        index.at[v] = uint8_t(best <= A(0) ? kPlaces : at);
      }
      store(static_cast<T*>(p.y) + out + (i + w * step) * p.channels, y);
      store(p.index + out + (i + w * step) * p.channels, index);
    }
  }
}

template <typename T, int V, int P>
cudaError_t forward(const NormReluPool& p, void* stream) {
  const Cover parts(p.channels, V, p.parts);
  LK_RETURN_IF_FAILED(launch(moments<T, V>, parts.blocks(p.tasks), parts.block(), stream, p, parts));
  LK_RETURN_IF_FAILED(launch(merge_moments<Wide<T>>, merge_blocks(p), merge_block(), stream, p));
  const Grid grid(p.height / P, p.width / P);
  const Cover cover = elementwise(p, V, p.images * grid.places, 4 / (P * P));
  return launch(apply<T, V, P>, cover.blocks(p.tasks), cover.block(), stream, p, cover, grid);
}

}  // namespace
}  // namespace lk

// Reads z, gamma, beta, eps; writes mean, rstd, y, index; scratch: partial.
LK_EXPORT int lk_norm_relu_pool(const lk::NormReluPool* p, int dtype, void* stream) {
  if (!lk::fits(*p)) return cudaErrorInvalidConfiguration;
  return lk::with_layout(*p, dtype, [&]<typename T, int V, int P>() { return lk::forward<T, V, P>(*p, stream); });
}
