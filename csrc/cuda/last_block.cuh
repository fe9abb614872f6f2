// The last block in its steps: convolution, norm, ReLU and max-pool, forward and backward. A block of threads has its
// channels' weights, and the images where they fit, in shared memory from the first step to the last.
#pragma once
#include "last_steps.cuh"
#include "tensor_core.cuh"

namespace lk {
namespace {

template <typename T>
struct Peak {
  T value;  // of norm and pooling, before the ReLU
  int at;   // its place in the window
};

template <typename S, int Terms, int Eights>
class LastBlock : public Station<S, Eights> {
 protected:
  using Base = Station<S, Eights>;
  using T = Wide<S>;
  using Base::p, Base::share, Base::near, Base::far, Base::task, Base::me, Base::lane, Base::warp, Base::group, Base::part,
      Base::first_image, Base::images, Base::first_channel, Base::C, Base::kRows, Base::each, Base::meet, Base::from,
      Base::joined;
  // Of a warp at a time in the weight's gradient: a tap and 16 inputs each.
  static constexpr int kUnits = sizeof(T) == 8 ? 3 : 5;

  __device__ LastBlock(const LastSteps& p, int64_t task) : Base(p, task) {}

  // Parameters and, where they all fit, the images. What is beyond the last channel or input is 0.
  __device__ void fetch_block() {
    const int depth = share.taps * share.inputs;
    each(depth * share.columns, [&](int i) {
      const int o = i % share.columns, k = i / share.columns, tap = k / share.inputs, input = k % share.inputs;
      const bool there = o < C && first_channel + o < p.outputs && input < p.inputs;
      near.weight[i] = there ? from(kWeight, ((first_channel + o) * p.inputs + input) * share.taps + tap) : T(0);
    });
    each(2 * C, [&](int i) {
      const int channel = first_channel + i % C;
      near.affine[i] = channel < p.outputs ? from(i < C ? kGamma : kBeta, channel) : T(0);
    });
    each(share.taps * share.places, [&](int i) {
      const int tap = i / share.places, place = i % share.places;
      const int y = int(place / p.out_width * p.stride_y - p.padding_y + tap / p.kernel_width * p.dilation_y);
      const int x = int(place % p.out_width * p.stride_x - p.padding_x + tap % p.kernel_width * p.dilation_x);
      const bool inside = unsigned(y) < unsigned(p.height) && unsigned(x) < unsigned(p.width);
      near.offsets[i] = inside ? int(y * p.width + x) * share.row : -1;
    });
    each(int(p.images_at_once) * share.pixels * share.row, [&](int i) { near.x[i] = T(0); });
    each(share.row + 8, [&](int i) { near.zeros[i] = T(0); });
    if (p.images_at_once >= images) bring(0, images);
  }

  // z -> y.
  __device__ void forward() {
    convolve();
    measure();
    const int rows = int(p.out_height / p.pool), columns = int(p.out_width / p.pool);
    each(images * share.features, [&](int i) {
      const int channel = i % C;
      const T value = peak(first(cell(i / C, rows, columns), channel), channel).value;
      near.y[i] = value < T(0) ? T(0) : value;
    });
    __syncthreads();
  }

  // The gradient of a feature of one of the block's images.
  __device__ T of_feature(int image, int f) const {
    const T* g = near.logits + (first_image + image) * share.ways;
    T sum = 0;
    for (int way = 0; way < share.ways; ++way) sum += g[way] * near.head[way * share.features + f];
    return sum;
  }

  // Gradients of gamma and beta; z becomes its own gradient where the weight moves; gamma and beta are updated.
  __device__ void backward(const double* rate) {
    const int channel = me % C, rows = int(p.out_height / p.pool), columns = int(p.out_width / p.pool);
    double dgamma = 0, dbeta = 0;
    for (int i = me / C; i < images * share.pooled; i += kRows) {
      const Cell at = cell(i, rows, columns);
      const T* z = first(at, channel);
      const Peak<T> best = peak(z, channel);
      if (best.value <= T(0)) continue;
      const int place = best.at / int(p.pool) * int(p.out_width) + best.at % int(p.pool);
      const T g = of_feature(at.image, i % share.pooled * C + channel);
      dgamma += double(g * ((z[place * C] - near.norm[channel]) * near.norm[C + channel]));
      dbeta += double(g);
    }
    dgamma = joined(dgamma);
    dbeta = joined(dbeta);
    if (p.parts > 1) {
      double* all = far.sums + int64_t(group) * p.parts * 2 * C;
      if (me < C) all[part * 2 * C + me] = dgamma, all[(part * 2 + 1) * C + me] = dbeta;
      meet();
      dgamma = dbeta = 0;
      for (int other = 0; other < p.parts; ++other) {
        dgamma += __ldcg(all + other * 2 * C + channel);
        dbeta += __ldcg(all + (other * 2 + 1) * C + channel);
      }
    }
    if (me < C) near.sums[me] = dgamma, near.sums[C + me] = dbeta;
    __syncthreads();
    if (rate[kWeight] != 0) scatter();
    if (me < C && first_channel + me < p.outputs) {
      near.affine[me] += T(-rate[kGamma]) * T(near.sums[me]);
      near.affine[C + me] += T(-rate[kBeta]) * T(near.sums[C + me]);
    }
  }

  // The weight's gradient, z holding that of the convolution: take(tap, input, channel, sum) by one lane for each.
  template <typename Take>
  __device__ void weigh(Take take) {
    const int depths = (share.inputs + 15) / 16, units = share.taps * depths;
    for (int pass = 0; pass < units; pass += kUnits * kStepWarps) {
      T sums[kUnits][Eights][4] = {};
      for (int begin = 0; begin < images; begin += int(p.images_at_once)) {
        const int left = images - begin, now = left < p.images_at_once ? left : int(p.images_at_once);
        if (p.images_at_once < images) bring(begin, now);
        const int count = now * share.places;
        const T* dz = near.z + begin * share.places * C;
        // A product's terms are places, two neighbours a lane: their rows of x lie in other banks than the next lane's.
        const int own = 2 * (lane % 4);
        Spot spots[2] = {spot(own, count), spot(own + 1, count)};
        for (int from = 0; from < count; from += 8) {
          const int m = from + own;
          T b[Eights][2];
#pragma unroll
          for (int e = 0; e < Eights; ++e) {
            b[e][0] = m < count ? dz[m * C + 8 * e + lane / 4] : T(0);
            b[e][1] = m + 1 < count ? dz[(m + 1) * C + 8 * e + lane / 4] : T(0);
          }
#pragma unroll
          for (int u = 0; u < kUnits; ++u) {
            const int unit = pass + u * kStepWarps + warp;
            if (unit >= units) break;
            const int tap = unit / depths, input = unit % depths * 16 + lane / 4;
            const T* one = tapped(spots[0], tap) + input;
            const T* other = tapped(spots[1], tap) + input;
            const T a[4] = {one[0], one[8], other[0], other[8]};
#pragma unroll
            for (int e = 0; e < Eights; ++e) multiply_as<Terms>(sums[u][e], a, b[e]);
          }
          move(spots[0], m + 8, count);
          move(spots[1], m + 9, count);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int unit = pass + u * kStepWarps + warp;
        if (unit >= units) break;
#pragma unroll
        for (int e = 0; e < Eights; ++e) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int input = unit % depths * 16 + lane / 4 + i / 2 * 8;
            if (input < share.inputs) take(unit / depths, input, 8 * e + 2 * (lane % 4) + i % 2, sums[u][e][i]);
          }
        }
      }
    }
  }

 private:
  // The images from `begin` on into shared memory.
  __device__ void bring(int begin, int count) {
    constexpr int V = 16 / sizeof(S);
    const int inputs = int(p.inputs);
    const S* x = static_cast<const S*>(p.x) + task * p.x_task + int64_t(first_image + begin) * share.pixels * inputs;
    __syncthreads();
    const auto kept = [](S v) { return Terms == 1 ? rounded(wide(v)) : wide(v); };
    if (inputs % V == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
      const int packs = inputs / V;
#pragma unroll 4
      for (int i = me; i < count * share.pixels * packs; i += kStepThreads) {
        const Pack<S, V> pack = load<V>(x + i * V);
        Pack<T, V> values;
#pragma unroll
        for (int v = 0; v < V; ++v) values.at[v] = kept(pack.at[v]);
        store(near.x + i / packs * share.row + i % packs * V, values);
      }
    } else {
      each(count * share.pixels * inputs, [&](int i) { near.x[i / inputs * share.row + i % inputs] = kept(x[i]); });
    }
    __syncthreads();
  }

  // A place of an image as the products read it; one that is not there is one of zeros.
  struct Spot {
    const T* image;
    int place;
  };
  __device__ Spot spot(int m, int count) const {
    const int image = m / share.places;
    return {near.x + image * share.pixels * share.row, m < count ? m - image * share.places : -1};
  }
  // The spot 8 places further.
  __device__ void move(Spot& spot, int m, int count) const {
    spot.place = m < count ? spot.place + 8 : -1;
    for (; spot.place >= share.places; spot.place -= share.places) spot.image += share.pixels * share.row;
  }
  __device__ const T* tapped(const Spot& spot, int tap) const {
    const int offset = spot.place < 0 ? -1 : near.offsets[tap * share.places + spot.place];
    return offset < 0 ? near.zeros : spot.image + offset;
  }

  // x, weight -> z.
  __device__ void convolve() {
    for (int begin = 0; begin < images; begin += int(p.images_at_once)) {
      const int left = images - begin, now = left < p.images_at_once ? left : int(p.images_at_once);
      if (p.images_at_once < images) bring(begin, now);
      const int count = now * share.places;
      T* z = near.z + begin * share.places * C;
      for (int tile = warp * 16; tile < count; tile += kStepWarps * 16) {
        const int m = tile + lane / 4;
        const Spot spots[2] = {spot(m, count), spot(m + 8, count)};
        T sums[Eights][4] = {};
        for (int tap = 0; tap < share.taps; ++tap) {
          const T* above = tapped(spots[0], tap) + lane % 4;
          const T* below = tapped(spots[1], tap) + lane % 4;
          const T* weight = near.weight + (tap * share.inputs + lane % 4) * share.columns + lane / 4;
#pragma unroll 2
          for (int k = 0; k < share.inputs; k += 8, weight += 8 * share.columns) {
            const T a[4] = {above[k], below[k], above[k + 4], below[k + 4]};
#pragma unroll
            for (int e = 0; e < Eights; ++e) {
              T b[2] = {weight[8 * e], weight[4 * share.columns + 8 * e]};
              if (Terms == 1) b[0] = rounded(b[0]), b[1] = rounded(b[1]);
              multiply_as<Terms>(sums[e], a, b);
            }
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (m + 8 * half >= count) continue;
#pragma unroll
          for (int e = 0; e < Eights; ++e) {
            const Pack<T, 2> two{sums[e][2 * half], sums[e][2 * half + 1]};
            store(z + (m + 8 * half) * C + 8 * e + 2 * (lane % 4), two);
          }
        }
      }
    }
    __syncthreads();
  }

  // z -> mean, rstd, gamma rstd of the task.
  __device__ void measure() {
    const int channel = me % C, count = images * share.places;
    double sum = 0, square = 0;
    for (int m = me / C; m < count; m += kRows) sum += double(near.z[m * C + channel]);
    double mean = joined(sum) / count;
    for (int m = me / C; m < count; m += kRows) {
      const double d = double(near.z[m * C + channel]) - mean;
      square += d * d;
    }
    square = joined(square);
    if (p.parts > 1) {
      double* all = far.moments + int64_t(group) * p.parts * 2 * C;
      if (me < C) all[part * 2 * C + me] = mean, all[(part * 2 + 1) * C + me] = square;
      meet();
      double seen = 0, joint = 0, spread = 0;
      for (int other = 0; other < p.parts; ++other) {
        const int64_t theirs = part_begin(p.images, other + 1, p.parts) - part_begin(p.images, other, p.parts);
        const double more = double(theirs * share.places), delta = __ldcg(all + other * 2 * C + channel) - joint;
        spread += __ldcg(all + (other * 2 + 1) * C + channel) + delta * delta * (seen * more / (seen + more));
        joint += delta * (more / (seen + more));
        seen += more;
      }
      mean = joint, square = spread;
    }
    if (me < C) {
      const double variance = square / (double(p.images) * share.places);
      const T rstd = T(1.0 / sqrt(variance + p.eps));
      near.norm[me] = T(mean);
      near.norm[C + me] = rstd;
      near.norm[2 * C + me] = first_channel + me < p.outputs ? near.affine[me] * rstd : T(0);
    }
    __syncthreads();
  }

  // A cell is a window of the pooling, or what is left of one at the lower and right edges.
  struct Cell {
    int image, row, column, height, width;  // of its first place; sides
  };
  __device__ Cell cell(int i, int rows, int columns) const {
    const int image = i / (rows * columns), at = i % (rows * columns), pool = int(p.pool);
    const int row = at / columns * pool, column = at % columns * pool;
    const int below = int(p.out_height) - row, right = int(p.out_width) - column;
    return {image, row, column, below < pool ? below : pool, right < pool ? right : pool};
  }
  __device__ T* first(const Cell& cell, int channel) const {
    return near.z + (cell.image * share.places + cell.row * int(p.out_width) + cell.column) * C + channel;
  }
  __device__ T normed(T z, int channel) const {
    return (z - near.norm[channel]) * near.norm[2 * C + channel] + near.affine[C + channel];
  }
  __device__ Peak<T> peak(const T* z, int channel) const {
    const int pool = int(p.pool), row = int(p.out_width) * C;
    Peak<T> best{normed(z[0], channel), 0};
    for (int k = 1; k < pool * pool; ++k) {
      const T v = normed(z[k / pool * row + k % pool * C], channel);
      if (v > best.value || v != v) best = {v, k};  // a NaN is a maximum, as in torch
    }
    return best;
  }

  // z -> its gradient.
  __device__ void scatter() {
    const int pool = int(p.pool), rows = int((p.out_height + pool - 1) / pool),
              columns = int((p.out_width + pool - 1) / pool);
    const double share_of_one = 1.0 / (double(p.images) * share.places);
    each(images * rows * columns * C, [&](int i) {
      const int channel = i % C;
      const Cell at = cell(i / C, rows, columns);
      T* z = first(at, channel);
      int open = -1;
      T g = 0;
      if (at.height == pool && at.width == pool) {
        const Peak<T> best = peak(z, channel);
        if (!(best.value <= T(0))) {
          const int window = at.row / pool * int(p.out_width / pool) + at.column / pool;
          open = best.at, g = of_feature(at.image, window * C + channel);
        }
      }
      const T mean = near.norm[channel], rstd = near.norm[C + channel], scale = near.norm[2 * C + channel];
      const T slope = T(near.sums[channel] * share_of_one), level = T(near.sums[C + channel] * share_of_one);
      for (int y = 0; y < at.height; ++y) {
        for (int x = 0; x < at.width; ++x) {
          T& here = z[(y * int(p.out_width) + x) * C];
          const T standard = (here - mean) * rstd, direct = y * pool + x == open ? g : T(0);
          const T dz = scale * (direct - level - standard * slope);
          here = Terms == 1 ? rounded(dz) : dz;
        }
      }
    });
    __syncthreads();
  }
};

}  // namespace
}  // namespace lk
