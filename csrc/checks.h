// What every operator asks of its arguments before it touches memory: one text for each kind of fault, with names and values.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <new>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "convolution.h"

namespace lk {

// Sizes of an operand that are no number.
constexpr int64_t kSome = -1;  // any from 1 on
constexpr int64_t kOwn = -2;  // 1, or one for each task

constexpr int64_t kMostSide = (int64_t(1) << 31) - 1;  // of a size or a count
constexpr int64_t kMostValues = int64_t(1) << 46;  // of anything that is stored: no product of sizes overflows
constexpr int64_t kPerBlock = 3;  // parameters of a chain's block: weight, gamma, beta
constexpr int64_t kGeometry = 8;  // numbers of one: stride, padding, dilation (vertical, horizontal each), groups, pool

// A chain's sizes, the same for all tasks.
struct ChainSizes {
  std::vector<Convolution> blocks;
  std::vector<int64_t> pools;
  int64_t channels, height, width;  // of the last block's result
  int64_t ways = 0;  // 0 without a linear layer

  int64_t features() const { return channels * height * width; }
};

// An operator's tensors: on the CPU, in the dtype of the first.
class Operands {
 public:
  // with_tasks: tensors whose first axis counts tasks, or is 1
  Operands(const char* name, const at::Tensor& first, std::initializer_list<const at::Tensor*> with_tasks)
      : name_(name), dtype_(first.scalar_type()) {
    for (const at::Tensor* t : with_tasks) count_tasks(*t);
  }
  void count_tasks(const at::Tensor& t) { tasks_ = t.dim() > 0 ? std::max(tasks_, t.size(0)) : tasks_; }

  int64_t tasks() const { return tasks_; }

  // place: of the layer that it belongs to, or -1
  void check(const char* what, const at::Tensor& t, std::initializer_list<int64_t> sizes, int64_t place = -1,
             std::optional<at::ScalarType> dtype = std::nullopt) const {
    bool fits = t.defined() && t.device().is_cpu() && t.layout() == at::kStrided &&
                t.scalar_type() == dtype.value_or(dtype_) && t.dim() == int64_t(sizes.size());
    for (size_t axis = 0; fits && axis < sizes.size(); ++axis) {
      const int64_t wanted = sizes.begin()[axis], size = t.size(int64_t(axis));
      fits = wanted == size || (wanted < 0 && size > 0 && (wanted == kSome || size == 1 || size == tasks_));
    }
    if (!fits) refuse(what, t, sizes, place, dtype.value_or(dtype_));
  }

  // As above, and in one piece.
  void check_dense(const char* what, const at::Tensor& t, std::initializer_list<int64_t> sizes,
                   std::optional<at::ScalarType> dtype = std::nullopt) const {
    check(what, t, sizes, -1, dtype);
    TORCH_CHECK(t.is_contiguous(), name_, ": ", what, " must be contiguous, got strides ", t.strides());
  }

  void check_count(const char* what, size_t count, int64_t wanted) const {
    TORCH_CHECK(int64_t(count) == wanted, name_, ": ", what, " must be ", wanted, " numbers, got ", count);
  }

  // A convolution with a pool behind it. x ends in [images, C, H, W], weight in [O, C / groups, kh, kw]; geometry: stride,
  // padding, dilation, vertical and horizontal each.
  Convolution convolution(at::IntArrayRef x, at::IntArrayRef weight, const int64_t* geometry, int64_t groups,
                          int64_t pool) const;

  // The same of x [1 or T, N, C, H, W] and weight [1 or T, O, C, kh, kw]; numbers: geometry and pool.
  Convolution block(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef numbers) const {
    check("x", x, {kOwn, kSome, kSome, kSome, kSome}), check("the weight", weight, {kOwn, kSome, kSome, kSome, kSome});
    check_count("geometry", numbers.size(), kGeometry - 1);
    return convolution(x.sizes(), weight.sizes(), numbers.data(), 1, numbers[6]);
  }

  // A chain of blocks over x [T, N, C, H, W] (without blocks [T, N, F]) and, where there are two parameters more, a linear
  // layer. All have a task axis.
  ChainSizes chain(const at::Tensor& x, at::ArrayRef<at::Tensor> parameters, at::IntArrayRef geometry,
                   at::ArrayRef<double> eps) const;

  // Labels of so many images, dense, each of 0 to ways - 1.
  at::Tensor labels(const at::Tensor& given, std::initializer_list<int64_t> sizes, int64_t ways) const;

  // steps with one rate for all of them or, unless `each`, one for each updated parameter
  void check_rates(int64_t steps, at::IntArrayRef updated, size_t rates, bool each) const;

 private:
  [[noreturn]] void refuse(const char* what, const at::Tensor& t, at::IntArrayRef sizes, int64_t place,
                           at::ScalarType dtype) const;

  const char* name_;
  at::ScalarType dtype_;
  int64_t tasks_ = 1;
};

// Says what there was not enough memory for, and what to do.
[[noreturn]] void out_of_memory(const std::exception& why);

bool lacks_memory(const c10::Error& why);  // as torch's allocator says it

// An operator as it is registered: whatever runs out of memory in it says what to do.
template <auto f>
struct Door;

template <typename R, typename... A, R (*f)(A...)>
struct Door<f> {
  static R call(A... arguments) {
    try {
      return f(std::forward<A>(arguments)...);
    } catch (const std::bad_alloc& why) {
      out_of_memory(why);
    } catch (const std::length_error& why) {
      out_of_memory(why);
    } catch (const c10::Error& why) {
      if (lacks_memory(why)) out_of_memory(why);
      throw;
    }
  }
};

}  // namespace lk
