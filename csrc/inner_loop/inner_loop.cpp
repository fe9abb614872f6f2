// First-order adaptation of a chain of fused blocks that ends in a linear layer and softmax cross-entropy, without
// autograd: for one task or for many, each with parameters of its own.
#include "inner_loop/inner_loop.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "cpu/product.h"
#include "inner_loop/task.h"
#include "tasks.h"

namespace lk {
namespace {

// 0 where all of `count` values are finite, else NaN.
template <typename T>
double defect(const T* values, int64_t count) {
  T sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) sums[l] += values[i + l] * T(0);
  for (; i < count; ++i) sums[0] += values[i] * T(0);
  double sum = 0.0;
  for (T part : sums) sum += double(part);
  return sum;
}

// Parameters [...] or [T, ...] with a task axis, of T and new where they are updated.
std::vector<at::Tensor> own_parameters(at::TensorList parameters, at::IntArrayRef updated, int64_t tasks,
                                       at::ScalarType dtype) {
  std::vector<at::Tensor> own;
  const size_t head = parameters.size() - 2;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const int64_t axes = i == head ? 2 : i > head || i % kPerBlock > 0 ? 1 : 4;
    at::Tensor p = parameters[i].dim() == axes ? parameters[i].unsqueeze(0) : parameters[i];
    TORCH_CHECK(p.dim() == axes + 1 && p.scalar_type() == dtype && (p.size(0) == tasks || p.size(0) == 1),
                "inner_loop: parameter ", i, " ", p.sizes(), " ", p.scalar_type(), " does not fit ", tasks, " tasks in ",
                dtype);
    if (updated[i]) {
      std::vector<int64_t> sizes = p.sizes().vec();
      sizes[0] = tasks;
      p = at::empty(sizes, p.options()).copy_(p.expand(sizes));
    } else if (axes == 1 && p.stride(1) != 1) {  // gamma, beta, bias
      p = p.contiguous();
    }
    own.push_back(std::move(p));
  }
  return own;
}

void check_counts(const at::Tensor& x, const at::Tensor& labels, at::TensorList parameters, at::IntArrayRef updated,
                  at::IntArrayRef geometry, at::ArrayRef<double> eps, int64_t steps, at::ArrayRef<double> rates) {
  const int64_t blocks = int64_t(eps.size());
  TORCH_CHECK(int64_t(parameters.size()) == kPerBlock * blocks + 2 && parameters.size() == updated.size() &&
                  int64_t(geometry.size()) == kGeometry * blocks,
              "inner_loop: ", blocks, " blocks need ", kPerBlock * blocks + 2, " parameters and flags and ",
              kGeometry * blocks, " numbers, got ", parameters.size(), ", ", updated.size(), " and ", geometry.size());
  TORCH_CHECK(labels.dim() == 2 && x.dim() == (blocks > 0 ? 5 : 3) && x.size(0) == labels.size(0) &&
                  x.size(1) == labels.size(1),
              "inner_loop: x ", x.sizes(), " does not fit labels ", labels.sizes());
  TORCH_CHECK(labels.scalar_type() == at::kLong, "inner_loop: labels must be int64, got ", labels.scalar_type());
  const int64_t moving = std::count_if(updated.begin(), updated.end(), [](int64_t flag) { return flag != 0; });
  TORCH_CHECK(steps >= 0 && (rates.size() == 1 || int64_t(rates.size()) == steps * moving), "inner_loop: ", steps,
              " steps of ", moving, " updated parameters need 1 rate or ", steps * moving, ", got ", rates.size());
}

// The layers take what comes to them; parameters with a task axis.
void check_layers(const at::Tensor& x, const std::vector<at::Tensor>& own, at::IntArrayRef geometry, int64_t blocks) {
  for (int64_t b = 0, inputs = x.size(2); b <= blocks; ++b) {
    const at::Tensor *const at = &own[b * kPerBlock], &weight = at[0];
    const int64_t outputs = weight.size(1);
    bool fits = at[1].size(1) == outputs;
    if (b < blocks) {
      const at::IntArrayRef g = geometry.slice(b * kGeometry, kGeometry);
      TORCH_CHECK(std::min({g[0], g[1], g[4], g[5], g[6], g[7]}) > 0 && std::min(g[2], g[3]) >= 0,
                  "inner_loop: the numbers of block ", b, " are wrong: ", g);
      fits = fits && at[2].size(1) == outputs && weight.size(2) * geometry[b * kGeometry + 6] == inputs;
      inputs = outputs;
    }
    TORCH_CHECK(fits, "inner_loop: the parameters of layer ", b, " do not fit ", inputs, " inputs: ", weight.sizes(),
                " and ", at[1].sizes());
  }
}

// All tasks' layers.
template <typename T>
struct Chains {
  const std::vector<at::Tensor>& parameters;  // [1 or T, ...]
  const std::vector<bool>& moves;  // which of them change
  at::IntArrayRef geometry;
  at::ArrayRef<double> eps;

  T* data(int64_t i, int64_t task) const {
    const at::Tensor& p = parameters[i];
    return const_cast<T*>(p.const_data_ptr<T>()) + (p.size(0) == 1 ? 0 : task * p.stride(0));
  }
  at::Tensor tensor(int64_t i, int64_t task) const { return parameters[i].select(0, parameters[i].size(0) == 1 ? 0 : task); }

  // For images [T, N, C, H, W] or features [T, N, F].
  Chain<T> of(const at::Tensor& x, int64_t task) const {
    const int64_t blocks = int64_t(eps.size()), head = blocks * kPerBlock;
    Chain<T> chain{{}, tensor(head, task), data(head + 1, task), moves[head], moves[head + 1]};
    bool below = false;
    int64_t channels = x.size(2), height = blocks > 0 ? x.size(3) : 0, width = blocks > 0 ? x.size(4) : 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const at::IntArrayRef g = geometry.slice(b * kGeometry, kGeometry);
      const int64_t at = b * kPerBlock;
      Block<T> block{};
      block.weight = tensor(at, task), block.gamma = data(at + 1, task), block.beta = data(at + 2, task);
      block.c = Convolution::of(x.size(1), channels, height, width, block.weight.size(0),
                                {block.weight.size(2), block.weight.size(3)}, g.data(), g[6]);
      block.pool = g[7], block.eps = eps[b], block.below = below;
      block.update_weight = moves[at], block.update_gamma = moves[at + 1], block.update_beta = moves[at + 2];
      below = below || block.updated();
      channels = block.c.outputs, height = block.c.rows / block.pool, width = block.c.columns / block.pool;
      chain.blocks.push_back(std::move(block));
    }
    return chain;
  }
};

}  // namespace

std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor> inner_loop(const at::Tensor& x, const at::Tensor& labels_,
                                                                       at::TensorList parameters, at::IntArrayRef updated,
                                                                       at::IntArrayRef geometry, at::ArrayRef<double> eps,
                                                                       int64_t steps, at::ArrayRef<double> rates_,
                                                                       const std::optional<at::Tensor>& query) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  check_counts(x, labels_, parameters, updated, geometry, eps, steps, rates_);
  TORCH_CHECK(!query ||
                  (query->dim() == x.dim() && query->size(0) == x.size(0) && query->sizes().slice(2) == x.sizes().slice(2) &&
                   query->scalar_type() == x.scalar_type() && query->numel() > 0),
              "inner_loop: query images ", query->sizes(), " ", query->scalar_type(), " do not fit support images ",
              x.sizes());
  const int64_t tasks = x.size(0), count = int64_t(parameters.size());
  const std::vector<at::Tensor> own = own_parameters(parameters, updated, tasks, x.scalar_type());
  check_layers(x, own, geometry, int64_t(eps.size()));
  const at::Tensor labels = labels_.contiguous(), rows = at::empty({steps + 1, tasks}, x.options().dtype(at::kDouble));
  const std::vector<int64_t> sizes =
      query ? std::vector<int64_t>{tasks, query->size(1), own.back().size(1)} : std::vector<int64_t>{0};
  at::Tensor logits = at::empty(sizes, x.options());
  double* const out = rows.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "inner_loop", [&] {
    const Rates<scalar_t> rates(rates_, steps, updated);
    std::vector<bool> moves(count);
    for (int64_t i = 0; i < count; ++i) moves[i] = updated[i] && !rates.zero(i);
    const Chains<scalar_t> chains{own, moves, geometry, eps};
    for_each_task(tasks, [&](int64_t task) {
      Chain<scalar_t> support = chains.of(x, task);
      adapt(x[task], labels.const_data_ptr<int64_t>() + task * labels.size(1), support, rates, out + task, tasks);
      double& last = out[steps * tasks + task];
      last = 0.0;
      for (int64_t i = 0; i < count; ++i)
        if (updated[i]) last += defect(chains.data(i, task), own[i].numel() / own[i].size(0));
      if (!query) return;
      Chain<scalar_t> all = chains.of(*query, task);
      classify((*query)[task], all, logits[task].mutable_data_ptr<scalar_t>());
    });
  });
  std::vector<at::Tensor> values;
  for (int64_t i = 0; i < count; ++i)
    if (updated[i]) values.push_back(tasks == 1 && own[i].dim() > parameters[i].dim() ? own[i][0] : own[i]);
  return {rows, std::move(values), std::move(logits)};
}

TORCH_LIBRARY_FRAGMENT(lambda_kernels, m) {
  m.def("inner_loop(Tensor x, Tensor labels, Tensor[] parameters, int[] updated, int[] geometry, float[] eps, int steps, "
        "float[] rates, Tensor? query) -> (Tensor rows, Tensor[] updated_values, Tensor logits)");
}

TORCH_LIBRARY_IMPL(lambda_kernels, CPU, m) { m.impl("inner_loop", &inner_loop); }

}  // namespace lk
