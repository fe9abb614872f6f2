// The gradients of the first block's weight, gamma and beta, from the patches and their second moments.
#include "image_block.cuh"

namespace lk {
namespace {

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
    for (int e = me; e < 4 * Q; e += threads) corners[e] = corner_in_tile<P>(patches, places, tile, end, e);
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

// Reads gy, index, x, weight, gamma, moments, mean, rstd; writes dweight, dgamma, dbeta; scratch: partial.
LK_EXPORT int lk_image_block_grad(const lk::ImageBlock* p, int dtype, void* stream) {
  if (!lk::fits(*p)) return cudaErrorInvalidConfiguration;
  return lk::with_dtype(dtype, [&]<typename T>() {
    return p->pool == 2 ? lk::backward<T, 2>(*p, stream) : lk::backward<T, 1>(*p, stream);
  });
}
