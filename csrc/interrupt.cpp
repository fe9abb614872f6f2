#include "interrupt.h"

#include <pybind11/pybind11.h>

namespace lk {

void Interrupt::ask() {
  const pybind11::gil_scoped_acquire python;
  asked_ = Clock::now();
  if (PyErr_CheckSignals() == 0) return;
  what_ = std::make_exception_ptr(pybind11::error_already_set());
  raised_.store(true, std::memory_order_release);
  std::rethrow_exception(what_);
}

}  // namespace lk
