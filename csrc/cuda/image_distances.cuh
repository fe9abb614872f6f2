// The second moments of patches of stride 1 by the distance of two taps. Inside of the images it alone decides what the
// two multiply: for a kernel of 3 x 3 there are 13 distances, and 45 pairs of places.
#pragma once
#include "patches.cuh"

namespace lk {
namespace {

constexpr int kTileRows = 2 * kThreads / kWarp, kTileColumns = kWarp;  // of the core; a thread has 2 neighbours

// The core: the places that every tap meets at one patch or another. Empty where all pairs are multiplied patch by patch.
struct Core {
  int top = 0, bottom = 0, left = 0, right = 0;

  explicit Core(const ImageBlock& p) {
    if (p.distance_parts == 0) return;
    top = int(p.kernel_height - 1 - p.padding_y), bottom = int(p.out_height - p.padding_y);
    left = int(p.kernel_width - 1 - p.padding_x), right = int(p.out_width - p.padding_x);
    // Beyond the images all is zero.
    top = top > 0 ? top : 0, bottom = bottom < p.height ? bottom : int(p.height);
    left = left > 0 ? left : 0, right = right < p.width ? right : int(p.width);
  }
  __device__ bool has(int row, int column) const { return row >= top && row < bottom && column >= left && column < right; }
};

// The patches of which a tap lies outside of the core, image by image: those above and below the ones that lie within,
// row by row, then what is left and right of these.
struct Border {
  int64_t places;  // of an image
  int top, bottom, left, right, columns;  // the patches within
  int strips;                             // patches above and below
  Divider image, row, side;

  Border(const ImageBlock& p, const Core& core)
      : places(0), top(int(p.out_height)), bottom(top), left(0), right(0), columns(int(p.out_width)), strips(0), image(1),
        row(p.out_width), side(1) {
    const int rows = core.bottom - core.top - int(p.kernel_height) + 1;
    const int across = core.right - core.left - int(p.kernel_width) + 1;
    if (rows > 0 && across > 0) {
      top = core.top + int(p.padding_y), bottom = top + rows;
      left = core.left + int(p.padding_x), right = left + across;
    }
    strips = (int(p.out_height) - (bottom - top)) * columns;
    const int sides = columns - (right - left);
    places = strips + int64_t(bottom - top) * sides;
    image = Divider(places > 0 ? places : 1);
    side = Divider(sides > 0 ? sides : 1);
  }
};

class BorderPlaces {
 public:
  __device__ BorderPlaces(const Border& border, int64_t begin)
      : border_(border), image_(begin / border.places), first_(image_ * border.places) {}
  __device__ Place operator[](int64_t i) const {
    uint32_t rest, column;
    const uint32_t image = border_.image(uint32_t(i - first_), rest);
    if (rest < uint32_t(border_.strips)) {
      uint32_t row = border_.row(rest, column);
      if (row >= uint32_t(border_.top)) row += uint32_t(border_.bottom - border_.top);
      return {image_ + image, row, column};
    }
    const uint32_t row = border_.side(rest - uint32_t(border_.strips), column);
    if (column >= uint32_t(border_.left)) column += uint32_t(border_.right - border_.left);
    return {image_ + image, row + uint32_t(border_.top), column};
  }

 private:
  const Border& border_;
  int64_t image_, first_;
};

// Of a part: for each row downwards of the kernel and each column across, from -(width - 1) on, the products of all
// pairs of channels [rows][2 width - 1][C][C]; then the sums of the channels. On the same row no earlier tap is to the
// right of the later one: what stands for that is not written.
__host__ __device__ inline int64_t distance_numbers(const ImageBlock& p) {
  return (p.kernel_height * (2 * p.kernel_width - 1) * p.inputs + 1) * p.inputs;
}

// Where a part has the product of two taps, `a` at the earlier place of the kernel.
__device__ inline int64_t distance_number(const ImageBlock& p, const Tap& a, const Tap& b) {
  const int64_t across = b.x - a.x + p.kernel_width - 1;
  return (((b.y - a.y) * (2 * p.kernel_width - 1) + across) * p.inputs + a.input) * p.inputs + b.input;
}

// How many blocks share a part: the same row, from 0 columns across on, then to the left and to the right row by row.
__host__ __device__ inline int64_t distance_blocks(const ImageBlock& p) { return 2 * p.kernel_height - 1; }

// x -> distances, of a part of the core of a task and some distances; a kernel of W columns and some rows, C channels.
template <typename T, int C, int W>
__device__ void multiply_by_distance(const ImageBlock& p, const Core& core, int64_t item) {
  constexpr int kSides = W - 1, kRow = kTileColumns + 2 * kSides, kRows = kTileRows + kMostTaps / (C * W) - 1;
  constexpr int kNumbers = W * C * C, kPacks = kRow * C / 4 + 1, kTurns = (kRows * kPacks + kThreads - 1) / kThreads;
  constexpr int kAhead = sizeof(T) == 8 ? 1 : kTurns;  // packs on their way at a time
  static_assert(kRow % 2 == 0 && kSides % 2 == 0, "a thread reads pairs of columns");
  __shared__ __align__(16) double values[C][kRows][kRow];
  __shared__ double shares[kNumbers][kThreads / kWarp];
  const int me = int(threadIdx.x), lane = me % kWarp, warp = me / kWarp;
  const int side = int(item % distance_blocks(p)), down = (side + 1) / 2, right = (side + 1) % 2;
  item /= distance_blocks(p);
  const int64_t part = item % p.distance_parts, task = item / p.distance_parts;
  const int across = (core.right - core.left + kTileColumns - 1) / kTileColumns;
  const int plane = (core.bottom - core.top + kTileRows - 1) / kTileRows * across;
  const int begin = int(part_begin(p.images * plane, part, p.distance_parts));
  const int end = int(part_begin(p.images * plane, part + 1, p.distance_parts));
  const T* x = static_cast<const T*>(p.x) + task * p.x_task;
  const int64_t numbers = p.images * p.height * p.width * C;
  const bool packed = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const int row = warp * 2 + lane / (kTileColumns / 2), column = lane % (kTileColumns / 2) * 2;

  double sums[W][C][C] = {};
  for (int tile = begin; tile < end; ++tile) {
    const int at = tile % plane, top = core.top + at / across * kTileRows, left = core.left + at % across * kTileColumns;
    // The columns and rows of the image that the tile reads; the rest of it is zero.
    const int before = left > kSides ? 0 : kSides - left, beyond = left + kTileColumns + kSides - int(p.width);
    const int columns = kRow - before - (beyond > 0 ? beyond : 0);
    const int rows = kTileRows + down < int(p.height) - top ? kTileRows + down : int(p.height) - top;
    __syncthreads();
    if (columns < kRow || rows < kTileRows + down) {
      for (int e = me; e < C * kRows * kRow; e += kThreads) (&values[0][0][0])[e] = 0;
      __syncthreads();
    }
    const int64_t start = ((tile / plane * p.height + top) * p.width + left - kSides + before) * C;
#pragma unroll 1
    for (int turn = 0; turn < kTurns; turn += kAhead) {
      Pack<T, 4> v[kAhead];
#pragma unroll
      for (int t = 0; t < kAhead; ++t) {
        const int e = me + (turn + t) * kThreads, r = e / kPacks;
        const int64_t from = start + r * p.width * C, to = from + columns * C, i = from / 4 * 4 + e % kPacks * 4;
        if (r >= rows || i >= to) continue;
        if (packed && i + 4 <= numbers) {
          v[t] = load<4>(x + i);
          continue;
        }
#pragma unroll
        for (int h = 0; h < 4; ++h) v[t].at[h] = i + h >= from && i + h < to ? x[i + h] : T(0);
      }
#pragma unroll
      for (int t = 0; t < kAhead; ++t) {
        const int e = me + (turn + t) * kThreads, r = e / kPacks;
        const int64_t from = start + r * p.width * C;
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          const int n = int(from / 4 * 4 - from) + e % kPacks * 4 + h;
          if (r < rows && n >= 0 && n < columns * C) values[n % C][r][before + n / C] = double(wide(v[t].at[h]));
        }
      }
    }
    __syncthreads();
    double own[C][2];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const Pack<double, 2> v = load<2>(&values[c][row][column + kSides]);
#pragma unroll
      for (int i = 0; i < 2; ++i) own[c][i] = core.has(top + row, left + column + i) ? v.at[i] : 0.0;
    }
#pragma unroll
    for (int j = 0; j <= W; j += 2) {
#pragma unroll
      for (int b = 0; b < C; ++b) {
        const Pack<double, 2> v = load<2>(&values[b][row + down][column + right * kSides + j]);
#pragma unroll
        for (int d = 0; d < W; ++d) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (d + i < j || d + i > j + 1) continue;
            // To the left the last column across would be that of the right: the channels are summed in its place.
            const double other = d == kSides && right == 0 ? 1.0 : v.at[d + i - j];
#pragma unroll
            for (int a = 0; a < C; ++a) sums[d][a][b] += own[a][i] * other;
          }
        }
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kNumbers; ++e) {
    const double sum = warp_sum(sums[e / (C * C)][e / C % C][e % C]);
    if (lane == 0) shares[e][warp] = sum;
  }
  __syncthreads();
  const bool is_line = right == 0 && me / (C * C) == kSides;
  if (me >= kNumbers || (is_line && (side > 1 || me % C > 0))) return;
  double sum = 0;
  for (int other = 0; other < kThreads / kWarp; ++other) sum += shares[me][other];
  double* to = p.distances + (task * p.distance_parts + part) * distance_numbers(p);
  const int64_t first = (down * (2 * W - 1) + right * kSides) * C * C;
  to[is_line ? distance_numbers(p) - C + me / C % C : first + me] = sum;
}

}  // namespace
}  // namespace lk
