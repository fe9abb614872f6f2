// Work of several tasks over the threads.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdint>

#include "interrupt.h"

namespace lk {

// f(task, interrupt) of every task: over the threads where there are enough, else the kernels use the threads inside a task.
template <typename F>
void for_each_task(int64_t tasks, const F& f) {
  const bool parallel = tasks >= at::get_num_threads();
  Interrupt interrupt;
  at::parallel_for(0, tasks, parallel ? 1 : tasks, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
#ifdef _OPENMP
    // oneDNN keeps its primitives by the number of threads: one made for two of them waits forever inside a parallel
    // region, where it gets one. This holds for the present region only.
    // torch sets a thread's number when it first asks for it, here and in its own library: ask before.
    if (parallel && at::in_parallel_region()) {
      at::internal::lazy_init_num_threads();
      at::get_num_threads();
      omp_set_num_threads(1);
    }
#endif
    for (int64_t task = begin; task < end; ++task) {
      interrupt.look();
      f(task, interrupt);
    }
  });
}

}  // namespace lk
