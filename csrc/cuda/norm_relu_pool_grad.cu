// The gradients of norm_relu_pool, summed as norm_relu_pool.cu sums.
#include "windows.cuh"

namespace lk {
namespace {

// gy, z, index -> partial: sums of g (z - mean) and of g, g = gy where the ReLU is open. z is read at the maxima alone.
template <typename T, int V, int P>
__global__ void __launch_bounds__(kThreads, 2) reduce(const NormReluPool p, const Cover cover, const Grid grid) {
  wait_for_launch_before();
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
  wait_for_launch_before();
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
  wait_for_launch_before();
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

}  // namespace
}  // namespace lk

// Reads gy, z, index, mean, rstd, gamma; writes dgamma, dbeta, and dz unless it is null; scratch: partial, sums.
LK_EXPORT int lk_norm_relu_pool_grad(const lk::NormReluPool* p, int dtype, void* stream) {
  if (!lk::fits(*p)) return cudaErrorInvalidConfiguration;
  return lk::with_layout(*p, dtype, [&]<typename T, int V, int P>() { return lk::backward<T, V, P>(*p, stream); });
}
