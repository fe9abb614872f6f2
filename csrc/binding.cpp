// The Python module lambda_kernels._C. The operators register themselves where they are defined.
#include <pybind11/pybind11.h>

#include "arena.h"
#include "cpu/isa.h"
#include "inner_loop/prepared_call.h"
#include "snapshot.h"

PYBIND11_MODULE(_C, m) {
  lk::bind_prepared_call(m);
  lk::bind_snapshot(m);
  m.def("kept_bytes", &lk::kept_bytes, "Bytes of scratch memory that wait for the next call.");
  m.def("isa", &lk::isa, "Instruction set of the CPU kernels: avx512, avx2 or generic (LAMBDA_KERNELS_ISA forces one).");
}
