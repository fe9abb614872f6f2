// First-order adaptation of a chain of fused blocks that ends in a linear layer and softmax cross-entropy, without
// autograd: for one task or for many, each with parameters of its own.
#include "inner_loop/inner_loop.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <utility>

#include "checks.h"
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

// Parameters [...] or [T, ...] with a task axis.
std::vector<at::Tensor> with_task_axis(at::TensorList parameters) {
  std::vector<at::Tensor> all;
  all.reserve(parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    const bool head = i + 2 >= parameters.size();
    const int64_t axes = head ? (i + 2 == parameters.size() ? 2 : 1) : i % kPerBlock > 0 ? 1 : 4;
    all.push_back(parameters[i].dim() == axes ? parameters[i].unsqueeze(0) : parameters[i]);
  }
  return all;
}

// Of T and new where they are updated; vectors (gamma, beta, bias) in order.
void make_own(std::vector<at::Tensor>& parameters, at::IntArrayRef updated, int64_t tasks) {
  for (size_t i = 0; i < parameters.size(); ++i) {
    at::Tensor& p = parameters[i];
    if (updated[i]) {
      std::vector<int64_t> sizes = p.sizes().vec();
      sizes[0] = tasks;
      p = at::empty(sizes, p.options()).copy_(p.expand(sizes));
    } else if (p.dim() == 2 && p.stride(1) != 1) {
      p = p.contiguous();
    }
  }
}

// All tasks' layers.
template <typename T>
struct Chains {
  const std::vector<at::Tensor>& parameters;  // [1 or T, ...]
  const std::vector<bool>& moves;  // which of them change
  const ChainSizes& sizes;
  at::ArrayRef<double> eps;

  T* data(int64_t i, int64_t task) const {
    const at::Tensor& p = parameters[i];
    return const_cast<T*>(p.const_data_ptr<T>()) + (p.size(0) == 1 ? 0 : task * p.stride(0));
  }
  at::Tensor tensor(int64_t i, int64_t task) const { return parameters[i].select(0, parameters[i].size(0) == 1 ? 0 : task); }

  // For so many images, or rows of features.
  Chain<T> of(int64_t images, int64_t task) const {
    const int64_t blocks = int64_t(eps.size()), head = blocks * kPerBlock;
    Chain<T> chain{{}, tensor(head, task), data(head + 1, task), moves[head], moves[head + 1]};
    bool below = false;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * kPerBlock;
      Block<T> block{};
      block.weight = tensor(at, task), block.gamma = data(at + 1, task), block.beta = data(at + 2, task);
      block.c = sizes.blocks[b], block.c.images = images;
      block.pool = sizes.pools[b], block.eps = eps[b], block.below = below;
      block.update_weight = moves[at], block.update_gamma = moves[at + 1], block.update_beta = moves[at + 2];
      below = below || block.updated();
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
  const Operands operands("inner_loop", x, {&x});
  const int64_t tasks = operands.tasks(), count = int64_t(parameters.size());
  operands.check_count("updated", updated.size(), count), operands.check_rates(steps, updated, rates_.size(), false);
  std::vector<at::Tensor> own = with_task_axis(parameters);
  const ChainSizes chain = operands.chain(x, own, geometry, eps);
  TORCH_CHECK(chain.ways > 0, "inner_loop: there is no linear layer behind ", eps.size(), " blocks");
  const at::Tensor labels = operands.labels(labels_, {tasks, x.size(1)}, chain.ways);
  if (query) {
    if (eps.empty())
      operands.check("query images", *query, {tasks, kSome, x.size(2)});
    else
      operands.check("query images", *query, {tasks, kSome, x.size(2), x.size(3), x.size(4)});
  }
  make_own(own, updated, tasks);
  const at::Tensor rows = at::empty({steps + 1, tasks}, x.options().dtype(at::kDouble));
  at::Tensor logits = query ? at::empty({tasks, query->size(1), chain.ways}, x.options()) : at::empty({0}, x.options());
  double* const out = rows.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "inner_loop", [&] {
    const Rates<scalar_t> rates(rates_, steps, updated);
    std::vector<bool> moves(count);
    for (int64_t i = 0; i < count; ++i) moves[i] = updated[i] && !rates.zero(i);
    const Chains<scalar_t> chains{own, moves, chain, eps};
    for_each_task(tasks, [&](int64_t task, Interrupt& interrupt) {
      Chain<scalar_t> support = chains.of(x.size(1), task);
      adapt(x[task], labels.const_data_ptr<int64_t>() + task * labels.size(1), support, rates, out + task, tasks, interrupt);
      double& last = out[steps * tasks + task];
      last = 0.0;
      for (int64_t i = 0; i < count; ++i)
        if (updated[i]) last += defect(chains.data(i, task), own[i].numel() / own[i].size(0));
      if (!query) return;
      Chain<scalar_t> all = chains.of(query->size(1), task);
      classify((*query)[task], all, logits[task].mutable_data_ptr<scalar_t>(), interrupt);
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

TORCH_LIBRARY_IMPL(lambda_kernels, CPU, m) { m.impl("inner_loop", &Door<&inner_loop>::call); }

}  // namespace lk
