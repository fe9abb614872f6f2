// The first block: convolution, norm, ReLU and max-pool of images, without a stored convolution output. The statistics
// come from the patches' second moments (image_moments.cu); forward and backward gather a tile's patches into shared
// memory and multiply there.
#include "patches.cuh"

namespace lk {
namespace {

// The covariance of the patches, row k with lane k (zeros beyond K).
struct Covariance {
  const double* moments;
  int taps, lane;
  double share, average;

  __device__ Covariance(const double* moments, int taps, int lane) : moments(moments), taps(taps), lane(lane) {
    share = 1.0 / moments[(taps + 1) * (taps + 1) - 1];
    average = lane < taps ? moments[taps * (taps + 1) + lane] * share : 0.0;
  }
  // Element `lane` of its product with weight [K].
  template <typename T>
  __device__ double times(const T* weight) const {
    if (lane >= taps) return 0.0;
    const double* last = moments + taps * (taps + 1);
    double sum = 0;
    for (int j = 0; j < taps; ++j)
      sum += (moments[j * (taps + 1) + lane] * share - average * (last[j] * share)) * double(wide(weight[j]));
    return sum;
  }
};

// moments, weight -> mean, rstd; one warp per (task, output).
template <typename T>
__global__ void __launch_bounds__(kThreads) image_statistics(const ImageBlock p, int taps) {
  wait_for_launch_before();
  const int64_t item = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (item >= p.tasks * p.outputs) return;
  const int64_t task = item / p.outputs, output = item % p.outputs;
  const int lane = threadIdx.x % kWarp;
  const T* weight = static_cast<const T*>(p.weight) + task * p.weight_task + output * taps;
  const Covariance covariance(p.moments + task * p.moments_task, taps, lane);
  const double w = lane < taps ? double(wide(weight[lane])) : 0.0;
  const double mean = warp_sum(w * covariance.average), variance = warp_sum(w * covariance.times(weight));
  if (lane == 0) {
    static_cast<Wide<T>*>(p.mean)[item] = Wide<T>(mean);
    static_cast<Wide<T>*>(p.rstd)[item] = Wide<T>(1.0 / sqrt((variance < 0 ? 0.0 : variance) + p.eps));
  }
}

// A tile is `kQuads` fours of places: a window's, or without pooling neighbours in the output.
template <typename A>
constexpr int kQuads = sizeof(A) == 8 ? 16 : 32;
constexpr int kMostEights = 8;  // of outputs in a block

// The corners of a tile's 4 kQuads patches; `first` is the tile's first window (pool 1: output), `end` the part's end.
template <int P, int Quads>
__device__ inline void find_corners(Corner (&corners)[4 * Quads], const Patches& patches, const Places& places,
                                    int64_t first, int64_t end, int me, int threads) {
  for (int e = me; e < 4 * Quads; e += threads) {
    const int64_t i = P == 2 ? first + e / 4 : first + e;
    Corner found{-1, 0, 0};
    if (i < end) {
      const Place at = places[i];
      const int row = P == 2 ? int(at.row) * 2 + e % 4 / 2 : int(at.row);
      const int column = P == 2 ? int(at.column) * 2 + e % 2 : int(at.column);
      found = corner(patches, at.image, row, column);
    }
    corners[e] = found;
  }
}

// How the outputs are split over blocks: chunks of `eights` times 8. The grid is (task, part, chunk).
struct OutputCover {
  int64_t parts, chunks;
  int eights;

  OutputCover(int64_t outputs, int64_t parts) : parts(parts) {
    const int64_t all = (outputs + 7) / 8;
    chunks = (all + kMostEights - 1) / kMostEights;
    eights = int((all + chunks - 1) / chunks);
  }
};

// The mean of each tap over a task's patches, as a sum of two numbers. Patches are multiplied without it, z - mean
// being w (patch - mean patch): images far from zero lose nothing to rounding.
template <typename A>
struct Averages {
  A high[kMostTaps], low[kMostTaps];

  __device__ void find(const double* moments, int taps, int me, int threads) {
    for (int k = me; k < taps; k += threads) {
      const double average = moments[k * (taps + 1) + taps] / moments[(taps + 1) * (taps + 1) - 1];
      high[k] = A(average);
      low[k] = A(average - double(high[k]));
    }
  }
  __device__ A without(A value, int k) const { return (value - high[k]) - low[k]; }
};

// x, weight, moments, rstd -> y, index. A thread computes 8 outputs, two fours that lie 4 eights apart, at 4 places.
template <typename T, int P>
__global__ void __launch_bounds__(kThreads, 2)
    image_apply(const ImageBlock p, const Patches patches, const OutputCover cover, const Grid grid, bool packed) {
  wait_for_launch_before();
  using A = Wide<T>;
  constexpr int Q = kQuads<A>, kWindows = P == 2 ? Q : 4 * Q;
  __shared__ __align__(16) A values[kMostTaps][Q][4];
  __shared__ __align__(16) A weights[kMostTaps][8 * kMostEights];
  __shared__ __align__(16) A norms[2][8 * kMostEights];  // scale, beta
  __shared__ Averages<A> averages;
  __shared__ Corner corners[4 * Q];
  __shared__ Tap taps[kMostTaps];
  const int K = patches.taps, width = 8 * cover.eights;
  const int threads = int(blockDim.x * blockDim.y), me = int(threadIdx.y * blockDim.x + threadIdx.x);
  const int64_t chunk = blockIdx.x % cover.chunks, item = blockIdx.x / cover.chunks;
  const int64_t task = item / cover.parts, part = item % cover.parts, first = chunk * width;
  const int64_t windows = p.images * grid.places;
  const int64_t begin = part_begin(windows, part, cover.parts), end = part_begin(windows, part + 1, cover.parts);
  const T* x = static_cast<const T*>(p.x) + task * patches.x_task;
  const Places places(grid, begin);

  averages.find(p.moments + task * p.moments_task, K, me, threads);
  for (int k = me; k < K; k += threads) taps[k] = patches.tap(k);
  for (int e = me; e < K * width; e += threads) {
    const int64_t output = first + e / K;
    const T* weight = static_cast<const T*>(p.weight) + task * p.weight_task;
    weights[e % K][e / K] = output < p.outputs ? wide(weight[output * K + e % K]) : A(0);
  }
  for (int e = me; e < width; e += threads) {
    const int64_t output = first + e;
    const bool there = output < p.outputs;
    const A rstd = there ? static_cast<const A*>(p.rstd)[task * p.outputs + output] : A(0);
    norms[0][e] = there ? read_parameter<T>(p.gamma, task * p.gamma_task + output, p.wide_parameters) * rstd : A(0);
    norms[1][e] = there ? read_parameter<T>(p.beta, task * p.beta_task + output, p.wide_parameters) : A(0);
  }
  for (int64_t tile = begin; tile < end; tile += kWindows) {
    __syncthreads();
    find_corners<P, Q>(corners, patches, places, tile, end, me, threads);
    __syncthreads();
    for (int e = me; e < K * 4 * Q; e += threads) {
      const int k = e / (4 * Q), at = e % (4 * Q);
      values[k][at / 4][at % 4] = averages.without(pixel(x, patches, corners[at], taps[k]), k);
    }
    __syncthreads();
    const int quad = int(threadIdx.y), four = int(threadIdx.x) * 4;
    A z[4][2][4] = {};  // place, four, output; minus its mean
    for (int k = 0; k < K; ++k) {
      const Pack<A, 4> v = load<4>(&values[k][quad][0]);
      const Pack<A, 4> w[2] = {load<4>(&weights[k][four]), load<4>(&weights[k][width / 2 + four])};
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int f = 0; f < 2; ++f)
#pragma unroll
          for (int o = 0; o < 4; ++o) z[j][f][o] += v.at[j] * w[f].at[o];
    }
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const int local = f * (width / 2) + four;
      const Pack<A, 4> scale = load<4>(&norms[0][local]), beta = load<4>(&norms[1][local]);
      const int64_t output = first + local;
#pragma unroll
      for (int j = 0; j < 4; j += P * P) {
        Pack<T, 4> y;
        Pack<uint8_t, 4> index;
#pragma unroll
        for (int o = 0; o < 4; ++o) {
          A best = z[j][f][o] * scale.at[o] + beta.at[o];
          int at = 0;
#pragma unroll
          for (int k = 1; k < P * P; ++k) {
            const A a = z[k][f][o] * scale.at[o] + beta.at[o];
            if (a > best || a != a) best = a, at = k;  // a NaN is a maximum, as in torch
          }
          y.at[o] = narrow<T>(best < A(0) ? A(0) : best);
          index.at[o] = uint8_t(best <= A(0) ? P * P : at);
        }
        const int64_t i = P == 2 ? tile + quad : tile + 4 * quad + j;
        if (i >= end || output >= p.outputs) continue;
        const int64_t to = (task * windows + i) * p.outputs + output;
        if (packed) {
          store(static_cast<T*>(p.y) + to, y);
          if (p.index) store(p.index + to, index);
          continue;
        }
#pragma unroll
        for (int o = 0; o < 4; ++o) {
          if (output + o >= p.outputs) break;
          static_cast<T*>(p.y)[to + o] = y.at[o];
          if (p.index) p.index[to + o] = index.at[o];
        }
      }
    }
  }
}

constexpr int kRunTaps = 16;              // of a thread in the backward pass
constexpr int kRowTaps = kMostTaps + 4;  // 4 neighbouring rows start in 4 groups of banks

// gy, index, x -> partial: sums of g (patch - mean patch) and of g, g = gy at the maxima where the ReLU is open.
// threadIdx: (output, taps, slot of windows). Runs of a tile's windows are summed in the wide type, tiles in doubles.
template <typename T, int P>
__global__ void __launch_bounds__(kThreads, sizeof(Wide<T>) == 8 ? 1 : 2)
    image_reduce(const ImageBlock p, const Patches patches, const Grid grid, int64_t chunks) {
  wait_for_launch_before();
  using A = Wide<T>;
  constexpr int Q = kQuads<A>, kWindows = P == 2 ? Q : 4 * Q, kBatch = 4;
  __shared__ __align__(16) A values[4 * Q][kRowTaps];
  __shared__ Averages<A> averages;
  __shared__ Corner corners[4 * Q];
  __shared__ Tap taps[kMostTaps];
  __shared__ double shares[kThreads];
  const int K = patches.taps, row_taps = int(blockDim.y) * kRunTaps;
  const int threads = int(blockDim.x * blockDim.y * blockDim.z);
  const int me = int((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
  const int64_t chunk = blockIdx.x % chunks, item = blockIdx.x / chunks, task = item / p.parts, part = item % p.parts;
  const int64_t output = chunk * blockDim.x + threadIdx.x, windows = p.images * grid.places;
  const int64_t begin = part_begin(windows, part, p.parts), end = part_begin(windows, part + 1, p.parts);
  const T* x = static_cast<const T*>(p.x) + task * patches.x_task;
  const Places places(grid, begin);
  const bool there = output < p.outputs;
  const int slot = int(threadIdx.z), slots = int(blockDim.z);

  averages.find(p.moments + task * p.moments_task, K, me, threads);
  for (int k = me; k < K; k += threads) taps[k] = patches.tap(k);
  double sums[kRunTaps] = {}, total = 0;
  for (int64_t tile = begin; tile < end; tile += kWindows) {
    __syncthreads();
    find_corners<P, Q>(corners, patches, places, tile, end, me, threads);
    __syncthreads();
    for (int e = me; e < row_taps * 4 * Q; e += threads) {
      const int k = e / (4 * Q), at = e % (4 * Q);
      values[at][k] = k < K ? averages.without(pixel(x, patches, corners[at], taps[k]), k) : A(0);
    }
    __syncthreads();
    if (!there) continue;
    A run[kRunTaps] = {}, run_total = 0;
    for (int from = slot; from < kWindows && tile + from < end; from += kBatch * slots) {
      A g[kBatch];
      int row[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int window = from + b * slots;
        g[b] = 0, row[b] = 0;
        if (window >= kWindows || tile + window >= end) continue;
        const int64_t at = (task * windows + tile + window) * p.outputs + output;
        const int index = p.index[at];
        const A gy = wide(static_cast<const T*>(p.gy)[at]);
        if (index < P * P) g[b] = gy, row[b] = P == 2 ? 4 * window + index : window;
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        run_total += g[b];
#pragma unroll
        for (int k = 0; k < kRunTaps; k += 4) {
          const Pack<A, 4> v = load<4>(&values[row[b]][threadIdx.y * kRunTaps + k]);
#pragma unroll
          for (int i = 0; i < 4; ++i) run[k + i] += g[b] * v.at[i];
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kRunTaps; ++k) sums[k] += double(run[k]);
    total += double(run_total);
  }
  double* partial = p.partial + ((task * p.parts + part) * p.outputs + output) * (K + 1);
#pragma unroll
  for (int k = 0; k <= kRunTaps; ++k) {
    __syncthreads();
    shares[me] = k < kRunTaps ? sums[k] : total;
    __syncthreads();
    const int at = k < kRunTaps ? int(threadIdx.y) * kRunTaps + k : K;
    if (slot > 0 || !there || (k < kRunTaps ? at >= K : threadIdx.y > 0)) continue;
    double sum = shares[me];
    for (int other = 1; other < slots; ++other) sum += shares[other * blockDim.x * blockDim.y + me];
    partial[at] = sum;
  }
}

// partial -> dweight, dgamma, dbeta; one block per (task, output), lane k having tap k. With A = sum g (p - mean p):
// dgamma = rstd <w, A>, dw = gamma rstd (A - dgamma rstd cov(p) w).
template <typename T>
__global__ void __launch_bounds__(kThreads) merge_image_reduce(const ImageBlock p, int taps) {
  wait_for_launch_before();
  constexpr int kWarps = kThreads / kWarp;
  __shared__ double shares[kWarps][kWarp + 1];
  const int64_t task = blockIdx.x / p.outputs, output = blockIdx.x % p.outputs, row = p.outputs * (taps + 1);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const double* partial = p.partial + task * p.parts * row + output * (taps + 1);
  double sum = 0, total = 0;
  for (int64_t part = warp; part < p.parts; part += kWarps) {
    if (lane < taps) sum += partial[part * row + lane];
    if (lane == 0) total += partial[part * row + taps];
  }
  shares[warp][lane] = sum;
  if (lane == 0) shares[warp][kWarp] = total;
  __syncthreads();
  if (warp > 0) return;
  for (int other = 1; other < kWarps; ++other) {
    sum += shares[other][lane];
    if (lane == 0) total += shares[other][kWarp];
  }
  const T* weight = static_cast<const T*>(p.weight) + task * p.weight_task + output * taps;
  const double w = lane < taps ? double(wide(weight[lane])) : 0.0;
  const double rstd = double(static_cast<const Wide<T>*>(p.rstd)[task * p.outputs + output]);
  const double gamma = double(read_parameter<T>(p.gamma, task * p.gamma_task + output, p.wide_parameters));
  const Covariance covariance(p.moments + task * p.moments_task, taps, lane);
  const double dgamma = rstd * warp_sum(w * sum), dw = gamma * rstd * (sum - dgamma * rstd * covariance.times(weight));
  if (lane < taps) static_cast<T*>(p.dweight)[(task * p.outputs + output) * taps + lane] = narrow<T>(Wide<T>(dw));
  if (lane == 0) {
    write_parameter<T>(p.dgamma, task * p.outputs + output, dgamma, p.wide_parameters);
    write_parameter<T>(p.dbeta, task * p.outputs + output, total, p.wide_parameters);
  }
}

template <typename T, int P>
cudaError_t forward(const ImageBlock& p, void* stream) {
  constexpr int Q = kQuads<Wide<T>>, kTiles = 8;
  const Patches patches(p);
  const int64_t warps = p.tasks * p.outputs, each = kThreads / kWarp;
  LK_RETURN_IF_FAILED(launch(image_statistics<T>, (warps + each - 1) / each, dim3(kThreads), stream, p, patches.taps));
  const Grid grid(p.out_height / P, p.out_width / P);
  const int64_t tile = P == 2 ? Q : 4 * Q, tiles = (p.images * grid.places + tile - 1) / tile;
  // A block takes up to kTiles tiles, fewer where there are few.
  const int64_t turns = tiles * p.tasks / 1024 + 1, run = turns < kTiles ? turns : kTiles;
  const OutputCover cover(p.outputs, (tiles + run - 1) / run);
  const bool packed = p.outputs % 4 == 0 && aligned(p.y, 4 * sizeof(T)) && aligned(p.index, 4);
  const int64_t blocks = p.tasks * cover.parts * cover.chunks;
  return launch(image_apply<T, P>, blocks, dim3(unsigned(cover.eights), Q), stream, p, patches, cover, grid, packed);
}

template <typename T, int P>
cudaError_t backward(const ImageBlock& p, void* stream) {
  const Patches patches(p);
  const Grid grid(p.out_height / P, p.out_width / P);
  const int64_t chunks = (p.outputs + 63) / 64, x = (p.outputs + chunks - 1) / chunks;
  const int64_t y = (patches.taps + kRunTaps - 1) / kRunTaps, most = kThreads / (x * y), z = most < 16 ? most : 16;
  const dim3 block{unsigned(x), unsigned(y), unsigned(z)};
  const int64_t blocks = p.tasks * p.parts * chunks;
  LK_RETURN_IF_FAILED(launch(image_reduce<T, P>, blocks, block, stream, p, patches, grid, chunks));
  return launch(merge_image_reduce<T>, p.tasks * p.outputs, dim3(kThreads), stream, p, patches.taps);
}

}  // namespace
}  // namespace lk

// Reads x, weight, gamma, beta, moments, eps; writes mean, rstd, y and, where it is not null, index.
LK_EXPORT int lk_image_block(const lk::ImageBlock* p, int dtype, void* stream) {
  if (!lk::fits(*p)) return cudaErrorInvalidConfiguration;
  return lk::with_dtype(dtype, [&]<typename T>() {
    return p->pool == 2 ? lk::forward<T, 2>(*p, stream) : lk::forward<T, 1>(*p, stream);
  });
}

// Reads gy, index, x, weight, gamma, moments, mean, rstd; writes dweight, dgamma, dbeta; scratch: partial.
LK_EXPORT int lk_image_block_grad(const lk::ImageBlock* p, int dtype, void* stream) {
  if (!lk::fits(*p)) return cudaErrorInvalidConfiguration;
  return lk::with_dtype(dtype, [&]<typename T>() {
    return p->pool == 2 ? lk::backward<T, 2>(*p, stream) : lk::backward<T, 1>(*p, stream);
  });
}
