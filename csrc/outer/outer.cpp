// The outer gradient of a chain of fused blocks and a linear layer, without autograd: K steps of gradient descent with the
// way back through them (second order), and the query pass with its own way back; tasks side by side on threads.
#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <tuple>
#include <utility>
#include <vector>

#include "arena.h"
#include "checks.h"
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
Given described(const Operands& operands, const at::Tensor& x, at::TensorList parameters, at::IntArrayRef geometry,
                at::ArrayRef<double> eps, bool from_images) {
  ChainSizes sizes = operands.chain(x, parameters, geometry, eps);
  Given given;
  given.x = x;
  for (const at::Tensor& p : parameters) given.parameters.push_back(p.contiguous());
  ChainShape& shape = given.shape;
  shape.blocks = std::move(sizes.blocks), shape.pools = std::move(sizes.pools), shape.eps = eps.vec();
  shape.images = x.size(1), shape.ways = sizes.ways;
  shape.channels = sizes.channels, shape.height = sizes.height, shape.width = sizes.width;
  shape.by_moments =
      !eps.empty() && from_images && ImageConvolution<float>::takes(shape.blocks.front(), shape.pools.front());
  return given;
}

// Where the updated parameters lie in a row that holds them all.
struct Row {
  std::vector<int64_t> places, offsets;  // of the updated parameters
  int64_t size = 0;

  Row(const Given& given, at::IntArrayRef updated) {
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

// -> the labels, dense
at::Tensor check_steps(const Operands& operands, const Given& given, const at::Tensor& labels, at::IntArrayRef updated,
                       int64_t steps, at::ArrayRef<double> rates) {
  operands.check_count("updated", updated.size(), int64_t(given.parameters.size()));
  operands.check_rates(steps, updated, rates.size(), true);
  TORCH_CHECK(given.shape.ways > 0 && !rates.empty(),
              "chain_steps: a chain with a linear layer, an updated parameter and a step is needed, got ",
              given.parameters.size(), " parameters, flags ", updated, " and ", steps, " steps");
  return operands.labels(labels, {given.tasks(), given.shape.images}, given.shape.ways);
}

// -> the losses [steps, T] before each step, and the updated parameters [T, steps + 1, all of them] before each and at the end
std::tuple<at::Tensor, at::Tensor> chain_steps(const at::Tensor& x, const at::Tensor& labels_, at::TensorList parameters,
                                               at::IntArrayRef updated, at::IntArrayRef geometry, at::ArrayRef<double> eps,
                                               int64_t steps, at::ArrayRef<double> rates_, bool from_images) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Operands operands("chain_steps", x, {&x});
  const Given given = described(operands, x, parameters, geometry, eps, from_images);
  const at::Tensor labels = check_steps(operands, given, labels_, updated, steps, rates_);
  const Row row(given, updated);
  const int64_t tasks = given.tasks();
  const at::Tensor losses = at::empty({steps, tasks}, x.options().dtype(at::kDouble));
  at::Tensor path = at::empty({tasks, steps + 1, row.size}, x.options());
  double* const loss = losses.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "chain_steps", [&] {
    const Rates<scalar_t> rates(rates_, steps, updated);
    scalar_t* const rows = path.mutable_data_ptr<scalar_t>();
    for_each_task(tasks, [&](int64_t task, Interrupt& interrupt) {
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
        interrupt.look();
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

void check_wanted(const Operands& operands, const Given& given, at::IntArrayRef wanted, bool wants_images) {
  operands.check_count("wanted", wanted.size(), int64_t(given.parameters.size()));
  TORCH_CHECK(!wants_images, "chain: with from_images there is no gradient of x");
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
  const Operands operands("chain_steps_grad", x, {&x});
  const Given given = described(operands, x, parameters, geometry, eps, from_images);
  const at::Tensor labels = check_steps(operands, given, labels_, updated, steps, rates_);
  const Row row(given, updated);
  const int64_t tasks = given.tasks(), moving = int64_t(row.places.size());
  operands.check("v", v_, {tasks, row.size}), operands.check_dense("path", path, {tasks, steps + 1, row.size});
  check_wanted(operands, given, wanted, from_images && want_x);
  at::Tensor v = v_.clone(at::MemoryFormat::Contiguous);
  std::vector<at::Tensor> others;
  std::vector<int64_t> other_places;
  for (int64_t i = 0; i < given.shape.parameters(); ++i) {
    if (!wanted[i] || updated[i]) continue;
    others.push_back(zeros_like_task(given, i)), other_places.push_back(i);
  }
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
    for_each_task(tasks, [&](int64_t task, Interrupt& interrupt) {
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
        interrupt.look();
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

at::Tensor empty_bytes(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const int64_t size = c10::multiply_integers(sizes);
  std::byte* const memory = paged(std::size_t(std::max<int64_t>(size, 1)));
  TORCH_CHECK_WITH(OutOfMemoryError, memory != nullptr, "chain_logits: not enough memory: ", size,
                   " bytes are needed for the way back of ", sizes[0], " tasks: take fewer tasks or images at a time");
  return at::from_blob(memory, sizes, [](void* of) { std::free(of); }, options.dtype(at::kByte));
}

// -> logits or features, and what chain_logits_grad reads of the pass [T, bytes]
std::tuple<at::Tensor, at::Tensor> chain_logits(const at::Tensor& x, at::TensorList parameters, at::IntArrayRef geometry,
                                                at::ArrayRef<double> eps, bool from_images) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Given given = described({"chain_logits", x, {&x}}, x, parameters, geometry, eps, from_images);
  at::Tensor logits = empty_result(given), kept;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "chain_logits", [&] {
    const int64_t bytes = QueryChain<scalar_t>::bytes(given.shape), values = logits.numel() / given.tasks();
    kept = empty_bytes({given.tasks(), bytes}, x.options());
    for_each_task(given.tasks(), [&](int64_t task, Interrupt&) {
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
  const Operands operands("chain_logits_grad", x, {&x});
  const Given given = described(operands, x, parameters, geometry, eps, from_images);
  const int64_t tasks = given.tasks(), values = x.numel() / tasks;
  const ChainShape& s = given.shape;
  if (s.ways > 0)
    operands.check("g", g_, {tasks, s.images, s.ways});
  else
    operands.check("g", g_, {tasks, s.images, s.channels, s.height, s.width});
  check_wanted(operands, given, wanted, from_images && want_x);
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
    operands.check_dense("kept", kept, {tasks, QueryChain<scalar_t>::bytes(s)}, at::kByte);
    for_each_task(tasks, [&](int64_t task, Interrupt&) {
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
  m.impl("chain_steps", &Door<&chain_steps>::call);
  m.impl("chain_steps_grad", &Door<&chain_steps_grad>::call);
  m.impl("chain_logits", &Door<&chain_logits>::call);
  m.impl("chain_logits_grad", &Door<&chain_logits_grad>::call);
}

}  // namespace
}  // namespace lk
