// What the first block's forward and backward passes share: the patches' averages and covariance, and tiles of them in
// shared memory.
#pragma once
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

// A tile is `kQuads` fours of places: a window's, or without pooling neighbours in the output.
template <typename A>
constexpr int kQuads = sizeof(A) == 8 ? 16 : 32;

// The corner of patch `e` of a tile's 4 kQuads; `first` is the tile's first window (pool 1: output), `end` the part's end.
template <int P>
__device__ inline Corner corner_in_tile(const Patches& patches, const Places& places, int64_t first, int64_t end, int e) {
  const int64_t i = P == 2 ? first + e / 4 : first + e;
  if (i >= end) return no_corner();
  const Place at = places[i];
  const int row = P == 2 ? int(at.row) * 2 + e % 4 / 2 : int(at.row);
  const int column = P == 2 ? int(at.column) * 2 + e % 2 : int(at.column);
  return corner(patches, at.image, row, column);
}

// The mean of each tap over a task's patches, as a sum of two numbers. Patches are multiplied without it, z - mean
// being w (patch - mean patch): images far from zero lose nothing to rounding.
template <typename A>
struct Averages {
  A high[kMostTaps], low[kMostTaps];

  __device__ void find(const double* moments, int taps, int me, int threads) {
    for (int k = me; k < kMostTaps; k += threads) {
      const double average = k < taps ? moments[k * (taps + 1) + taps] / moments[(taps + 1) * (taps + 1) - 1] : 0.0;
      high[k] = A(average);
      low[k] = A(average - double(high[k]));
    }
  }
  __device__ A without(A value, int k) const { return (value - high[k]) - low[k]; }
};

}  // namespace
}  // namespace lk
