// Batch-statistics norm, ReLU and max-pool. A thread keeps to its channels, a pack of neighbours in memory, and walks
// over pixels or windows; sums go from short runs in the wide type to doubles, from threads to parts to tasks, in one
// order.
#include "common.cuh"

namespace lk {
namespace {

constexpr int kMergeChannels = 8, kMergeRows = kThreads / kMergeChannels;

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

// The first place of a window in its task's z, in elements.
template <int P>
__device__ inline int64_t first_place(const NormReluPool& p, const Place& at) {
  return ((at.image * p.height + int64_t(at.row) * P) * p.width + int64_t(at.column) * P) * p.channels;
}

// The offset of a window's place from its first one, in elements of z.
template <int P>
__device__ inline int64_t place_offset(int at, int64_t width, int64_t channels) {
  return (int64_t(at / P) * width + at % P) * channels;
}

// z, mean, rstd -> y, index. A thread reads `Windows` windows at a time.
template <typename T, int V, int P>
__global__ void __launch_bounds__(kThreads, 2) apply(const NormReluPool p, const Cover cover, const Grid grid) {
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

// gy, z, index -> partial: sums of g (z - mean) and of g, g = gy where the ReLU is open. z is read at the maxima alone.
template <typename T, int V, int P>
__global__ void __launch_bounds__(kThreads, 2) reduce(const NormReluPool p, const Cover cover, const Grid grid) {
  using A = Wide<T>;
  constexpr int kPlaces = P * P, kRun = V > 4 ? 1 : 2;
  const Work work(cover);
  const int64_t windows = p.images * grid.places, first = work.pack * V;
  const int64_t begin = part_begin(windows, work.part, cover.parts);
  const int64_t end = part_begin(windows, work.part + 1, cover.parts);
  const int64_t step = blockDim.y;
  double along[V] = {}, total[V] = {};
  if (!work.idle) {
    const Places places(grid, begin);
    const T* z = static_cast<const T*>(p.z) + work.task * p.z_task + first;
    const int64_t out = work.task * windows * p.channels + first;
    A mean[V];
#pragma unroll
    for (int v = 0; v < V; ++v) mean[v] = static_cast<const A*>(p.mean)[work.task * p.channels + first + v];
    for (int64_t i = begin + threadIdx.y; i < end; i += kRun * step) {
      Pack<T, V> gy[kRun];
      Pack<uint8_t, V> index[kRun];
#pragma unroll
      for (int r = 0; r < kRun; ++r) {
        if (i + r * step >= end) break;
        gy[r] = load<V>(static_cast<const T*>(p.gy) + out + (i + r * step) * p.channels);
        index[r] = load<V>(p.index + out + (i + r * step) * p.channels);
      }
      A run_along[V] = {}, run_total[V] = {};
#pragma unroll
      for (int r = 0; r < kRun; ++r) {
        if (i + r * step >= end) break;
        const Place at = places[i + r * step];
        const T* from = z + first_place<P>(p, at);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int k = index[r].at[v];
          if (k >= kPlaces) continue;
          const A g = wide(gy[r].at[v]);
          run_along[v] += g * (wide(from[place_offset<P>(k, p.width, p.channels) + v]) - mean[v]);
          run_total[v] += g;
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        along[v] += double(run_along[v]);
        total[v] += double(run_total[v]);
      }
    }
  }
  __shared__ double alongs[V][kThreads], totals[V][kThreads];
  const int me = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    alongs[v][me] = along[v];
    totals[v][me] = total[v];
  }
  join_rows([&](int other) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      alongs[v][me] += alongs[v][other];
      totals[v][me] += totals[v][other];
    }
  });
  if (threadIdx.y == 0 && !work.idle) {
    double* partial = p.partial + (work.task * p.parts + work.part) * 2 * p.channels + first;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      partial[v] = alongs[v][me];
      partial[p.channels + v] = totals[v][me];
    }
  }
}

// partial -> sums, dgamma, dbeta; the grid is that of merge_moments.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge_reduce(const NormReluPool p) {
  const int64_t chunks = (p.channels + kMergeChannels - 1) / kMergeChannels;
  const int64_t task = blockIdx.x / chunks, channel = blockIdx.x % chunks * kMergeChannels + threadIdx.x;
  double along = 0, total = 0;
  if (channel < p.channels) {
    for (int64_t part = threadIdx.y; part < p.parts; part += kMergeRows) {
      const double* partial = p.partial + (task * p.parts + part) * 2 * p.channels + channel;
      along += partial[0];
      total += partial[p.channels];
    }
  }
  __shared__ double alongs[kThreads], totals[kThreads];
  const int me = threadIdx.y * blockDim.x + threadIdx.x;
  alongs[me] = along, totals[me] = total;
  join_rows([&](int other) {
    alongs[me] += alongs[other];
    totals[me] += totals[other];
  });
  if (threadIdx.y == 0 && channel < p.channels) {
    const int64_t at = task * p.channels + channel;
    const double dgamma = alongs[me] * double(static_cast<const Wide<T>*>(p.rstd)[at]);
    p.sums[task * 2 * p.channels + channel] = dgamma;
    p.sums[(task * 2 + 1) * p.channels + channel] = totals[me];
    write_parameter<T>(p.dgamma, at, dgamma, p.wide_parameters);
    write_parameter<T>(p.dbeta, at, totals[me], p.wide_parameters);
  }
}

// gy, z, sums -> dz = gamma rstd (g - dbeta / M - xhat dgamma / M), M = images height width. The windows of the grid
// cover z, those of the last row and column partly where `pool` does not divide its size; there g is 0.
template <typename T, int V, int P>
__global__ void __launch_bounds__(kThreads, 2) dense(const NormReluPool p, const Cover cover, const Grid grid) {
  using A = Wide<T>;
  constexpr int kPlaces = P * P, kWindows = P == 1 && V <= 4 ? 2 : 1;
  const Work work(cover);
  if (work.idle) return;
  const int64_t windows = p.images * grid.places, first = work.pack * V;
  const int64_t begin = part_begin(windows, work.part, cover.parts);
  const int64_t end = part_begin(windows, work.part + 1, cover.parts);
  const int64_t step = blockDim.y, h = p.height / P, w = p.width / P;
  const Places places(grid, begin);
  const T* z = static_cast<const T*>(p.z) + work.task * p.z_task + first;
  T* dz = static_cast<T*>(p.dz) + work.task * p.images * p.height * p.width * p.channels + first;
  const int64_t pooled = work.task * p.images * h * w;
  const double share = 1.0 / double(p.images * p.height * p.width);
  A mean[V], scale[V], level[V], slope[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int64_t channel = first + v, at = work.task * p.channels + channel;
    const double rstd = double(static_cast<const A*>(p.rstd)[at]);
    const double a = double(read_parameter<T>(p.gamma, work.task * p.gamma_task + channel, p.wide_parameters)) * rstd;
    const double* sums = p.sums + work.task * 2 * p.channels + channel;
    mean[v] = static_cast<const A*>(p.mean)[at];
    scale[v] = A(a);
    level[v] = A(a * share * sums[p.channels]);
    slope[v] = A(a * share * rstd * sums[0]);
  }
  for (int64_t i = begin + threadIdx.y; i < end; i += kWindows * step) {
    Pack<T, V> tile[kWindows][kPlaces], gy[kWindows];
    Pack<uint8_t, V> index[kWindows];
    int64_t offset[kWindows];
    int rows[kWindows], columns[kWindows];  // of the window, that lie in the image
#pragma unroll
    for (int n = 0; n < kWindows; ++n) {
      rows[n] = columns[n] = 0;
      if (i + n * step >= end) break;
      const Place at = places[i + n * step];
      const int64_t row = int64_t(at.row) * P, column = int64_t(at.column) * P;
      offset[n] = first_place<P>(p, at);
      rows[n] = p.height - row < P ? int(p.height - row) : P;
      columns[n] = p.width - column < P ? int(p.width - column) : P;
#pragma unroll
      for (int k = 0; k < kPlaces; ++k)
        if (k / P < rows[n] && k % P < columns[n])
          tile[n][k] = load<V>(z + offset[n] + place_offset<P>(k, p.width, p.channels));
      if (at.row < h && at.column < w) {
        const int64_t from = (pooled + (at.image * h + at.row) * w + at.column) * p.channels + first;
        gy[n] = load<V>(static_cast<const T*>(p.gy) + from);
        index[n] = load<V>(p.index + from);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) gy[n].at[v] = narrow<T>(A(0)), index[n].at[v] = kPlaces;
      }
    }
#pragma unroll
    for (int n = 0; n < kWindows; ++n)
#pragma unroll
      for (int k = 0; k < kPlaces; ++k) {
        if (k / P >= rows[n] || k % P >= columns[n]) continue;
        Pack<T, V> result;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A g = index[n].at[v] == k ? wide(gy[n].at[v]) : A(0);
          result.at[v] = narrow<T>(scale[v] * g - (level[v] + slope[v] * (wide(tile[n][k].at[v]) - mean[v])));
        }
        store(dz + offset[n] + place_offset<P>(k, p.width, p.channels), result);
      }
  }
}

// Parts of a task's windows for the elementwise passes: up to 8 turns of a block, fewer where there are few windows.
Cover elementwise(const NormReluPool& p, int pack, int64_t windows, int windows_a_turn) {
  Cover cover(p.channels, pack, 1);
  const int64_t turn = int64_t(cover.block().y) * windows_a_turn, turns = (windows + turn - 1) / turn;
  const int64_t each = turns * p.tasks * cover.chunks / 4096 + 1;
  cover.parts = (turns + (each < 8 ? each : 8) - 1) / (each < 8 ? each : 8);
  return cover;
}

bool fits(const NormReluPool& p) {
  return p.tasks >= 0 && p.images > 0 && p.channels > 0 && p.height > 0 && p.width > 0 && p.parts > 0 &&
         (p.pool == 1 || p.pool == 2) && p.height >= p.pool && p.width >= p.pool &&
         p.height * p.width < kMostRelative && p.images * p.height * p.width / p.parts < kMostRelative;
}

dim3 merge_block() { return dim3(kMergeChannels, kMergeRows); }
int64_t merge_blocks(const NormReluPool& p) { return p.tasks * ((p.channels + kMergeChannels - 1) / kMergeChannels); }

template <typename T, int V, int P>
cudaError_t forward(const NormReluPool& p, void* stream) {
  const Cover parts(p.channels, V, p.parts);
  LK_RETURN_IF_FAILED(launch(moments<T, V>, parts.blocks(p.tasks), parts.block(), stream, p, parts));
  LK_RETURN_IF_FAILED(launch(merge_moments<Wide<T>>, merge_blocks(p), merge_block(), stream, p));
  const Grid grid(p.height / P, p.width / P);
  const Cover cover = elementwise(p, V, p.images * grid.places, 4 / (P * P));
  return launch(apply<T, V, P>, cover.blocks(p.tasks), cover.block(), stream, p, cover, grid);
}

template <typename T, int V, int P>
cudaError_t backward(const NormReluPool& p, void* stream) {
  const Cover parts(p.channels, V, p.parts);
  const Grid pooled(p.height / P, p.width / P), full((p.height + P - 1) / P, (p.width + P - 1) / P);
  LK_RETURN_IF_FAILED(launch(reduce<T, V, P>, parts.blocks(p.tasks), parts.block(), stream, p, parts, pooled));
  LK_RETURN_IF_FAILED(launch(merge_reduce<T>, merge_blocks(p), merge_block(), stream, p));
  if (p.dz == nullptr) return cudaSuccess;
  const Cover cover = elementwise(p, V, p.images * full.places, P == 1 && V <= 4 ? 2 : 1);
  return launch(dense<T, V, P>, cover.blocks(p.tasks), cover.block(), stream, p, cover, full);
}

// call.template operator()<T, V, P>(): 16-byte packs of channels where count and addresses allow them, else single.
template <typename Call>
cudaError_t with_layout(const NormReluPool& p, int dtype, Call call) {
  return with_dtype(dtype, [&]<typename T>() {
    constexpr int kPack = sizeof(T) == 8 ? 1 : int(16 / sizeof(T));
    const bool packed = p.channels % kPack == 0 && p.z_task % kPack == 0 && aligned(p.z, 16) && aligned(p.y, 16) &&
                        aligned(p.gy, 16) && aligned(p.dz, 16) && aligned(p.index, kPack);
    if (packed) return p.pool == 2 ? call.template operator()<T, kPack, 2>() : call.template operator()<T, kPack, 1>();
    return p.pool == 2 ? call.template operator()<T, 1, 2>() : call.template operator()<T, 1, 1>();
  });
}

}  // namespace
}  // namespace lk

// Reads z, gamma, beta, eps; writes mean, rstd, y, index; scratch: partial.
LK_EXPORT int lk_norm_relu_pool(const lk::NormReluPool* p, int dtype, void* stream) {
  if (!lk::fits(*p)) return cudaErrorInvalidConfiguration;
  return lk::with_layout(*p, dtype, [&]<typename T, int V, int P>() { return lk::forward<T, V, P>(*p, stream); });
}

// Reads gy, z, index, mean, rstd, gamma; writes dgamma, dbeta, and dz unless it is null; scratch: partial, sums.
LK_EXPORT int lk_norm_relu_pool_grad(const lk::NormReluPool* p, int dtype, void* stream) {
  if (!lk::fits(*p)) return cudaErrorInvalidConfiguration;
  return lk::with_layout(*p, dtype, [&]<typename T, int V, int P>() { return lk::backward<T, V, P>(*p, stream); });
}
