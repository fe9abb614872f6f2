// The first block: convolution, norm, ReLU and max-pool of images, without a stored convolution output. The statistics
// come from the patches' second moments (image_moments.cu); a tile's patches are gathered into shared memory and
// multiplied there.
#include "image_block.cuh"
#include "tensor_core.cuh"

namespace lk {
namespace {

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

constexpr int kMostEights = 8;  // of outputs in a block

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
    for (int e = me; e < 4 * Q; e += threads) corners[e] = corner_in_tile<P>(patches, places, tile, end, e);
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

// Whether a place of a window, or a NaN, comes before the best so far as its maximum.
template <typename A>
__device__ inline bool is_peak(A v, int at, A best, int best_at) {
  if (v != v) return best == best || at > best_at;
  return v > best || (v == best && at < best_at);
}

// As image_apply, with products rounded to TF32 on the tensor cores. A warp has 16 places: with pooling four windows, at
// row r of the product place r / 4 of window r % 4, without it 16 neighbours.
template <typename T, int P>
__global__ void __launch_bounds__(kThreads, 2)
    image_products(const ImageBlock p, const Patches patches, const OutputCover cover, const Grid grid, bool packed) {
  wait_for_launch_before();
  constexpr int Q = kThreads / kWarp * 4, kWindows = P == 2 ? Q : 4 * Q;
  constexpr int kValues = kMostTaps + 4, kWeights = 8 * kMostEights + 8;  // strides: neighbours in other banks
  constexpr int kSharing = kThreads / (4 * Q), kBatch = 4;  // threads of a place, numbers of each on their way
  static_assert(kMostTaps % (kSharing * kBatch) == 0 && kSharing * kBatch % 8 == 0, "there is room behind the last tap");
  __shared__ float values[4 * Q][kValues];
  __shared__ float weights[kMostTaps][kWeights];
  __shared__ float norms[2][8 * kMostEights];  // scale, beta
  __shared__ Averages<float> averages;
  __shared__ Tap taps[kMostTaps];
  const int K = patches.taps, width = 8 * cover.eights;
  const int me = int(threadIdx.x), lane = me % kWarp, warp = me / kWarp;
  const int64_t chunk = blockIdx.x % cover.chunks, item = blockIdx.x / cover.chunks;
  const int64_t task = item / cover.parts, part = item % cover.parts, first = chunk * width;
  const int64_t windows = p.images * grid.places;
  const int64_t begin = part_begin(windows, part, cover.parts), end = part_begin(windows, part + 1, cover.parts);
  const T* x = static_cast<const T*>(p.x) + task * patches.x_task;
  const Places places(grid, begin);

  averages.find(p.moments + task * p.moments_task, K, me, kThreads);
  for (int k = me; k < kMostTaps; k += kThreads) taps[k] = patches.tap(k < K ? k : 0);  // beyond K weights are 0
  for (int e = me; e < kMostTaps * width; e += kThreads) {
    const int k = e % kMostTaps, o = e / kMostTaps;
    const T* weight = static_cast<const T*>(p.weight) + task * p.weight_task;
    weights[k][o] = k < K && first + o < p.outputs ? rounded(wide(weight[(first + o) * K + k])) : 0.0f;
  }
  for (int e = me; e < width; e += kThreads) {
    const int64_t output = first + e;
    const bool there = output < p.outputs;
    const float rstd = there ? static_cast<const float*>(p.rstd)[task * p.outputs + output] : 0.0f;
    norms[0][e] = there ? read_parameter<T>(p.gamma, task * p.gamma_task + output, p.wide_parameters) * rstd : 0.0f;
    norms[1][e] = there ? read_parameter<T>(p.beta, task * p.beta_task + output, p.wide_parameters) : 0.0f;
  }
  const int row = lane / 4, column = lane % 4;
  for (int64_t tile = begin; tile < end; tile += kWindows) {
    __syncthreads();
    // Each thread has one place, and every kSharing-th tap of it.
    const int at = me % (4 * Q), to = P == 2 ? at / 16 * 16 + at % 4 * 4 + at / 4 % 4 : at;
    const Corner here = corner_in_tile<P>(patches, places, tile, end, at);
    for (int round = 0; round < K; round += kBatch * kSharing) {
      const int mine = round + me / (4 * Q);
      float v[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int k = mine + b * kSharing;
        v[b] = rounded(averages.without(pixel(x, patches, here, taps[k]), k));
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) values[to][mine + b * kSharing] = v[b];
    }
    __syncthreads();
    float z[kMostEights][4] = {};  // minus its mean
#pragma unroll
    for (int k = 0; k < kMostTaps; k += 8) {
      if (k >= K) break;
      const float* above = &values[16 * warp + row][k + column];
      const float a[4] = {above[0], above[8 * kValues], above[4], above[8 * kValues + 4]};
#pragma unroll
      for (int e = 0; e < kMostEights; ++e) {
        if (e >= cover.eights) break;
        const float b[2] = {weights[k + column][8 * e + row], weights[k + column + 4][8 * e + row]};
        multiply(z[e], a, b);
      }
    }
#pragma unroll
    for (int e = 0; e < kMostEights; ++e) {
      if (e >= cover.eights) break;
      const int local = 8 * e + 2 * column;
      Pack<T, 2> y[2];
      Pack<uint8_t, 2> index[2];
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const float scale = norms[0][local + o], beta = norms[1][local + o];
        const float values_here[2] = {z[e][o] * scale + beta, z[e][2 + o] * scale + beta};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float best = values_here[half];
          int at = 0;
          if (P == 2 && half == 1) continue;
          if (P == 2) {
            // This lane has places row / 4 and 2 + row / 4; the lane 16 further or before has the other two.
            at = row / 4;
            if (is_peak(values_here[1], at + 2, best, at)) best = values_here[1], at += 2;
            const float others = __shfl_xor_sync(0xffffffffu, best, 16);
            const int others_at = __shfl_xor_sync(0xffffffffu, at, 16);
            if (is_peak(others, others_at, best, at)) best = others, at = others_at;
          }
          y[half].at[o] = narrow<T>(best < 0.0f ? 0.0f : best);
          index[half].at[o] = uint8_t(best <= 0.0f ? P * P : at);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // With pooling both lanes of a window have its maximum, one of them stores it.
        if (P == 2 && (half == 1 || row / 4 != e % 2)) continue;
        const int64_t i = P == 2 ? tile + 4 * warp + row % 4 : tile + 16 * warp + row + 8 * half;
        const int64_t output = first + local;
        if (i >= end || output >= p.outputs) continue;
        const int64_t to = (task * windows + i) * p.outputs + output;
        if (packed) {
          store(static_cast<T*>(p.y) + to, y[half]);
          if (p.index) store(p.index + to, index[half]);
          continue;
        }
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          if (output + o >= p.outputs) break;
          static_cast<T*>(p.y)[to + o] = y[half].at[o];
          if (p.index) p.index[to + o] = index[half].at[o];
        }
      }
    }
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
  if constexpr (sizeof(Wide<T>) == 4) {
    static_assert(4 * Q == kThreads / kWarp * 16, "both kernels have the same tiles");
    if (p.tf32) return launch(image_products<T, P>, blocks, dim3(kThreads), stream, p, patches, cover, grid, packed);
  }
  return launch(image_apply<T, P>, blocks, dim3(unsigned(cover.eights), Q), stream, p, patches, cover, grid, packed);
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
