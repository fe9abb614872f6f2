// The second moments of images' patches, which are taken once for all steps: a block's statistics come from them. Where
// most patches lie inside of the images, their taps are multiplied by distance, and those of the others one by one.
#include "image_distances.cuh"
#include "tensor_core.cuh"

namespace lk {
namespace {

constexpr int kMomentPixels = kThreads / kWarp * 8;  // 8 for each warp
constexpr int kMomentStride = kMostTaps + 4;         // 4 neighbouring pixels lie in other banks

// A tap of a patch in the order of places, the channels of one next to each other.
__device__ inline Tap tap_by_place(const Patches& patches, int k) {
  return patches.tap(k / int(patches.inputs), k % int(patches.inputs));
}

// Where that order has the tap `k` of a weight.
__device__ inline int by_place(const Patches& patches, int k) {
  const int places = patches.kernel_height * patches.kernel_width;
  return k % places * int(patches.inputs) + k / places;
}

// x -> partial: of a part of the border's patches with a 1 behind them, the products of those pairs of taps of which the
// earlier one lies outside of the core. A warp multiplies the patches of its pixels with themselves on the tensor cores,
// in doubles: taps 0 to 15 with all, 16 to 31 with 16 to 31.
template <typename T>
__device__ void multiply_patches(const ImageBlock& p, const Patches& patches, const Core& core, const Border& border) {
  constexpr int kTiles = 6;
  __shared__ double values[kMomentPixels][kMomentStride];
  __shared__ double products[kMostTaps][kMostTaps], lines[kMostTaps];
  __shared__ Corner corners[kMomentPixels];
  __shared__ Tap taps[kMostTaps];
  const int me = int(threadIdx.x), lane = me % kWarp, warp = me / kWarp, K = patches.taps, side = K + 1;
  const int64_t task = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
  const int64_t count = p.images * border.places;
  const int64_t begin = part_begin(count, part, p.parts), end = part_begin(count, part + 1, p.parts);
  const T* x = static_cast<const T*>(p.x) + task * patches.x_task;
  const BorderPlaces places(border, begin);
  double sums[kTiles][4] = {}, line[4] = {};
  if (me < K) taps[me] = tap_by_place(patches, me);
  for (int e = me; e < kMomentPixels * (kMomentStride - K); e += kThreads)
    values[e % kMomentPixels][K + e / kMomentPixels] = 0;
  for (int64_t tile = begin; tile < end; tile += kMomentPixels) {
    __syncthreads();
    if (me < kMomentPixels) {
      corners[me] = no_corner();
      if (tile + me < end) {
        const Place at = places[tile + me];
        corners[me] = corner(patches, at.image, int(at.row), int(at.column));
      }
    }
    __syncthreads();
    const Corner here = corners[me % kMomentPixels];
#pragma unroll 4
    for (int k = me / kMomentPixels; k < K; k += kThreads / kMomentPixels)
      values[me % kMomentPixels][k] = double(pixel(x, patches, here, taps[k]));
    __syncthreads();
    double v[4][2], outside[4][2];  // this lane's taps lane / 4 + 8 t, of two pixels
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = warp * 8 + lane % 4 + 4 * h, k = 8 * t + lane / 4;
        v[t][h] = values[at][k];
        const bool met = k < K && core.has(corners[at].y + taps[k].y, corners[at].x + taps[k].x);
        outside[t][h] = met ? 0.0 : v[t][h];
      }
      line[t] += outside[t][0] + outside[t][1];
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int row = i < 4 ? 0 : 2, column = i < 4 ? i : i - 2;  // in 8 taps
      const double a[4] = {outside[row][0], outside[row + 1][0], outside[row][1], outside[row + 1][1]};
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
    const int r = e / side < K ? by_place(patches, e / side) : K, c = e % side < K ? by_place(patches, e % side) : K;
    const int low = r < c ? r : c, high = r < c ? c : r;
    partial[e] = high < K ? products[low][high] : low < K ? lines[low] : 0.0;
  }
}

// The first blocks have the border's patches, the others (C > 0) the core.
template <typename T, int C, int W>
__global__ void __launch_bounds__(kThreads, 2)
    image_moments(const ImageBlock p, const Patches patches, const Core core, const Border border) {
  wait_for_launch_before();
  if (blockIdx.x < p.tasks * p.parts) return multiply_patches<T>(p, patches, core, border);
  if constexpr (C > 0) multiply_by_distance<T, C, W>(p, core, blockIdx.x - p.tasks * p.parts);
}

constexpr int kMerged = 16;  // numbers of a block, whose parts are shared by kThreads / kMerged threads each

// partial, distances -> moments.
__global__ void __launch_bounds__(kThreads) merge_image_moments(const ImageBlock p, const Patches patches, int64_t numbers) {
  wait_for_launch_before();
  constexpr int kShares = kThreads / kMerged;
  __shared__ double shares[kShares][kMerged];
  const int mine = int(threadIdx.x) % kMerged, first = int(threadIdx.x) / kMerged;
  const int64_t at = int64_t(blockIdx.x) * kMerged + mine;
  const bool there = at < p.tasks * numbers;
  const int64_t task = there ? at / numbers : 0;
  const int e = there ? int(at % numbers) : 0, K = patches.taps, r = e / (K + 1), c = e % (K + 1);
  const double* partial = p.partial + task * p.parts * numbers + e;
  double sum = 0;
#pragma unroll 8
  for (int64_t part = first; part < p.parts; part += kShares) sum += partial[part * numbers];
  if (p.distance_parts > 0) {
    const int64_t each = distance_numbers(p);
    int64_t from;
    if (r == K || c == K) {
      from = each - p.inputs + patches.tap(r < K ? r : c < K ? c : 0).input;
    } else {
      const bool turned = by_place(patches, c) < by_place(patches, r);
      from = distance_number(p, patches.tap(turned ? c : r), patches.tap(turned ? r : c));
    }
    const double* distances = p.distances + task * p.distance_parts * each + from;
#pragma unroll 8
    for (int64_t part = first; part < p.distance_parts; part += kShares) sum += distances[part * each];
  }
  shares[first][mine] = sum;
  __syncthreads();
  if (first > 0 || !there) return;
  for (int other = 1; other < kShares; ++other) sum += shares[other][mine];
  p.moments[at] = r == K && c == K ? double(p.images * p.out_height * p.out_width) : sum;
}

template <typename T, int C, int W>
cudaError_t moments(const ImageBlock& p, void* stream) {
  const Patches patches(p);
  const Core core(p);
  const Border border(p, core);
  const int64_t numbers = int64_t(patches.taps + 1) * (patches.taps + 1);
  const int64_t work = p.tasks * (p.parts + p.distance_parts * distance_blocks(p));
  LK_RETURN_IF_FAILED(launch(image_moments<T, C, W>, work, dim3(kThreads), stream, p, patches, core, border));
  const int64_t blocks = (p.tasks * numbers + kMerged - 1) / kMerged;
  return launch(merge_image_moments, blocks, dim3(kThreads), stream, p, patches, numbers);
}

// Whether there is a kernel that multiplies this block's taps by distance.
inline bool has_distances(const ImageBlock& p) {
  return p.stride_y == 1 && p.stride_x == 1 && p.dilation_y == 1 && p.dilation_x == 1 && p.kernel_width == 3 &&
         p.kernel_height > 1 && (p.inputs == 1 || p.inputs == 3) && p.images * p.height * p.width < kMostRelative;
}

}  // namespace
}  // namespace lk

// Reads x; writes moments [tasks, K + 1, K + 1]; scratch: partial and, where distance_parts is not 0, distances. outputs,
// pool and what belongs to them are not read.
LK_EXPORT int lk_image_moments(const lk::ImageBlock* p, int dtype, void* stream) {
  if (!lk::fits(*p) || (p->distance_parts > 0 && !lk::has_distances(*p))) return cudaErrorInvalidConfiguration;
  return lk::with_dtype(dtype, [&]<typename T>() {
    if (p->distance_parts == 0) return lk::moments<T, 0, 0>(*p, stream);
    return p->inputs == 1 ? lk::moments<T, 1, 3>(*p, stream) : lk::moments<T, 3, 3>(*p, stream);
  });
}
