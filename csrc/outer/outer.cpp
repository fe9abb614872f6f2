// The outer gradient of a chain of fused blocks and a linear layer, without autograd: K steps of gradient descent with the
// way back through them (second order), and the query pass with its own way back; tasks side by side on threads.
#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "arena.h"
#include "inner_loop/rates.h"
#include "outer/chain.h"
#include "outer/query.h"
#include "tasks.h"
#include "tensors.h"

namespace lk {
namespace {

// A chain over x [T, N, C, H, W] or [T, N, F], with its parameters [1 or T, ...] as dense tensors.
struct Given {
  ChainShape shape;
  std::vector<at::Tensor> parameters;
  at::Tensor x;

  int64_t tasks() const { return x.size(0); }

  template <typename T>
  const T* data(int64_t place, int64_t task) const {
    const at::Tensor& p = parameters[place];
    return p.const_data_ptr<T>() + (p.size(0) == 1 ? 0 : task * p.stride(0));
  }
  int64_t count(int64_t place) const { return parameters[place].numel() / parameters[place].size(0); }
};

// from_images: no gradient of x is wanted, so that a first block may go by its patches' moments.
Given described(const at::Tensor& x, at::TensorList parameters, at::IntArrayRef geometry, at::ArrayRef<double> eps,
                bool from_images) {
  const int64_t blocks = int64_t(eps.size()), tasks = x.size(0);
  TORCH_CHECK(x.dim() == (blocks > 0 ? 5 : 3) && x.numel() > 0, "chain: x must be [tasks, images, ",
              blocks > 0 ? "C, H, W" : "features", "] and not empty, got ", x.sizes());
  const bool whole = int64_t(parameters.size()) != kPerBlock * blocks || blocks == 0;  // with a linear layer
  TORCH_CHECK(int64_t(parameters.size()) == kPerBlock * blocks + (whole ? 2 : 0) &&
                  int64_t(geometry.size()) == kGeometry * blocks,
              "chain: ", blocks, " blocks need ", kPerBlock * blocks + 2, " parameters and ", kGeometry * blocks,
              " numbers, got ", parameters.size(), " and ", geometry.size());
  Given given;
  given.x = x;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor& p = parameters[i];
    const bool head = whole && i + 2 >= parameters.size();
    const int64_t axes = head ? (i + 2 == parameters.size() ? 3 : 2) : i % kPerBlock > 0 ? 2 : 5;
    TORCH_CHECK(p.dim() == axes && p.scalar_type() == x.scalar_type() && (p.size(0) == tasks || p.size(0) == 1),
                "chain: parameter ", i, " ", p.sizes(), " ", p.scalar_type(), " does not fit ", tasks, " tasks in ",
                x.scalar_type());
    given.parameters.push_back(p.contiguous());
  }
  ChainShape& shape = given.shape;
  int64_t channels = x.size(2), height = blocks > 0 ? x.size(3) : 1, width = blocks > 0 ? x.size(4) : 1;
  for (int64_t b = 0; b < blocks; ++b) {
    const at::IntArrayRef g = geometry.slice(b * kGeometry, kGeometry);
    const at::Tensor& weight = given.parameters[b * kPerBlock];
    TORCH_CHECK(std::min({g[0], g[1], g[4], g[5], g[6]}) > 0 && std::min(g[2], g[3]) >= 0 && (g[7] == 1 || g[7] == 2),
                "chain: the numbers of block ", b, " are wrong: ", g);
    const Convolution c = Convolution::of(x.size(1), channels, height, width, weight.size(1),
                                          {weight.size(3), weight.size(4)}, g.data(), g[6]);
    TORCH_CHECK(weight.size(2) * g[6] == channels && given.count(b * kPerBlock + 1) == c.outputs &&
                    given.count(b * kPerBlock + 2) == c.outputs && std::min(c.rows, c.columns) >= g[7],
                "chain: block ", b, " with a weight ", weight.sizes(), " does not take ", channels, "x", height, "x", width);
    shape.blocks.push_back(c), shape.pools.push_back(g[7]), shape.eps.push_back(eps[b]);
    channels = c.outputs, height = c.rows / g[7], width = c.columns / g[7];
  }
  shape.images = x.size(1), shape.channels = channels, shape.height = height, shape.width = width;
  if (whole) {
    const at::Tensor& head = given.parameters[shape.head()];
    TORCH_CHECK(head.size(2) == channels * height * width && given.parameters.back().size(1) == head.size(1),
                "chain: the linear layer ", head.sizes(), " does not take ", channels * height * width, " features");
    shape.ways = head.size(1);
  }
  shape.by_moments = blocks > 0 && from_images && ImageConvolution<float>::takes(shape.blocks.front(), shape.pools.front());
  return given;
}

// Where the updated parameters lie in a row that holds them all.
struct Row {
  std::vector<int64_t> places, offsets;  // of the updated parameters
  int64_t size = 0;

  Row(const Given& given, at::IntArrayRef updated) {
    TORCH_CHECK(updated.size() == given.parameters.size(), "chain: ", updated.size(), " flags for ", given.parameters.size(),
                " parameters");
    for (size_t i = 0; i < updated.size(); ++i) {
      if (!updated[i]) continue;
      places.push_back(int64_t(i)), offsets.push_back(size);
      size += given.count(int64_t(i));
    }
  }

  template <typename T, typename P>
  void point(Places<P>& to, T* row) const {
    for (size_t u = 0; u < places.size(); ++u) to[places[u]] = row + offsets[u];
  }
};

template <typename T>
Places<const T> parameters_of(const Given& given, int64_t task) {
  Places<const T> now;
  for (int64_t i = 0; i < given.shape.parameters(); ++i) now.push_back(given.data<T>(i, task));
  return now;
}

void check_steps(const Given& given, const at::Tensor& labels, const Row& row, int64_t steps, at::ArrayRef<double> rates) {
  TORCH_CHECK(given.shape.ways > 0 && labels.dim() == 2 && labels.size(0) == given.tasks() &&
                  labels.size(1) == given.shape.images && labels.scalar_type() == at::kLong,
              "chain_steps: labels ", labels.sizes(), " ", labels.scalar_type(), " do not fit x ", given.x.sizes());
  TORCH_CHECK(steps > 0 && !row.places.empty() && int64_t(rates.size()) == steps * int64_t(row.places.size()),
              "chain_steps: ", steps, " steps of ", row.places.size(), " updated parameters need one rate each, got ",
              rates.size());
}

// -> the losses [steps, T] before each step, and the updated parameters [T, steps + 1, all of them] before each and at the end
std::tuple<at::Tensor, at::Tensor> chain_steps(const at::Tensor& x, const at::Tensor& labels_, at::TensorList parameters,
                                               at::IntArrayRef updated, at::IntArrayRef geometry, at::ArrayRef<double> eps,
                                               int64_t steps, at::ArrayRef<double> rates_, bool from_images) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Given given = described(x, parameters, geometry, eps, from_images);
  const Row row(given, updated);
  check_steps(given, labels_, row, steps, rates_);
  const int64_t tasks = given.tasks();
  const at::Tensor labels = labels_.contiguous(), losses = at::empty({steps, tasks}, x.options().dtype(at::kDouble));
  at::Tensor path = at::empty({tasks, steps + 1, row.size}, x.options());
  double* const loss = losses.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "chain_steps", [&] {
    const Rates<scalar_t> rates(rates_, steps, updated);
    scalar_t* const rows = path.mutable_data_ptr<scalar_t>();
    for_each_task(tasks, [&](int64_t task) {
      const Borrowed borrowed;
      Arena& arena = *borrowed;
      Places<const scalar_t> now = parameters_of<scalar_t>(given, task);
      const Places<const scalar_t> still(now.size(), nullptr);
      const Places<scalar_t> nowhere(now.size(), nullptr);
      scalar_t* from = rows + task * (steps + 1) * row.size;
      for (size_t u = 0; u < row.places.size(); ++u)
        std::copy_n(now[row.places[u]], given.count(row.places[u]), from + row.offsets[u]);
      OuterChain<scalar_t> chain(given.shape, given.x[task], arena);
      std::vector<scalar_t> scales(now.size());
      for (int64_t step = 0; step < steps; ++step, from += row.size) {
        scalar_t* const to = from + row.size;
        std::copy_n(from, row.size, to);
        row.point(now, static_cast<const scalar_t*>(from));
        Places<scalar_t> slopes(now.size(), nullptr);
        row.point(slopes, to);
        for (size_t i = 0; i < scales.size(); ++i) {
          scales[i] = -rates.of(step)[i];
          if (scales[i] == scalar_t(0)) slopes[i] = nullptr;
        }
        const Arena::Mark mark = arena.mark();
        chain.forward(now, still, arena);
        loss[step * tasks + task] = chain.head().cross_entropy(labels.const_data_ptr<int64_t>() + task * given.shape.images);
        chain.backward(slopes, scales.data(), nowhere, {}, arena);
        arena.rewind(mark);
      }
    });
  });
  return {losses, path};
}

at::Tensor zeros_like_task(const Given& given, int64_t place) {
  std::vector<int64_t> sizes = given.parameters[place].sizes().vec();
  sizes[0] = given.tasks();
  return at::zeros(sizes, given.x.options());
}

// v [T, all updated]: the gradient with respect to what chain_steps gave last. -> that of the first values; those of the
// other parameters that are wanted [T, ...], in order; of x (empty unless wanted), channels-last; of the rates
// [T, steps, updated] (empty unless wanted).
std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor> chain_steps_grad(
    const at::Tensor& v_, const at::Tensor& x, const at::Tensor& labels_, at::TensorList parameters, const at::Tensor& path,
    at::IntArrayRef updated, at::IntArrayRef geometry, at::ArrayRef<double> eps, int64_t steps, at::ArrayRef<double> rates_,
    at::IntArrayRef wanted, bool from_images, bool want_x, bool want_rates, bool second_order) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Given given = described(x, parameters, geometry, eps, from_images);
  const Row row(given, updated);
  check_steps(given, labels_, row, steps, rates_);
  const int64_t tasks = given.tasks(), moving = int64_t(row.places.size());
  const int64_t all[] = {tasks, row.size}, every[] = {tasks, steps + 1, row.size};
  TORCH_CHECK(v_.sizes() == at::IntArrayRef(all) && path.sizes() == at::IntArrayRef(every) && path.is_contiguous() &&
                  wanted.size() == updated.size() && !(from_images && want_x),
              "chain_steps_grad: v ", v_.sizes(), " and path ", path.sizes(), " do not fit x ", x.sizes());
  at::Tensor v = v_.clone(at::MemoryFormat::Contiguous);
  std::vector<at::Tensor> others;
  std::vector<int64_t> other_places;
  for (int64_t i = 0; i < given.shape.parameters(); ++i) {
    if (!wanted[i] || updated[i]) continue;
    others.push_back(zeros_like_task(given, i)), other_places.push_back(i);
  }
  const at::Tensor labels = labels_.contiguous();
  const int64_t values = x.numel() / tasks;  // of a task's x
  at::Tensor gx = want_x ? (x.dim() == 5 ? empty_images(tasks, x.size(1), x.size(2), x.size(3), x.size(4), x.options())
                                         : at::empty(x.sizes(), x.options()))
                               .zero_()
                         : at::empty({0}, x.options());
  const std::vector<int64_t> sizes = want_rates ? std::vector<int64_t>{tasks, steps, moving} : std::vector<int64_t>{0};
  at::Tensor of_rates = at::zeros(sizes, x.options().dtype(at::kDouble));
  if (!second_order && !want_rates) return {v, std::move(others), gx, of_rates};
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "chain_steps_grad", [&] {
    const Rates<scalar_t> rates(rates_, steps, updated);
    for_each_task(tasks, [&](int64_t task) {
      const Borrowed borrowed;
      Arena& arena = *borrowed;
      Places<const scalar_t> now = parameters_of<scalar_t>(given, task);
      Places<scalar_t> along(now.size(), nullptr);
      scalar_t* const own = v.mutable_data_ptr<scalar_t>() + task * row.size;
      if (second_order) {
        row.point(along, own);
        for (size_t i = 0; i < others.size(); ++i)
          along[other_places[i]] = others[i].mutable_data_ptr<scalar_t>() + task * others[i].stride(0);
      }
      scalar_t *const u = arena.take<scalar_t>(row.size), *const slope = arena.take<scalar_t>(row.size);
      scalar_t* const before = arena.take<scalar_t>(row.size);
      const bool back = want_x && second_order;
      const Dual<scalar_t> below{back ? arena.take<scalar_t>(values) : nullptr,
                                 back ? arena.take<scalar_t>(values) : nullptr};
      scalar_t* const to_x = back ? gx.mutable_data_ptr<scalar_t>() + task * values : nullptr;
      OuterChain<scalar_t> chain(given.shape, given.x[task], arena);
      for (int64_t step = steps - 1; step >= 0; --step) {
        row.point(now, path.const_data_ptr<scalar_t>() + (task * (steps + 1) + step) * row.size);
        Places<const scalar_t> dot(now.size(), nullptr);
        for (size_t m = 0; second_order && m < row.places.size(); ++m) {
          const int64_t place = row.places[m], offset = row.offsets[m], count = given.count(place);
          const scalar_t rate = rates.of(step)[place];
          if (rate == scalar_t(0)) continue;
          for (int64_t i = 0; i < count; ++i) u[offset + i] = -rate * own[offset + i];
          dot[place] = u + offset;
        }
        Places<scalar_t> slopes(now.size(), nullptr);
        if (want_rates) {
          std::copy_n(own, row.size, before);
          std::fill_n(slope, row.size, scalar_t(0));
          row.point(slopes, slope);
        }
        const Arena::Mark mark = arena.mark();
        chain.forward(now, dot, arena);
        chain.head().cross_entropy(labels.const_data_ptr<int64_t>() + task * given.shape.images);
        if (back) std::fill_n(below.dot, values, scalar_t(0));
        chain.backward(slopes, nullptr, along, below, arena);
        arena.rewind(mark);
        for (int64_t i = 0; back && i < values; ++i) to_x[i] += below.dot[i];
        double* const rate = want_rates ? of_rates.mutable_data_ptr<double>() + (task * steps + step) * moving : nullptr;
        for (int64_t m = 0; want_rates && m < moving; ++m) {
          const int64_t offset = row.offsets[m], count = given.count(row.places[m]);
          for (int64_t i = 0; i < count; ++i) rate[m] -= double(before[offset + i]) * double(slope[offset + i]);
        }
      }
    });
  });
  return {v, std::move(others), gx, of_rates};
}

// Logits [T, N, ways], or, of a chain without its linear layer, features [T, N, O, H, W], channels-last.
at::Tensor empty_result(const Given& given) {
  const ChainShape& s = given.shape;
  if (s.ways > 0) return at::empty({given.tasks(), s.images, s.ways}, given.x.options());
  return empty_images(given.tasks(), s.images, s.channels, s.height, s.width, given.x.options());
}

// -> logits or features, and what chain_logits_grad reads of the pass [T, bytes]
std::tuple<at::Tensor, at::Tensor> chain_logits(const at::Tensor& x, at::TensorList parameters, at::IntArrayRef geometry,
                                                at::ArrayRef<double> eps, bool from_images) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Given given = described(x, parameters, geometry, eps, from_images);
  at::Tensor logits = empty_result(given), kept;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "chain_logits", [&] {
    const int64_t bytes = QueryChain<scalar_t>::bytes(given.shape), values = logits.numel() / given.tasks();
    kept = at::empty({given.tasks(), bytes}, x.options().dtype(at::kByte));
    for_each_task(given.tasks(), [&](int64_t task) {
      const Borrowed arena;
      const Places<const scalar_t> now = parameters_of<scalar_t>(given, task);
      std::byte* const memory = reinterpret_cast<std::byte*>(kept.mutable_data_ptr<uint8_t>()) + task * bytes;
      QueryChain<scalar_t> chain(given.shape, given.x[task], now, memory, false, *arena);
      chain.forward(logits.mutable_data_ptr<scalar_t>() + task * values, *arena);
    });
  });
  return {logits, kept};
}

// g: of the logits or features. -> the gradients of the parameters that are wanted [T, ...], in order; of x (empty unless wanted).
std::tuple<std::vector<at::Tensor>, at::Tensor> chain_logits_grad(const at::Tensor& g_, const at::Tensor& x,
                                                                  at::TensorList parameters, const at::Tensor& kept,
                                                                  at::IntArrayRef geometry, at::ArrayRef<double> eps,
                                                                  at::IntArrayRef wanted, bool from_images, bool want_x) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Given given = described(x, parameters, geometry, eps, from_images);
  const int64_t tasks = given.tasks(), values = x.numel() / tasks;
  const at::Tensor like = empty_result(given);
  TORCH_CHECK(g_.sizes() == like.sizes() && g_.scalar_type() == x.scalar_type() && wanted.size() == parameters.size() &&
                  kept.dim() == 2 && kept.size(0) == tasks && kept.is_contiguous() && !(from_images && want_x),
              "chain_logits_grad: the gradient ", g_.sizes(), " ", g_.scalar_type(), " does not fit x ", x.sizes());
  const at::Tensor g = given.shape.ways > 0 ? g_.contiguous() : pixels_of(g_);
  std::vector<at::Tensor> grads;
  std::vector<int64_t> places;
  for (int64_t i = 0; i < given.shape.parameters(); ++i) {
    if (!wanted[i]) continue;
    grads.push_back(zeros_like_task(given, i)), places.push_back(i);
  }
  at::Tensor gx = !want_x        ? at::empty({0}, x.options())
                  : x.dim() == 5 ? empty_images(tasks, x.size(1), x.size(2), x.size(3), x.size(4), x.options())
                                 : at::empty(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "chain_logits_grad", [&] {
    TORCH_CHECK(kept.size(1) == QueryChain<scalar_t>::bytes(given.shape), "chain_logits_grad: ", kept.size(1),
                " bytes are not what chain_logits left");
    for_each_task(tasks, [&](int64_t task) {
      const Borrowed arena;
      const Places<const scalar_t> now = parameters_of<scalar_t>(given, task);
      Places<scalar_t> slopes(now.size(), nullptr);
      for (size_t i = 0; i < grads.size(); ++i)
        slopes[places[i]] = grads[i].mutable_data_ptr<scalar_t>() + task * grads[i].stride(0);
      std::byte* const memory =
          reinterpret_cast<std::byte*>(const_cast<uint8_t*>(kept.const_data_ptr<uint8_t>())) + task * kept.size(1);
      QueryChain<scalar_t> chain(given.shape, given.x[task], now, memory, true, *arena);
      chain.backward(g.const_data_ptr<scalar_t>() + task * (g.numel() / tasks), slopes,
                     want_x ? gx.mutable_data_ptr<scalar_t>() + task * values : nullptr, *arena);
    });
  });
  return {std::move(grads), gx};
}

TORCH_LIBRARY_FRAGMENT(lambda_kernels, m) {
  m.def("chain_steps(Tensor x, Tensor labels, Tensor[] parameters, int[] updated, int[] geometry, float[] eps, int steps, "
        "float[] rates, bool from_images) -> (Tensor losses, Tensor path)");
  m.def("chain_steps_grad(Tensor v, Tensor x, Tensor labels, Tensor[] parameters, Tensor path, int[] updated, "
        "int[] geometry, float[] eps, int steps, float[] rates, int[] wanted, bool from_images, bool want_x, "
        "bool want_rates, bool second_order) -> (Tensor v, Tensor[] others, Tensor gx, Tensor of_rates)");
  m.def("chain_logits(Tensor x, Tensor[] parameters, int[] geometry, float[] eps, bool from_images) -> (Tensor logits, "
        "Tensor kept)");
  m.def("chain_logits_grad(Tensor g, Tensor x, Tensor[] parameters, Tensor kept, int[] geometry, float[] eps, "
        "int[] wanted, bool from_images, bool want_x) -> (Tensor[] grads, Tensor gx)");
}

TORCH_LIBRARY_IMPL(lambda_kernels, CPU, m) {
  m.impl("chain_steps", &chain_steps);
  m.impl("chain_steps_grad", &chain_steps_grad);
  m.impl("chain_logits", &chain_logits);
  m.impl("chain_logits_grad", &chain_logits_grad);
}

}  // namespace
}  // namespace lk
