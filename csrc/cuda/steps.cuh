// All steps of the last block and the linear layer behind it by one launch; in half precision what is stored is, and the
// steps are of floats. With one part, a step has one exchange
// between a task's blocks of threads, of the logits; with several, images are split too and each sum over them is
// exchanged. Sums have one order: of a warp, of a block, then block by block.
#pragma once
#include "last_block.cuh"

namespace lk {
namespace {

template <typename T>
__device__ inline T lanes_sum(T v) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

// Eights: of output channels, 0 without a convolution.
template <typename S, int Terms, int Eights>
class Steps : public LastBlock<S, Terms, Eights> {
 public:
  __device__ Steps(const LastSteps& p, int64_t task) : Base(p, task) {}

  __device__ void run() {
    fetch();
    bool moved = true;  // the block, since its last forward pass
    for (int step = 0; step < p.steps; ++step) {
      const double* rate = p.rates[step];
      if constexpr (Eights > 0) {
        if (moved) this->forward();
        moved = rate[kWeight] != 0 || rate[kGamma] != 0 || rate[kBeta] != 0;
      }
      classify(step);
      judge(step);
      if constexpr (Eights > 0) {
        if (moved) this->backward(rate);
      }
      update(rate);
    }
    deliver();
  }

 private:
  using Base = LastBlock<S, Terms, Eights>;
  using T = Wide<S>;
  using Base::p, Base::share, Base::near, Base::far, Base::task, Base::me, Base::lane, Base::warp, Base::group, Base::part,
      Base::first_image, Base::images, Base::first_channel, Base::first_feature, Base::slice, Base::C, Base::each,
      Base::meet, Base::from, Base::feature;

  __device__ void fetch() {
    each(share.ways, [&](int i) { near.bias[i] = from(kBias, i); });
    each(share.ways * share.features, [&](int i) {
      const int64_t at = feature(i % share.features);
      near.head[i] = at < 0 ? T(0) : from(kHead, i / share.features * p.features + at);
    });
    if constexpr (Eights > 0) {
      this->fetch_block();
    } else {
      const S* x = static_cast<const S*>(p.x) + task * p.x_task + first_image * p.features;
      each(images * share.features, [&](int i) {
        const int64_t at = feature(i % share.features);
        near.y[i] = at < 0 ? T(0) : wide(x[i / share.features * p.features + at]);
      });
    }
    __syncthreads();
  }

  // y, head -> the block's part of its images' logits, for the others to add up.
  __device__ void classify(int step) {
    T* logits = far.logits + (int64_t(step) * p.groups + group) * p.images * share.ways;
    for (int pair = warp; pair < images * share.ways; pair += kStepWarps) {
      const T* y = near.y + pair / share.ways * share.features;
      const T* head = near.head + pair % share.ways * share.features;
      T sum = 0;
      for (int f = lane; f < share.features; f += kWarp) sum += y[f] * head[f];
      sum = lanes_sum(sum);
      if (lane == 0) logits[first_image * share.ways + pair] = sum;
    }
    meet();
  }

  // The logits of all images -> their gradient, the same in every block of the task; the loss, by the first one.
  __device__ void judge(int step) {
    const int count = int(p.images) * share.ways;
    const T* logits = far.logits + int64_t(step) * p.groups * count;
    each(count, [&](int i) {
      T sum = near.bias[i % share.ways];
      for (int other = 0; other < p.groups; ++other) sum += __ldcg(logits + other * count + i);
      near.logits[i] = sum;
    });
    __syncthreads();
    for (int image = warp; image < p.images; image += kStepWarps) {
      T* row = near.logits + image * share.ways;
      T most = -INFINITY, sum = 0;
      for (int i = lane; i < share.ways; i += kWarp) most = row[i] > most ? row[i] : most;
#pragma unroll
      for (int other = kWarp / 2; other > 0; other /= 2) {
        const T v = __shfl_xor_sync(0xffffffffu, most, other);
        most = v > most ? v : most;
      }
      for (int i = lane; i < share.ways; i += kWarp) sum += exp(row[i] - most);
      const T level = log(lanes_sum(sum));
      const int64_t label = p.labels[task * p.labels_task + image];
      if (lane == 0) {
        const bool known = label >= 0 && label < share.ways;
        near.losses[image] = known ? double(level) - (double(row[label]) - double(most)) : double(NAN);
      }
      __syncwarp();  // no lane writes before the loss is read
      for (int i = lane; i < share.ways; i += kWarp)
        row[i] = (exp(row[i] - most - level) - (i == label ? T(1) : T(0))) / T(p.images);
    }
    __syncthreads();
    if (me > 0 || group > 0 || part > 0) return;
    double loss = 0;
    for (int image = 0; image < p.images; ++image) loss += near.losses[image];
    static_cast<T*>(p.rows)[step * p.tasks + task] = T(loss / double(p.images));
  }

  // The head's gradient over the block's images: take(i, sum) for each of [ways, features].
  template <typename Take>
  __device__ void weigh_head(Take take) const {
    each(share.ways * share.features, [&](int i) {
      const int way = i / share.features, f = i % share.features;
      T sum = 0;
      for (int image = 0; image < images; ++image)
        sum += near.logits[(first_image + image) * share.ways + way] * near.y[image * share.features + f];
      take(i, sum);
    });
  }

  // The parameters but gamma and beta. Blocks of other images' parts get the same values.
  __device__ void update(const double* rate) {
    const bool weight = Eights > 0 && rate[kWeight] != 0, head = rate[kHead] != 0;
    const T by_weight = T(-rate[kWeight]), by_head = T(-rate[kHead]);
    const bool alone = p.parts == 1;  // else sums over the images are exchanged
    const int weights = share.taps * share.inputs * C, all = int(share.exchanged());
    T* own = far.gradients + (int64_t(group) * p.parts + part) * all;
    __syncthreads();
    if constexpr (Eights > 0) {
      if (weight)
        this->weigh([&](int tap, int input, int channel, T sum) {
          const int k = tap * share.inputs + input;
          if (alone)
            near.weight[k * share.columns + channel] += by_weight * sum;
          else
            own[k * C + channel] = sum;
        });
    }
    if (head)
      weigh_head([&](int i, T sum) {
        if (alone)
          near.head[i] += by_head * sum;
        else
          own[weights + i] = sum;
      });
    if (!alone && (weight || head)) {
      meet();
      // Each part adds up its share of the numbers for all.
      const int begin = int(part_begin(all, part, p.parts)), end = int(part_begin(all, part + 1, p.parts));
      const auto moves = [&](int i) { return i < weights ? weight : head; };
      const auto place = [&](int i) -> T& {
        return i < weights ? near.weight[i / C * share.columns + i % C] : near.head[i - weights];
      };
      T* moved = far.moved + int64_t(group) * all;
      for (int i = begin + me; i < end; i += kStepThreads) {
        if (!moves(i)) continue;
        T sum = 0;
        for (int other = 0; other < p.parts; ++other)
          sum += __ldcg(far.gradients + (int64_t(group) * p.parts + other) * all + i);
        moved[i] = place(i) + (i < weights ? by_weight : by_head) * sum;
      }
      meet();
      each(all, [&](int i) {
        if (moves(i)) place(i) = __ldcg(moved + i);
      });
    }
    if (rate[kBias] != 0) {
      each(share.ways, [&](int way) {
        T sum = 0;
        for (int image = 0; image < p.images; ++image) sum += near.logits[image * share.ways + way];
        near.bias[way] += T(-rate[kBias]) * sum;
      });
    }
    __syncthreads();
  }

  // The new values, and whether they are finite.
  __device__ void deliver() {
    bool finite = true;
    const auto give = [&](int which, int64_t size, int64_t at, T value) {
      const S kept = narrow<S>(value);
      static_cast<S*>(p.to[which])[task * size + at] = kept;
      finite = finite && wide(kept) - wide(kept) == T(0);
    };
    if (part == 0) {
      if constexpr (Eights > 0) {
        const int64_t taps = share.taps;
        if (p.to[kWeight])
          each(share.taps * share.inputs * C, [&](int i) {
            // in the order of the result
            const int tap = i % share.taps, input = i / share.taps % share.inputs, o = i / share.taps / share.inputs;
            if (first_channel + o >= p.outputs || input >= p.inputs) return;
            const T value = near.weight[(tap * share.inputs + input) * share.columns + o];
            give(kWeight, p.outputs * p.inputs * taps, ((first_channel + o) * p.inputs + input) * taps + tap, value);
          });
        for (int which = kGamma; which <= kBeta; ++which) {
          if (p.to[which] && me < C && first_channel + me < p.outputs)
            give(which, p.outputs, first_channel + me, near.affine[(which - kGamma) * C + me]);
        }
      }
      if (p.to[kHead])
        each(share.ways * share.features, [&](int i) {
          const int64_t at = feature(i % share.features);
          if (at >= 0) give(kHead, p.ways * p.features, i / share.features * p.features + at, near.head[i]);
        });
      if (p.to[kBias] && group == 0) each(share.ways, [&](int i) { give(kBias, p.ways, i, near.bias[i]); });
    }
    near.joined[me] = finite ? 0 : 1;
    __syncthreads();
    if (me == 0 && part == 0) {
      double bad = 0;
      for (int other = 0; other < kStepThreads; ++other) bad += near.joined[other];
      far.flags[group] = bad;
    }
    meet();
    if (me > 0 || group > 0 || part > 0) return;
    double bad = 0;
    for (int other = 0; other < p.groups; ++other) bad += __ldcg(far.flags + other);
    static_cast<T*>(p.rows)[p.steps * p.tasks + task] = bad > 0 ? T(NAN) : T(0);
  }
};

template <typename S, int Terms, int Eights>
__global__ void __launch_bounds__(kStepThreads, 1) last_steps(const __grid_constant__ LastSteps p, int64_t first) {
  wait_for_launch_before();
  Steps<S, Terms, Eights>(p, first + blockIdx.x / (p.groups * p.parts)).run();
}

template <typename S, int Terms>
cudaError_t steps(const LastSteps& p, void* stream) {
  for (int64_t first = 0; first < p.tasks; first += p.tasks_at_once) {
    const int64_t left = p.tasks - first, tasks = left < p.tasks_at_once ? left : p.tasks_at_once;
    const auto kernel = p.channels == 0   ? last_steps<S, 1, 0>
                        : p.channels == 8 ? last_steps<S, Terms, 1>
                                          : last_steps<S, Terms, 4>;
    const int64_t blocks = tasks * p.groups * p.parts;
    LK_RETURN_IF_FAILED(launch_together(kernel, blocks, dim3(kStepThreads), p.shared_bytes, stream, p, first));
  }
  return cudaSuccess;
}

}  // namespace

// `steps` of half precision: compiled beside those of the other dtypes.
cudaError_t steps_of_half(const LastSteps& p, int dtype, void* stream);

}  // namespace lk
