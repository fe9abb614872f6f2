// A convolution of 3x3 pixels and its gradients over the threads, by the kernels of cpu/winograd.h, on plain memory.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "arena.h"
#include "convolution.h"
#include "cpu/product.h"
#include "cpu/winograd.h"

namespace lk {

inline int64_t threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

template <typename T>
class WinogradConvolution {
 public:
  // Where it computes less than the plain sum does, and was measured to be faster than the library: with few channels
  // the transforms cost more than they save, but for so few pixels a call of the library's costs more yet.
  static bool takes(const Convolution& c) {
    for (int axis : {0, 1})
      if (c.kernel[axis] != 3 || c.stride[axis] != 1 || c.dilation[axis] != 1 || c.padding[axis] > 2) return false;
    const bool many = std::min(c.inputs, c.outputs) >= 16 && c.inputs * c.outputs >= 1024;
    const bool few = std::min(c.inputs, c.outputs) >= 8 && c.pixels() <= 1024;
    return c.groups == 1 && (many || few) && kPoints * ((c.rows + 1) / 2) * ((c.columns + 1) / 2) < 9 * c.rows * c.columns;
  }

  // The weight is [outputs, inputs, 3, 3] with these strides.
  WinogradConvolution(const Convolution& c, T* weight, const int64_t* strides) : c_(c), weight_(weight) {
    std::copy(strides, strides + 4, strides_);
  }

  // Of a part of the images.
  WinogradConvolution part(int64_t images) const {
    WinogradConvolution some = *this;
    some.c_.images = images;
    return some;
  }

  // What is made of the weight, for `forward` and `input_gradient` of all parts: it shall not change any more.
  void prepare(Arena& arena) { u_ = made(false, arena), turned_ = made(true, arena); }

  // Values of what `affine` reads in place of the weight, and these.
  int64_t transformed() const { return kPoints * c_.inputs * up(c_.outputs, kLanes); }
  void transform(T* u) const { make(false, u); }

  // x -> the ReLU of the maxima of y + bias in windows of 2 x 2; u: from `transform`
  void affine(const T* x, const T* u, const T* bias, T* pooled, Arena& arena) const {
    Winograd<T> p = divided(c_);
    p.x = x, p.u = u, p.bias = bias, p.pooled = pooled;
    run(p, winograd_kernels<T>().forward, 1, arena);
  }

  // x -> y
  void forward(const T* x, T* y, Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    Winograd<T> p = divided(c_);
    p.x = x, p.u = transform(false, arena), p.y = y;
    run(p, winograd_kernels<T>().forward, 1, arena);
    arena.rewind(mark);
  }

  // What is made of the weight for a survey, of minus the weight where `negative`.
  const T* surveyed(const bool* negative, Arena& arena) const {
    const int64_t padded = up(c_.outputs, kLanes);
    T* const u = made(false, arena);
    for (int64_t o = 0; o < c_.outputs; ++o)
      for (int64_t row = 0; negative[o] && row < kPoints * c_.inputs; ++row) u[row * padded + o] = -u[row * padded + o];
    return u;
  }

  // x -> the maxima of y in windows of 2 x 2, of -y where `negative`; so many pixels with their mean and their squares
  // about it join those of the images seen before
  void survey(const T* x, const bool* negative, T* pooled, double& seen, double* mean, double* squares, Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    survey(x, surveyed(negative, arena), pooled, seen, mean, squares, arena);
    arena.rewind(mark);
  }

  // u: from `surveyed`
  void survey(const T* x, const T* u, T* pooled, double& seen, double* mean, double* squares, Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    const int64_t padded = up(c_.outputs, kLanes);
    Winograd<T> p = divided(c_);
    p.x = x, p.u = u, p.pooled = pooled;
    const int64_t groups = share(p.images * p.tile_rows * p.tile_columns, p.group);
    p.partial = arena.take<double>(groups * 3 * padded);
    run(p, winograd_kernels<T>().forward, 1, arena);
    // Chan, Golub, LeVeque 1983, eq. 2.1: joins the parts' means and squares
    for (int64_t group = 0; group < groups; ++group) {
      const double* const part = p.partial + group * 3 * padded;
      const double count = part[2 * padded], weight = count / (seen + count);
      for (int64_t o = 0; o < c_.outputs; ++o) {
        const double delta = part[o] - mean[o];
        mean[o] += delta * weight;
        squares[o] += part[padded + o] + delta * delta * seen * weight;
      }
      seen += count;
    }
    arena.rewind(mark);
  }

  // x and its derivative (null for zeros) -> y and its derivative; along: the derivative of the weight, or null
  void forward(const T* x, const T* x_dot, const WinogradConvolution* along, T* y, T* y_dot, Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    WinogradTangent<T> p = divided<WinogradTangent>(c_);
    p.x = x, p.x_dot = x_dot, p.y = y, p.y_dot = y_dot;
    p.u = transform(false, arena), p.u_dot = along == nullptr ? nullptr : along->transform(false, arena);
    run(p, winograd_kernels<T>().forward_tangent, 2, arena);
    arena.rewind(mark);
  }

  // gradient of y -> gradient of x
  void input_gradient(const T* gy, T* gx, Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    Winograd<T> p = divided(turned());
    p.x = gy, p.u = transform(true, arena), p.y = gx;
    run(p, winograd_kernels<T>().forward, 1, arena);
    arena.rewind(mark);
  }

  // gradient of y and its derivative -> gradient of x and its derivative; along: the derivative of the weight, or null
  void input_gradient(const T* gy, const T* gy_dot, const WinogradConvolution* along, T* gx, T* gx_dot, Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    WinogradTangent<T> p = divided<WinogradTangent>(turned());
    p.x = gy, p.x_dot = gy_dot, p.y = gx, p.y_dot = gx_dot;
    p.u = transform(true, arena), p.u_dot = along == nullptr ? nullptr : along->transform(true, arena);
    run(p, winograd_kernels<T>().forward_tangent, 2, arena);
    arena.rewind(mark);
  }

  // weight += scale times the weight's gradient
  void add_weight_gradient(const T* x, const T* gy, T scale, Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    Sums sums = take_sums(arena);
    add_part(x, gy, sums, arena);
    add(sums.du, sums.slabs, scale);
    arena.rewind(mark);
  }

  // What the weight's gradient is made of, summed over parts of the images: the first part has the most.
  struct Sums {
    T* du;
    int64_t slabs;
    bool any;  // whether there is a part yet
  };
  Sums take_sums(Arena& arena) const {
    const Winograd<T> p = in_slabs<Winograd>();
    return {arena.take<T>(p.slabs * kPoints * p.inputs * p.padded_outputs), p.slabs, false};
  }
  void add_part(const T* x, const T* gy, Sums& sums, Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    Winograd<T> p = in_slabs<Winograd>();
    p.x = x, p.gy = gy, p.du = sums.du, p.more = sums.any;
    run_slabs(p, winograd_kernels<T>().gradient, 1, arena);
    sums.any = true;
    arena.rewind(mark);
  }
  // weight += the gradient that the parts make
  void add_sums(const Sums& sums) const { add(sums.du, sums.slabs, T(1)); }

  // The gradient's derivative is added to this weight, and `scale` times the gradient to that of `slope` unless it is null.
  void add_weight_gradient(const T* x, const T* x_dot, const T* gy, const T* gy_dot, const WinogradConvolution* slope,
                           T scale, Arena& arena) const {
    const Arena::Mark mark = arena.mark();
    WinogradTangent<T> p = in_slabs<WinogradTangent>();
    p.x = x, p.x_dot = x_dot, p.gy = gy, p.gy_dot = gy_dot;
    const int64_t size = p.slabs * kPoints * p.inputs * p.padded_outputs;
    p.du_dot = arena.take<T>(size);
    p.du = slope == nullptr ? nullptr : arena.take<T>(size);
    run_slabs(p, winograd_kernels<T>().gradient_tangent, 2, arena);
    add(p.du_dot, p.slabs, T(1));
    if (slope != nullptr) slope->add(p.du, p.slabs, scale);
    arena.rewind(mark);
  }

 private:
  // Tiles, whose matrices and u fit the second-level cache for 64 channels.
  static constexpr int64_t kGroup = 24;
  static constexpr int64_t kSlab = 256, kMostSlabs = 8;  // tiles whose gradients are summed apart
  static constexpr int64_t kGrain = 250000;     // multiply-adds that a thread must have before splitting pays
  static constexpr int64_t kWeightGrain = 1024;  // pairs of channels, likewise

  static int64_t share(int64_t value, int64_t parts) { return (value + parts - 1) / parts; }

  static int64_t grain(const Winograd<T>& p, int64_t items) {
    const int64_t work = p.images * p.tile_rows * p.tile_columns * kPoints * p.inputs * p.outputs;
    return std::max<int64_t>(1, kGrain * items / work);
  }

  template <template <typename> class Params>
  static Params<T> describe(const Convolution& c) {
    Params<T> p{};
    p.images = c.images, p.height = c.height, p.width = c.width, p.inputs = c.inputs;
    p.rows = c.rows, p.columns = c.columns, p.outputs = c.outputs;
    p.pad_y = c.padding[0], p.pad_x = c.padding[1];
    p.padded_inputs = up(c.inputs, kLanes), p.padded_outputs = up(c.outputs, kLanes);
    p.tile_rows = share(c.rows, 2), p.tile_columns = share(c.columns, 2);
    return p;
  }

  // The convolution that takes the gradient of y to that of x.
  Convolution turned() const {
    Convolution back = c_;
    std::swap(back.inputs, back.outputs), std::swap(back.height, back.rows), std::swap(back.width, back.columns);
    for (int axis : {0, 1}) back.padding[axis] = 2 - c_.padding[axis];
    return back;
  }

  WinogradWeight<T> describe(bool turned) const {
    WinogradWeight<T> w{c_.outputs, c_.inputs, weight_};
    std::copy(strides_, strides_ + 4, w.strides);
    w.turned = turned, w.padded = up(turned ? c_.inputs : c_.outputs, kLanes);
    return w;
  }

  const T* transform(bool turned, Arena& arena) const {
    const T* const ready = turned ? turned_ : u_;
    return ready != nullptr ? ready : made(turned, arena);
  }

  T* made(bool turned, Arena& arena) const {
    const int64_t rows = turned ? c_.outputs : c_.inputs;
    T* const u = arena.take<T>(kPoints * rows * describe(turned).padded);
    make(turned, u);
    return u;
  }

  void make(bool turned, T* u) const {
    WinogradWeight<T> w = describe(turned);
    w.u = u;
    at::parallel_for(0, turned ? c_.outputs : c_.inputs, kWeightGrain / w.padded + 1,
                     [&](int64_t begin, int64_t end) { winograd_kernels<T>().weights(w, begin, end); });
  }

  // In groups that are a function of the sizes alone, as a survey's sums are taken by groups; few tiles make small ones.
  template <template <typename> class Params = Winograd>
  static Params<T> divided(const Convolution& c) {
    Params<T> p = describe<Params>(c);
    p.group = p.images * p.tile_rows * p.tile_columns < 8 * kGroup ? kGroup / 2 : kGroup;
    return p;
  }

  template <template <typename> class Params>
  static void run(const Params<T>& p, void (*kernel)(const Params<T>&, int64_t, int64_t, T*), int64_t parts, Arena& arena) {
    const Arena::Mark mark = arena.mark();
    const int64_t own = parts * winograd_scratch(p), items = share(p.images * p.tile_rows * p.tile_columns, p.group);
    T* const scratch = arena.take<T>(threads() * own);
    at::parallel_for(0, items, grain(p, items),
                     [&](int64_t begin, int64_t end) { kernel(p, begin, end, scratch + at::get_thread_num() * own); });
    arena.rewind(mark);
  }

  template <template <typename> class Params>
  Params<T> in_slabs() const {
    Params<T> p = describe<Params>(c_);
    const int64_t tiles = p.images * p.tile_rows * p.tile_columns;
    // A function of the sizes alone, so that sums are taken in one order whatever the number of threads.
    p.slabs = std::clamp<int64_t>(tiles / kSlab, tiles > 1 ? 2 : 1, kMostSlabs);
    const int64_t most = tiles < kMostSlabs * kSlab ? kGroup : 2 * kGroup;
    p.group = share(share(tiles, p.slabs), share(share(tiles, p.slabs), most));
    p.slabs = std::min(p.slabs, share(tiles, p.group));
    return p;
  }

  template <template <typename> class Params>
  static void run_slabs(const Params<T>& p, void (*kernel)(const Params<T>&, int64_t, int64_t, T*), int64_t parts,
                        Arena& arena) {
    const int64_t own = parts * winograd_scratch(p);
    T* const scratch = arena.take<T>(threads() * own);
    at::parallel_for(0, p.slabs, grain(p, p.slabs),
                     [&](int64_t begin, int64_t end) { kernel(p, begin, end, scratch + at::get_thread_num() * own); });
  }

  // weight += scale times the gradient that du [slabs, 16, inputs, padded outputs] holds
  void add(const T* du, int64_t slabs, T scale) const {
    WinogradWeight<T> w = describe(false);
    w.du = du, w.slabs = slabs, w.scale = scale;
    at::parallel_for(0, c_.inputs, kWeightGrain / c_.outputs + 1,
                     [&](int64_t begin, int64_t end) { winograd_kernels<T>().add_gradient(w, begin, end); });
  }

  Convolution c_;
  T* weight_;
  int64_t strides_[4];
  const T *u_ = nullptr, *turned_ = nullptr;  // of `prepare`
};

}  // namespace lk
