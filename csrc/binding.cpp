// The Python module lambda_kernels._C. The operators register themselves where they are defined.
#include <pybind11/pybind11.h>

#include <exception>

#include "arena.h"
#include "cpu/isa.h"
#include "inner_loop/prepared_call.h"
#include "interrupt.h"
#include "snapshot.h"

// Python's handlers of the signals that came.
static std::exception_ptr python_signals() {
  const pybind11::gil_scoped_acquire python;
  return PyErr_CheckSignals() == 0 ? nullptr : std::make_exception_ptr(pybind11::error_already_set());
}

PYBIND11_MODULE(_C, m) {
  lk::handle_signals_by(&python_signals);
  lk::bind_prepared_call(m);
  lk::bind_snapshot(m);
  m.def("kept_bytes", &lk::kept_bytes, "Bytes of scratch memory that wait for the next call.");
  m.def("isa", &lk::isa, "Instruction set of the CPU kernels: avx512, avx2 or generic (LAMBDA_KERNELS_ISA forces one).");
}
