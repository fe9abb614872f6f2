// The second moments of images' patches, which are taken once for all steps: a block's statistics come from them.
#include "patches.cuh"

namespace lk {
namespace {

constexpr int kMomentPixels = 64, kMomentStride = kMostTaps + 2;

// x -> partial: the second moments of a part's patches with a 1 behind them. A thread has 2 x 2 of them, in doubles,
// for one pixel in `groups`.
template <typename T>
__global__ void __launch_bounds__(kThreads) image_moments(const ImageBlock p, const Patches patches, const Grid grid) {
  wait_for_launch_before();
  __shared__ __align__(16) double values[kMomentPixels][kMomentStride];  // a patch, 1, 0
  __shared__ double shares[kThreads][4];
  __shared__ Corner corners[kMomentPixels];
  __shared__ Tap taps[kMostTaps];
  const int me = threadIdx.x, K = patches.taps, side = K + 1, twos = (side + 1) / 2, pairs = twos * (twos + 1) / 2;
  const int64_t task = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
  const int64_t count = p.images * grid.places;
  const int64_t begin = part_begin(count, part, p.parts), end = part_begin(count, part + 1, p.parts);
  const T* x = static_cast<const T*>(p.x) + task * patches.x_task;
  const Places places(grid, begin);
  const int groups = kThreads / pairs, group = me / pairs;
  int row = 0, column = me % pairs;  // of the 2 x 2 moments: row <= column < twos
  while (column >= twos - row) column -= twos - row, ++row;
  column += row;
  double sums[2][2] = {};
  if (me < K) taps[me] = patches.tap(me);
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
    for (int e = me; e < kMomentPixels * 2 * twos; e += kThreads) {
      const int k = e / kMomentPixels, at = e % kMomentPixels;
      if (k < K)
        values[at][k] = double(pixel(x, patches, corners[at], taps[k]));
      else
        values[at][k] = k == K && corners[at].image >= 0 ? 1.0 : 0.0;
    }
    __syncthreads();
    if (group < groups) {
      for (int at = group; at < kMomentPixels; at += groups) {
        const Pack<double, 2> a = load<2>(&values[at][2 * row]), b = load<2>(&values[at][2 * column]);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 2; ++j) sums[i][j] += a.at[i] * b.at[j];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) shares[me][i] = sums[i / 2][i % 2];
  __syncthreads();
  if (me >= pairs) return;
  double* partial = p.partial + (task * p.parts + part) * side * side;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    double sum = shares[me][i];
    for (int other = 1; other < groups; ++other) sum += shares[other * pairs + me][i];
    const int r = 2 * row + i / 2, c = 2 * column + i % 2;
    if (r < side && c < side && r <= c) partial[r * side + c] = partial[c * side + r] = sum;
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
