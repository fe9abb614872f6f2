// The second moments of images' patches, which are taken once for all steps: a block's statistics come from them.
#include "patches.cuh"
#include "tensor_core.cuh"

namespace lk {
namespace {

constexpr int kMomentPixels = kThreads / kWarp * 8;  // 8 for each warp
constexpr int kMomentStride = kMostTaps + 4;         // 4 neighbouring pixels lie in other banks

// x -> partial: the second moments of a part's patches with a 1 behind them. A warp multiplies the patches of its pixels
// with themselves on the tensor cores, in doubles: taps 0 to 15 with all, 16 to 31 with 16 to 31.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) image_moments(const ImageBlock p, const Patches patches, const Grid grid) {
  wait_for_launch_before();
  constexpr int kTiles = 6;
  __shared__ double values[kMomentPixels][kMomentStride];
  __shared__ double products[kMostTaps][kMostTaps], lines[kMostTaps];
  __shared__ Corner corners[kMomentPixels];
  __shared__ Tap taps[kMostTaps];
  const int me = int(threadIdx.x), lane = me % kWarp, warp = me / kWarp, K = patches.taps, side = K + 1;
  const int64_t task = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
  const int64_t count = p.images * grid.places;
  const int64_t begin = part_begin(count, part, p.parts), end = part_begin(count, part + 1, p.parts);
  const T* x = static_cast<const T*>(p.x) + task * patches.x_task;
  const Places places(grid, begin);
  double sums[kTiles][4] = {}, line[4] = {};
  if (me < K) taps[me] = patches.tap(me);
  for (int e = me; e < kMomentPixels * (kMomentStride - K); e += kThreads)
    values[e % kMomentPixels][K + e / kMomentPixels] = 0;
  for (int64_t tile = begin; tile < end; tile += kMomentPixels) {
    __syncthreads();
    if (me < kMomentPixels) {
      corners[me] = {-1, 0, 0};
      if (tile + me < end) {
        const Place at = places[tile + me];
        corners[me] = corner(patches, at.image, int(at.row), int(at.column));
      }
    }
    __syncthreads();
    for (int e = me; e < kMomentPixels * K; e += kThreads) {
      const int k = e / kMomentPixels, at = e % kMomentPixels;
      values[at][k] = double(pixel(x, patches, corners[at], taps[k]));
    }
    __syncthreads();
    double v[4][2];  // this lane's taps lane / 4 + 8 t, of two pixels
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) v[t][h] = values[warp * 8 + lane % 4 + 4 * h][8 * t + lane / 4];
      line[t] += v[t][0] + v[t][1];
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int row = i < 4 ? 0 : 2, column = i < 4 ? i : i - 2;  // in 8 taps
      const double a[4] = {v[row][0], v[row + 1][0], v[row][1], v[row + 1][1]};
      multiply(sums[i], a, v[column]);
    }
  }
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    line[t] += __shfl_xor_sync(0xffffffffu, line[t], 1);
    line[t] += __shfl_xor_sync(0xffffffffu, line[t], 2);
  }
  for (int turn = 0; turn < kThreads / kWarp; ++turn) {
    __syncthreads();
    if (warp != turn) continue;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        double& to = products[(i < 4 ? 0 : 16) + lane / 4 + j / 2 * 8][(i < 4 ? i : i - 2) * 8 + lane % 4 * 2 + j % 2];
        to = turn > 0 ? to + sums[i][j] : sums[i][j];
      }
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      double& to = lines[8 * t + lane / 4];
      if (lane % 4 == 0) to = turn > 0 ? to + line[t] : line[t];
    }
  }
  __syncthreads();
  double* partial = p.partial + (task * p.parts + part) * side * side;
  for (int e = me; e < side * side; e += kThreads) {
    const int r = e / side, c = e % side, low = r < c ? r : c, high = r < c ? c : r;
    partial[e] = high < K ? products[low][high] : low < K ? lines[low] : double(end - begin);
  }
}

// partial -> moments, one thread per number.
__global__ void __launch_bounds__(kThreads) merge_image_moments(const ImageBlock p, int64_t numbers, int64_t tasks) {
  wait_for_launch_before();
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= tasks * numbers) return;
  const double* partial = p.partial + at / numbers * p.parts * numbers + at % numbers;
  double sum = 0;
#pragma unroll 8
  for (int64_t part = 0; part < p.parts; ++part) sum += partial[part * numbers];
  p.moments[at] = sum;
}

template <typename T>
cudaError_t moments(const ImageBlock& p, void* stream) {
  const Patches patches(p);
  const Grid grid(p.out_height, p.out_width);
  const int64_t numbers = int64_t(patches.taps + 1) * (patches.taps + 1);
  LK_RETURN_IF_FAILED(launch(image_moments<T>, p.tasks * p.parts, dim3(kThreads), stream, p, patches, grid));
  const int64_t blocks = (p.tasks * numbers + kThreads - 1) / kThreads;
  return launch(merge_image_moments, blocks, dim3(kThreads), stream, p, numbers, p.tasks);
}

}  // namespace
}  // namespace lk

// Reads x; writes moments [tasks, K + 1, K + 1]; scratch: partial. outputs, pool and what belongs to them are not read.
LK_EXPORT int lk_image_moments(const lk::ImageBlock* p, int dtype, void* stream) {
  if (!lk::fits(*p)) return cudaErrorInvalidConfiguration;
  return lk::with_dtype(dtype, [&]<typename T>() { return lk::moments<T>(*p, stream); });
}
