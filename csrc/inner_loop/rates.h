// How much of its gradient each parameter loses in each step.
#pragma once
#include <cstdint>
#include <vector>

#include <c10/util/ArrayRef.h>

namespace lk {

template <typename T>
class Rates {
 public:
  // `given`: one number for all, or one per step and updated parameter, step by step.
  Rates(c10::ArrayRef<double> given, int64_t steps, c10::IntArrayRef updated)
      : steps_(steps), parameters_(int64_t(updated.size())), values_(steps * parameters_, T(0)) {
    auto next = given.begin();
    for (int64_t i = 0; i < steps * parameters_; ++i)
      if (updated[i % parameters_]) values_[i] = T(given.size() == 1 ? given[0] : *next++);
  }

  int64_t steps() const { return steps_; }

  const T* of(int64_t step) const { return values_.data() + step * parameters_; }  // [parameters], 0 where one stays

  // Whether all steps have one rate for a parameter.
  bool one(int64_t parameter) const {
    for (int64_t step = 1; step < steps_; ++step)
      if (of(step)[parameter] != of(0)[parameter]) return false;
    return true;
  }

  // Whether a parameter stays as it is in all steps.
  bool zero(int64_t parameter) const { return steps_ > 0 && one(parameter) && of(0)[parameter] == T(0); }

 private:
  int64_t steps_, parameters_;
  std::vector<T> values_;  // [steps, parameters]
};

}  // namespace lk
